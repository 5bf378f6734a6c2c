"""What `build_optimizer` gives: torch's AdamW, in its fused form; every update is one that FP8 layers see."""

from typing import get_args

import pytest
import torch

from ling_flow.kernels.fp8_layers import FP8Weight
from ling_flow.model.presets import tiny
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.optimizer import build_optimizer
from ling_flow.training.settings import OptimizerSettings


def with_gradients(seed: int) -> BailingMoeV2ForCausalLM:
    model = BailingMoeV2ForCausalLM(tiny())
    model.init_weights(0)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", get_args(OptimizerSettings.model_fields["optimizer"].annotation))
def test_fp8_layers_see_an_update_of_every_matrix(kind):
    model = with_gradients(0)
    optimizer = build_optimizer(model, OptimizerSettings(learning_rate=1e-2, optimizer=kind))
    matrices = [(FP8Weight(), parameter) for parameter in model.parameters() if parameter.dim() > 1]
    before = [(kept.quantized(weight), weight.detach().clone()) for kept, weight in matrices]
    optimizer.step()
    for (kept, weight), (quantized, value) in zip(matrices, before, strict=True):
        assert not torch.equal(weight, value)
        found, expected = kept.quantized(weight), FP8Weight().quantized(weight)
        assert found is not quantized
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_it_is_torchs_adamw_without_decay_of_vectors():
    settings = OptimizerSettings(learning_rate=1e-3)
    ours = with_gradients(0)
    theirs = with_gradients(0)
    matrices = [parameter for parameter in theirs.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in theirs.parameters() if parameter.dim() <= 1]
    assert matrices and vectors
    plain = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay, foreach=False,
    )  # fmt: skip
    optimizer = build_optimizer(ours, settings)
    for seed in range(1, 4):
        for model, made in ((ours, optimizer), (theirs, plain)):
            made.step()
            for parameter, other in zip(model.parameters(), with_gradients(seed).parameters(), strict=True):
                parameter.grad = other.grad
    for (name, mine), exact in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-7, msg=name)
