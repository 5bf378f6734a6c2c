"""The model against a second one, written token by token from the formulas (`naive.py`)."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ling_flow.errors import UserError
from ling_flow.model.config import ModelConfig, RouterLoss, Yarn
from ling_flow.model.flops import training_flops_per_token
from ling_flow.model.hf import published_tensors
from ling_flow.model.layers import SparseMoE
from ling_flow.model.packing import PADDING
from ling_flow.model.presets import tiny
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from tests.model.naive import NaiveModel, Tensors, doubles


def config(**changes: Any) -> ModelConfig:
    base = {
        "vocab_size": 29,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "rope_theta": 50.0,
        "max_position_embeddings": 64,
        "torch_dtype": "float32",
    }
    return ModelConfig(**{**base, **changes})


def make_model(**changes: Any) -> BailingMoeV2ForCausalLM:
    """Weights large enough for every part to matter; biases and norms not trivial."""
    model = BailingMoeV2ForCausalLM(config(**changes))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        for gate in model.gates():
            gate.expert_bias.copy_(0.2 * torch.randn(gate.expert_bias.shape, generator=generator))
    return model


def tokens(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(29, (rows, columns), generator=torch.Generator().manual_seed(seed))


def check_against_naive(
    model: BailingMoeV2ForCausalLM,
    rows: Tensor,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    router_loss: RouterLoss | None = None,
) -> None:
    """Losses, router counts and every gradient."""
    out = model.loss(rows, mask, documents, router_loss)
    out.loss.backward()
    naive = NaiveModel(doubles(model), model.config)
    for tensor in naive.w.values():
        tensor.requires_grad_()
    first, second = naive.losses(
        rows.tolist(), None if mask is None else mask.tolist(), None if documents is None else documents.tolist()
    )
    router = naive.router_loss(router_loss or RouterLoss())
    torch.testing.assert_close(out.cross_entropy.double(), first.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.mtp_cross_entropy.double(), second.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.router.double(), router.detach(), atol=1e-5, rtol=1e-4)
    sparse = [i for i, layer in enumerate(model.model.layers) if isinstance(layer.mlp, SparseMoE)]
    for index, gate in zip(sparse, model.gates(), strict=True):
        assert gate.expert_counts.tolist() == (
            naive.counts(index) if index in naive.choices else [0] * len(gate.expert_counts)
        )
    (first + model.config.mtp_loss_scaling_factor * second + router).backward()  # type: ignore[no-untyped-call]
    gradients = BailingMoeV2ForCausalLM(model.config)
    gradients.load_state_dict({name: parameter.grad for name, parameter in model.named_parameters()}, strict=False)
    for name, gradient in published_tensors(gradients).items():
        if name.endswith("expert_bias"):
            assert naive.w[name].grad is None
            continue
        theirs = naive.w[name].grad
        expected = torch.zeros_like(naive.w[name]) if theirs is None else theirs
        scale = float(expected.abs().max()) + 1e-3
        torch.testing.assert_close(
            gradient.double() / scale, expected / scale, atol=5e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_logits_equal_the_naive_model() -> None:
    model, ids = make_model(), tokens(2, 9)
    logits = model(ids)
    assert logits.dtype == torch.float32
    naive = NaiveModel(doubles(model), model.config)
    expected = torch.stack([torch.stack([naive.logits(h) for h in naive.trunk(row)]) for row in ids.tolist()])
    torch.testing.assert_close(logits.double(), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_every_gradient_equal_the_naive_model(masked: bool) -> None:
    mask = torch.ones(2, 6, dtype=torch.bool)
    if masked:
        mask[0, 4:] = False
        mask[1, :2] = False
    check_against_naive(make_model(), tokens(2, 7), mask if masked else None)


@st.composite
def small_configs(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, groups = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 4]))
    experts = groups * draw(st.sampled_from([2, 3]))
    topk_group = draw(st.integers(1, groups))
    layers = draw(st.integers(1, 2))
    yarn = {"type": "yarn", "factor": draw(st.sampled_from([2.0, 4.0])), "original_max_position_embeddings": 16}
    return {
        "num_hidden_layers": layers,
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 3])),
        "head_dim": draw(st.sampled_from([4, 8])),
        "partial_rotary_factor": draw(st.sampled_from([0.5, 1.0])),
        **draw(st.sampled_from([{}, {"rope_scaling": yarn, "max_position_embeddings": int(16 * yarn["factor"])}])),
        "num_experts": experts,
        "n_group": groups,
        "topk_group": topk_group,
        "num_experts_per_tok": draw(st.integers(1, min(3, topk_group * experts // groups))),
        "num_shared_experts": draw(st.integers(0, 2)),
        "num_nextn_predict_layers": draw(st.integers(0, 2)),
        "mtp_loss_scaling_factor": 0.5,
        "hidden_size": 6,
        "intermediate_size": 5,
        "moe_intermediate_size": 4,
    }


@settings(max_examples=25, deadline=None, derandomize=True)
@given(changes=small_configs(), seed=st.integers(0, 1000), packed=st.booleans(), masked=st.booleans(), data=st.data())
def test_any_config_equals_the_naive_model(
    changes: dict[str, Any], seed: int, packed: bool, masked: bool, data: st.DataObject
) -> None:
    rows = tokens(2, 8, seed)
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(seed)) > 0.3 if masked else None
    documents = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, -1, -1, -1]]) if packed else None
    router_loss = data.draw(
        st.sampled_from([None, RouterLoss(balance=0.3), RouterLoss(balance=0.2, balance_over="batch", z=0.1)])
    )
    check_against_naive(make_model(**changes), rows, mask, documents, router_loss)


def test_packed_documents_equal_separate_ones() -> None:
    model = make_model(num_nextn_predict_layers=2)
    pieces = [tokens(1, length, seed=length) for length in (4, 9, 6)]
    row = torch.cat([*pieces, torch.zeros(1, 13, dtype=torch.int64)], 1)
    numbers = torch.tensor([[0] * 4 + [1] * 9 + [0] * 6 + [PADDING] * 13])
    together = model.token_logprobs(row, documents_BS1=numbers)
    at = 0
    for piece in pieces:
        length = piece.shape[1]
        torch.testing.assert_close(together[:, at : at + length - 1], model.token_logprobs(piece), atol=1e-5, rtol=1e-5)
        at += length
    # A row may be longer than the context, as long as no document is.
    model.set_context(9, model.config.rope_theta, None)
    torch.testing.assert_close(model.token_logprobs(row, documents_BS1=numbers), together)
    with pytest.raises(UserError, match=r"10 tokens is longer than max_position_embeddings \(9\)"):
        model.loss(tokens(1, 11), documents_BS1=torch.zeros(1, 11, dtype=torch.int64))


@pytest.mark.parametrize("packed", [False, True])
def test_recomputation_changes_no_bit(packed: bool) -> None:
    numbers = torch.tensor([[0] * 8 + [1] * 9, [0] * 17]) if packed else None
    results = []
    for recompute in (False, True):
        model = make_model(num_nextn_predict_layers=2)
        model.recompute = recompute
        out = model.loss(tokens(2, 17), documents_BS1=numbers, router_loss=RouterLoss(balance=0.1, z=0.1))
        out.loss.backward()
        counts = [gate.expert_counts for gate in model.gates()]
        results.append([out.loss.detach(), *counts, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_recomputation_keeps_less() -> None:
    def kept(recompute: bool) -> int:
        model = make_model(num_hidden_layers=6)
        model.recompute = recompute
        sizes: dict[int, int] = {}

        def pack_hook(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            model.loss(tokens(4, 65))
        return sum(sizes.values())

    assert kept(True) < 0.4 * kept(False)


def test_token_logprobs_are_the_log_softmax_of_the_logits_and_carry_gradients() -> None:
    model, rows = make_model(), tokens(2, 8)
    expected = torch.log_softmax(model(rows[:, :-1]), -1).gather(2, rows[:, 1:].unsqueeze(-1)).squeeze(-1)
    logprobs = model.token_logprobs(rows)
    torch.testing.assert_close(logprobs, expected)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(2))
    mine = torch.autograd.grad((logprobs * weights).sum(), model.model.word_embeddings.weight)
    theirs = torch.autograd.grad((expected * weights).sum(), model.model.word_embeddings.weight)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    mask = torch.arange(16).view(2, 8) % 3 > 0
    torch.testing.assert_close(model.token_logprobs(rows, mask[:, :7]), logprobs * mask[:, :7])


def test_without_mtp_layer_the_loss_is_the_cross_entropy() -> None:
    out = make_model(num_nextn_predict_layers=0).loss(tokens(2, 8))
    assert out.mtp_cross_entropy == 0
    assert out.loss == out.cross_entropy


def test_a_step_is_the_same_bit_for_bit() -> None:
    def gradients() -> list[Tensor]:
        model = BailingMoeV2ForCausalLM(tiny())
        model.init_weights(3)
        model.loss(tokens(4, 65)).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_initial_weights_depend_on_the_seed_only() -> None:
    def weights(seed: int, threads: int) -> Tensors:
        torch.set_num_threads(threads)
        torch.rand(threads)  # the global generator must not matter
        model = BailingMoeV2ForCausalLM(tiny())
        model.init_weights(seed)
        return published_tensors(model)

    before = torch.get_num_threads()
    try:
        one, two, other = weights(0, 1), weights(0, 2), weights(1, 1)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    matrix = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert not torch.equal(one[matrix], other[matrix])
    assert one["lm_head.weight"].std() == pytest.approx(tiny().initializer_range, rel=0.02)
    assert one["model.norm.weight"].eq(1).all()


def test_bias_update_is_zero_mean_and_clears_the_counts() -> None:
    model = make_model()
    model.loss(tokens(2, 9))
    gate = model.gates()[0]
    counts, before = gate.expert_counts.clone(), gate.expert_bias.clone()
    assert counts.sum() == 2 * 8 * 3
    mean = counts.double().mean()
    sign = torch.tensor([(mean > n).int() - (mean < n).int() for n in counts], dtype=torch.float32)
    model.update_expert_bias(0.01)
    torch.testing.assert_close(gate.expert_bias, before + 0.01 * (sign - sign.mean()))
    assert gate.expert_counts.sum() == 0


def test_padding_evaluation_and_inference_are_not_counted() -> None:
    model = make_model()
    documents = torch.zeros(2, 9, dtype=torch.int64)
    documents[0, 4:] = PADDING
    model.loss(tokens(2, 9), documents_BS1=documents)
    assert model.gates()[0].expert_counts.sum() == (4 + 8) * 3
    assert model.gates()[-1].expert_counts.sum() == (2 + 7) * 3  # the MTP layer counts what has a target for it
    model.update_expert_bias(0.0)
    with torch.no_grad():
        model.loss(tokens(2, 9))
    model.eval()
    model.loss(tokens(2, 9))
    assert all(gate.expert_counts.sum() == 0 for gate in model.gates())
    assert model.update_expert_bias(0.1) == 0.0
    assert make_model(num_hidden_layers=1, num_nextn_predict_layers=0).update_expert_bias(0.1) == 0.0  # no router


def test_bias_updates_balance_a_skewed_router() -> None:
    model = make_model(num_hidden_layers=2)
    with torch.no_grad():
        for gate in model.gates():
            gate.expert_bias.copy_(torch.tensor([1.0, 1.0, 0, 0, 0, 0, 0, 0]))
    violations = []
    for step in range(150):
        model.loss(tokens(8, 33, seed=step))
        violations.append(model.update_expert_bias(0.02))
    assert violations[0] > 1.4
    assert sum(violations[-10:]) / 10 < 0.5


def test_context_changes_between_stages() -> None:
    model, ids = make_model(), tokens(1, 40)
    before = model(ids)
    model.set_context(64, 5000.0, None)
    assert model.config.rope_theta == 5000.0
    assert not torch.allclose(model(ids), before, atol=1e-3)
    torch.testing.assert_close(model(ids), make_model(rope_theta=5000.0)(ids))
    with pytest.raises(UserError, match=r"65 tokens is longer than max_position_embeddings \(64\)"):
        model(tokens(1, 65))
    yarn = Yarn(factor=2.0, original_max_position_embeddings=64)
    model.set_context(128, 5000.0, yarn)
    expected = make_model(rope_theta=5000.0, rope_scaling=yarn, max_position_embeddings=128)
    torch.testing.assert_close(model(tokens(1, 128)), expected(tokens(1, 128)))
    with pytest.raises(UserError, match="rope_theta"):
        model.set_context(64, -1.0, None)
    with pytest.raises(UserError, match=r"must be rope_scaling.factor x original_max_position_embeddings \(128\)"):
        model.set_context(129, 5000.0, yarn)


def test_casting_to_bfloat16_keeps_the_expert_bias_exact() -> None:
    model, rows = make_model(), tokens(4, 17)
    bias = model.gates()[0].expert_bias.clone()
    reference = model.loss(rows).cross_entropy
    model.to(torch.bfloat16)
    assert torch.equal(model.gates()[0].expert_bias, bias)
    out = model.loss(rows)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert out.cross_entropy.item() == pytest.approx(reference.item(), rel=0.05)
    assert all(
        p.grad is not None and p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters()
    )


@pytest.mark.usefixtures("unpadded_experts")
def test_flops_are_those_counted_in_a_forward_pass() -> None:
    model = make_model(num_nextn_predict_layers=0)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(tokens(2, 10))
    flops = training_flops_per_token(model.config, 10)
    attention_scores = 3 * 3 * 4 * 10 * 4 * 8
    matrix_products = counter.get_total_flops() - sum(
        n for name, n in counter.get_flop_counts()["Global"].items() if "attention" in str(name)
    )
    assert 3 * matrix_products == 20 * (flops.total - attention_scores)
