"""The model against a second one, written token by token from the formulas (Ling 2.0 §2; remote code), in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ling_flow.errors import UserError
from ling_flow.model.config import ModelConfig
from ling_flow.model.flops import training_flops_per_token
from ling_flow.model.hf import published_tensors
from ling_flow.model.presets import tiny
from ling_flow.model.transformer import BailingMoeV2ForCausalLM

Tensors = dict[str, Tensor]


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


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + 1e-6) * weight


def mlp(x: Tensor, w: Tensors, prefix: str) -> Tensor:
    gate = w[f"{prefix}.gate_proj.weight"] @ x
    return w[f"{prefix}.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * (w[f"{prefix}.up_proj.weight"] @ x))


def moe(x: Tensor, w: Tensors, prefix: str, c: ModelConfig) -> Tensor:
    scores = 1 / (1 + torch.exp(-(w[f"{prefix}.gate.weight"] @ x)))
    biased = (scores + w[f"{prefix}.gate.expert_bias"]).tolist()
    size = c.num_experts // c.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(c.n_group)]
    best = sorted(groups, key=lambda group: -sum(sorted(biased[e] for e in group)[-2:]))[: c.topk_group]
    chosen = sorted((e for group in best for e in group), key=lambda e: -biased[e])[: c.num_experts_per_tok]
    total = sum(scores[e] for e in chosen)
    out = mlp(x, w, f"{prefix}.shared_experts")
    for e in chosen:
        out = out + c.routed_scaling_factor * scores[e] / total * mlp(x, w, f"{prefix}.experts.{e}")
    return out


def turned(x: Tensor, position: int, c: ModelConfig) -> Tensor:
    half = c.rotary_dim // 2
    out = list(x)
    for i in range(half):
        angle = position * c.rope_theta ** (-2 * i / c.rotary_dim)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return torch.stack(out)


def attention(xs: list[Tensor], w: Tensors, prefix: str, c: ModelConfig) -> list[Tensor]:
    heads, kv, width = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    queries, keys, values = [], [], []
    for position, x in enumerate(xs):
        parts = (w[f"{prefix}.query_key_value.weight"] @ x).split(width)  # [Q | K | V]
        queries.append([turned(norm(p, w[f"{prefix}.query_layernorm.weight"]), position, c) for p in parts[:heads]])
        keys.append(
            [turned(norm(p, w[f"{prefix}.key_layernorm.weight"]), position, c) for p in parts[heads : heads + kv]]
        )
        values.append(parts[heads + kv :])
    outs = []
    for position in range(len(xs)):
        per_head = []
        for head in range(heads):
            group = head // (heads // kv)
            scores = torch.stack(
                [queries[position][head] @ keys[j][group] / math.sqrt(width) for j in range(position + 1)]
            )
            shares = torch.exp(scores) / torch.exp(scores).sum()
            per_head.append(sum(shares[j] * values[j][group] for j in range(position + 1)))
        outs.append(w[f"{prefix}.dense.weight"] @ torch.cat(per_head))
    return outs


def layer(hs: list[Tensor], w: Tensors, index: int, c: ModelConfig) -> list[Tensor]:
    prefix = f"model.layers.{index}"
    attended = attention([norm(h, w[f"{prefix}.input_layernorm.weight"]) for h in hs], w, f"{prefix}.attention", c)
    hs = [h + a for h, a in zip(hs, attended, strict=True)]
    normed = [norm(h, w[f"{prefix}.post_attention_layernorm.weight"]) for h in hs]
    dense = index < c.first_k_dense_replace
    return [
        h + (mlp(n, w, f"{prefix}.mlp") if dense else moe(n, w, f"{prefix}.mlp", c))
        for h, n in zip(hs, normed, strict=True)
    ]


def trunk(row: list[int], w: Tensors, c: ModelConfig) -> list[Tensor]:
    hs = [w["model.word_embeddings.weight"][t] for t in row]
    for index in range(c.num_hidden_layers):
        hs = layer(hs, w, index, c)
    return [norm(h, w["model.norm.weight"]) for h in hs]


def nll(h: Tensor, target: int, w: Tensors) -> Tensor:
    logits = w["lm_head.weight"] @ h
    return torch.log(torch.exp(logits).sum()) - logits[target]


def naive_loss(rows: list[list[int]], mask: list[list[bool]], w: Tensors, c: ModelConfig) -> tuple[Tensor, Tensor]:
    """(cross-entropy, MTP cross-entropy)."""
    first, second = [], []
    for row, counts in zip(rows, mask, strict=True):
        hs = trunk(row[:-1], w, c)
        first += [nll(h, row[i + 1], w) for i, h in enumerate(hs) if counts[i]]
        prefix = f"model.layers.{c.num_hidden_layers}"
        us = []
        for i, h in enumerate(hs):
            embedding = norm(w["model.word_embeddings.weight"][row[i + 1]], w[f"{prefix}.enorm.weight"])
            us.append(w[f"{prefix}.eh_proj.weight"] @ torch.cat([embedding, norm(h, w[f"{prefix}.hnorm.weight"])]))
        outs = [norm(u, w[f"{prefix}.final_layernorm.weight"]) for u in layer(us, w, c.num_hidden_layers, c)]
        second += [nll(out, row[i + 2], w) for i, out in enumerate(outs[:-1]) if counts[i + 1]]
    return sum(first) / len(first), sum(second) / len(second)  # type: ignore[return-value]


def doubles(model: BailingMoeV2ForCausalLM) -> Tensors:
    return {name: tensor.detach().double().clone() for name, tensor in published_tensors(model).items()}


def test_logits_equal_the_naive_model() -> None:
    model, ids = make_model(), tokens(2, 9)
    logits = model(ids)
    assert logits.dtype == torch.float32
    w = doubles(model)
    expected = torch.stack(
        [torch.stack([w["lm_head.weight"] @ h for h in trunk(row, w, model.config)]) for row in ids.tolist()]
    )
    torch.testing.assert_close(logits.double(), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_every_gradient_equal_the_naive_model(masked: bool) -> None:
    model, rows = make_model(), tokens(2, 7)
    mask = torch.ones(2, 6, dtype=torch.bool)
    if masked:
        mask[0, 4:] = False
        mask[1, :2] = False
    out = model.loss(rows, mask if masked else None)
    out.loss.backward()
    w = doubles(model)
    for tensor in w.values():
        tensor.requires_grad_()
    first, second = naive_loss(rows.tolist(), mask.tolist(), w, model.config)
    torch.testing.assert_close(out.cross_entropy.double(), first.detach(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out.mtp_cross_entropy.double(), second.detach(), atol=1e-4, rtol=1e-5)
    (first + 0.1 * second).backward()  # type: ignore[no-untyped-call]
    gradients = BailingMoeV2ForCausalLM(model.config)
    gradients.load_state_dict({name: parameter.grad for name, parameter in model.named_parameters()}, strict=False)
    compared = 0
    for name, gradient in published_tensors(gradients).items():
        if name.endswith("expert_bias"):
            continue
        theirs = w[name].grad
        expected = torch.zeros_like(w[name]) if theirs is None else theirs
        scale = float(expected.abs().max()) + 1e-3
        torch.testing.assert_close(
            gradient.double() / scale, expected / scale, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
        compared += 1
    assert compared == len(w) - 3  # all but the routers' biases


def test_token_logprobs_are_the_log_softmax_of_the_logits_and_carry_gradients() -> None:
    model, rows = make_model(), tokens(2, 8)
    expected = torch.log_softmax(model(rows[:, :-1]), -1).gather(2, rows[:, 1:].unsqueeze(-1)).squeeze(-1)
    logprobs = model.token_logprobs(rows)
    torch.testing.assert_close(logprobs, expected)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(2))
    mine = torch.autograd.grad((logprobs * weights).sum(), model.model.word_embeddings.weight)
    theirs = torch.autograd.grad((expected * weights).sum(), model.model.word_embeddings.weight)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


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
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 3:] = False  # three tokens, then padding
    mask[1, :5] = False  # a prompt: real tokens
    model.loss(tokens(2, 9), mask)
    assert model.gates()[0].expert_counts.sum() == (3 + 8) * 3
    assert model.gates()[-1].expert_counts.sum() == (2 + 7) * 3  # the MTP layer predicts one token less
    model.update_expert_bias(0.0)
    with torch.no_grad():
        model.loss(tokens(2, 9))
    model.eval()
    model.loss(tokens(2, 9))
    assert all(gate.expert_counts.sum() == 0 for gate in model.gates())
    assert model.max_violation() == 0.0


def test_bias_updates_balance_a_skewed_router() -> None:
    model = make_model(num_hidden_layers=2)
    with torch.no_grad():
        for gate in model.gates():
            gate.expert_bias.copy_(torch.tensor([1.0, 1.0, 0, 0, 0, 0, 0, 0]))
    violations = []
    for step in range(150):
        model.loss(tokens(8, 33, seed=step))
        violations.append(model.max_violation())
        model.update_expert_bias(0.02)
    assert violations[0] > 1.4
    assert sum(violations[-10:]) / 10 < 0.5


def test_rotary_base_and_context_change_between_stages() -> None:
    model, ids = make_model(), tokens(1, 40)
    before = model(ids)
    model.set_rope_theta(5000.0)
    assert model.config.rope_theta == 5000.0
    assert not torch.allclose(model(ids), before, atol=1e-3)
    expected = make_model(rope_theta=5000.0)
    torch.testing.assert_close(model(ids), expected(ids))
    with pytest.raises(UserError, match=r"65 tokens is longer than max_position_embeddings \(64\)"):
        model(tokens(1, 65))
    model.set_max_position_embeddings(65)
    assert model(tokens(1, 65)).shape == (1, 65, 29)
    with pytest.raises(UserError, match="rope_theta"):
        model.set_rope_theta(-1.0)


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
