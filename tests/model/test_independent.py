"""The model against implementations that others wrote, on the same random weights in float32: logits and gradients
against `nemo_automodel` (plain torch), YaRN against transformers.

Where `nemo_automodel` is not what the published modelling code computes (ling2-facts §1.2), the published code is
right:

- With the score function `sigmoid`, experts outside the chosen groups get the score 0 instead of -inf, so that they
  beat experts of a chosen group whose biased score is negative. `sigmoid_with_bias` masks as published.
- `rope_theta` is cut to a whole number, and YaRN's ramp does not begin and end at whole indices.
- There is no MTP layer.
"""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ling_flow.kernels.rotary import yarn_frequencies, yarn_scale
from ling_flow.model.config import ModelConfig
from ling_flow.model.hf import published_tensors
from ling_flow.model.transformer import BailingMoeV2ForCausalLM

ling_v2 = pytest.importorskip(
    "nemo_automodel.components.models.ling_v2", reason="`make setup` installs it for the tests alone"
)
common = pytest.importorskip("nemo_automodel.components.models.common")

Tensors = dict[str, Tensor]
# Names of those keys that their configuration class takes.
SHARED_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "first_k_dense_replace", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts",
    "num_experts_per_tok", "num_shared_experts", "n_group", "topk_group", "routed_scaling_factor", "rms_norm_eps",
    "partial_rotary_factor", "rope_theta", "max_position_embeddings",
)  # fmt: skip


def random_config(seed: int, **changes: Any) -> ModelConfig:
    pick = random.Random(seed)
    groups = pick.choice([1, 2, 4, 8])
    per_group = pick.choice([2, 4, 8]) if groups > 1 else 16
    topk_group = max(1, groups // pick.choice([1, 2, 2]))
    kv_heads = pick.choice([1, 2, 4])
    layers = pick.randint(2, 4)
    settings = dict(
        vocab_size=97,
        hidden_size=pick.choice([32, 48]),
        intermediate_size=pick.choice([40, 64]),
        moe_intermediate_size=pick.choice([8, 24]),
        num_hidden_layers=layers,
        first_k_dense_replace=pick.randint(0, layers - 1),
        num_attention_heads=kv_heads * pick.choice([1, 2, 4]),
        num_key_value_heads=kv_heads,
        head_dim=pick.choice([8, 16, 32]),
        num_experts=groups * per_group,
        num_experts_per_tok=pick.randint(2, min(8, topk_group * per_group)),
        num_shared_experts=pick.choice([0, 1, 1, 2]),
        n_group=groups,
        topk_group=topk_group,
        routed_scaling_factor=pick.choice([1.0, 2.5]),
        rms_norm_eps=pick.choice([1e-6, 1e-5]),
        partial_rotary_factor=pick.choice([0.5, 0.25, 1.0]),
        rope_theta=float(pick.choice([100, 10_000, 600_000])),
        max_position_embeddings=64,
        num_nextn_predict_layers=0,
        torch_dtype="float32",
    )
    return ModelConfig(**{**settings, **changes})


def our_model(config: ModelConfig, seed: int, bias: float) -> BailingMoeV2ForCausalLM:
    """Weights large enough for every part to matter."""
    model = BailingMoeV2ForCausalLM(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)
        for gate in model.gates():
            gate.expert_bias.copy_(bias * torch.randn(gate.expert_bias.shape, generator=generator))
    return model


def their_model(ours: BailingMoeV2ForCausalLM, score_function: str = "sigmoid_with_bias") -> Any:
    """Their model with a copy of our weights, by the published names."""
    settings = ours.config.to_hf()
    config = ling_v2.BailingMoeV2Config(**{key: settings[key] for key in SHARED_KEYS}, torch_dtype=torch.float32)
    plain = common.BackendConfig(attn="sdpa", linear="torch", rms_norm="torch", experts="torch", dispatcher="torch")
    model = ling_v2.BailingMoeV2ForCausalLM(config, backend=plain, moe_overrides={"score_func": score_function})
    weights = {name: tensor.detach().clone() for name, tensor in published_tensors(ours).items()}
    model.load_state_dict(model.state_dict_adapter.from_hf(weights), strict=True)
    return model


def tokens(config: ModelConfig, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (3, 33), generator=generator)


def assert_equal(ours: Tensor, theirs: Tensor, what: str) -> None:
    """To 1e-5 of the largest value."""
    error = float((ours.detach() - theirs.detach()).abs().max() / theirs.detach().abs().max().clamp(min=1e-30))
    assert error < 1e-5, f"{what}: relative error {error:.1e}"


def gradients_by_published_name(model: BailingMoeV2ForCausalLM) -> Tensors:
    holder = BailingMoeV2ForCausalLM(model.config)
    holder.load_state_dict({name: parameter.grad for name, parameter in model.named_parameters()}, strict=False)
    return {name: tensor for name, tensor in published_tensors(holder).items() if not name.endswith("expert_bias")}


@pytest.mark.parametrize("seed", range(12))
def test_logits_and_gradients_are_the_same(seed: int) -> None:
    config = random_config(seed)
    ours = our_model(config, seed, bias=3.0 if seed % 2 else 0.3)
    theirs = their_model(ours)
    rows_BS1 = tokens(config, seed)
    logits_BSV, their_logits_BSV = ours(rows_BS1[:, :-1]), theirs(rows_BS1[:, :-1]).logits
    assert_equal(logits_BSV, their_logits_BSV, "logits")

    ours.loss(rows_BS1).loss.backward()
    torch.nn.functional.cross_entropy(their_logits_BSV.flatten(0, 1), rows_BS1[:, 1:].flatten()).backward()
    gradients = gradients_by_published_name(ours)
    expected = theirs.state_dict_adapter.to_hf(
        {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()}
    )
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_equal(gradient, expected[name], name)


@pytest.mark.parametrize("seed", range(3))
def test_negative_scores_win_over_other_groups(seed: int) -> None:
    config = random_config(seed, n_group=4, topk_group=2, num_experts=16, num_experts_per_tok=5)
    ours = our_model(config, seed, bias=0.3)
    for gate in ours.gates():
        gate.expert_bias.sub_(3)
    ids_BS = tokens(config, seed)
    assert_equal(ours(ids_BS), their_model(ours)(ids_BS).logits, "logits")


@pytest.mark.parametrize("seed", range(3))
def test_logits_with_their_usual_score_function(seed: int) -> None:
    config = random_config(seed, n_group=4, topk_group=2, num_experts=16, num_experts_per_tok=4)
    ours = our_model(config, seed, bias=0.3)
    for gate in ours.gates():
        gate.expert_bias.abs_()  # no negative score: masking with 0 chooses the same experts
    ids_BS = tokens(config, seed)
    assert_equal(ours(ids_BS), their_model(ours, "sigmoid")(ids_BS).logits, "logits")


def test_a_single_expert_is_weighted_by_its_bare_score() -> None:
    """The published code normalises the weights only where a token has several experts."""
    config = random_config(0, num_experts_per_tok=1)
    ours = our_model(config, 0, bias=0.3)
    ids_BS = tokens(config, 0)
    assert_equal(ours(ids_BS), their_model(ours)(ids_BS).logits, "logits")


@pytest.mark.parametrize(
    ("head_dim", "share", "theta", "factor", "original_length"),
    [(128, 0.5, 600_000.0, 4.0, 32_768), (64, 0.5, 10_000.0, 8.0, 4096), (16, 1.0, 50.0, 2.5, 100)],
)
def test_yarn_is_that_of_transformers(
    head_dim: int, share: float, theta: float, factor: float, original_length: int
) -> None:
    parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "partial_rotary_factor": share,
        "factor": factor,
        "original_max_position_embeddings": original_length,
    }
    config = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=int(factor * original_length), rope_parameters=parameters
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    torch.testing.assert_close(yarn_frequencies(int(head_dim * share), theta, factor, original_length), frequencies)
    assert yarn_scale(factor) == pytest.approx(scale)
