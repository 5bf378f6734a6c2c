import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional

from ling_flow.kernels import experts as module
from ling_flow.kernels.experts import routed_experts
from ling_flow.kernels.router import choose_experts, expert_weights


def naive_choice(scores: list[float], top_k: int, n_group: int, topk_group: int) -> list[int]:
    size = len(scores) // n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(n_group)]
    groups.sort(key=lambda group: -sum(sorted((scores[e] for e in group), reverse=True)[:2]))
    allowed = [e for group in groups[:topk_group] for e in group]
    return sorted(allowed, key=lambda e: -scores[e])[:top_k]


@pytest.mark.parametrize(("top_k", "n_group", "topk_group"), [(2, 1, 1), (3, 4, 2), (4, 2, 1), (8, 8, 4)])
def test_choice_is_limited_to_the_best_groups(top_k: int, n_group: int, topk_group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, bias = torch.rand(50, 16, generator=generator), torch.rand(16, generator=generator)
    indices = choose_experts(scores, bias, top_k, n_group, topk_group)
    for row, chosen in zip((scores + bias).tolist(), indices.tolist(), strict=True):
        assert chosen == naive_choice(row, top_k, n_group, topk_group)


def test_bias_moves_the_choice_but_not_the_weights() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.3, 0.1]])
    indices = choose_experts(scores, torch.tensor([0.0, 0.0, 0.0, 5.0]), 2, 1, 1)
    assert indices.tolist() == [[3, 0]]
    torch.testing.assert_close(expert_weights(scores, indices, 2.5), torch.tensor([[0.25, 2.25]]))


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("bias_scale", [1.0, 1e4])
def test_weights_of_tied_scores_never_hold_the_bias(n_group: int, topk_group: int, bias_scale: float) -> None:
    """Scores of four values only, under biases that are far larger and tied too."""
    generator = torch.Generator().manual_seed(0)
    tokens, experts, top_k, scaling = 200, 16, 4, 2.5
    scores = torch.tensor([1e-6, 0.25, 0.5, 1.0])[torch.randint(4, (tokens, experts), generator=generator)]
    scores[0] = 0.5  # nothing but ties
    bias = torch.tensor([-1.0, 0.0, 1.0])[torch.randint(3, (experts,), generator=generator)] * bias_scale
    indices = choose_experts(scores, bias, top_k, n_group, topk_group)
    weights = expert_weights(scores, indices, scaling)

    assert weights[0].tolist() == [scaling / top_k] * top_k
    biased = (scores + bias).tolist()
    for t, (chosen, given) in enumerate(zip(indices.tolist(), weights.tolist(), strict=True)):
        assert len(set(chosen)) == top_k
        if n_group == 1:  # which of equals is taken is open, their values are not
            assert [biased[t][e] for e in chosen] == sorted(biased[t], reverse=True)[:top_k]
        total = sum(float(scores[t, e]) for e in chosen)
        assert given == pytest.approx([scaling * float(scores[t, e]) / total for e in chosen], rel=1e-6)
        assert sum(given) == pytest.approx(scaling, rel=1e-6)


def naive_experts(x, indices, weights, gate_up, down):  # type: ignore[no-untyped-def]
    rows = []
    for t, chosen in enumerate(indices.tolist()):
        row = torch.zeros_like(x[t])
        for k, e in enumerate(chosen):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            row = row + weights[t, k] * (down[e] @ (functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_routed_experts_equal_a_loop_over_tokens(
    dtype: torch.dtype, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_pads", lambda counts, dtype: padded)
    generator = torch.Generator().manual_seed(0)
    tokens, hidden, experts, width, top_k = 7, 4, 5, 3, 2

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()

    x, gate_up, down, weights = (
        random(tokens, hidden),
        random(experts, 2 * width, hidden),
        random(experts, hidden, width),
        random(tokens, top_k),
    )
    indices = torch.stack(
        [torch.randperm(experts - 1, generator=generator)[:top_k] for _ in range(tokens)]
    )  # the last expert gets nothing
    counts = torch.bincount(indices.flatten(), minlength=experts)

    def ours(x, weights, gate_up, down):  # type: ignore[no-untyped-def]
        return routed_experts(x, indices, weights, counts, gate_up, down)

    leaves = (x, weights, gate_up, down)
    expected = naive_experts(x, indices, weights, gate_up, down)
    torch.testing.assert_close(ours(*leaves), expected)
    upstream = torch.randn(tokens, hidden, dtype=dtype, generator=generator)
    for mine, theirs in zip(
        torch.autograd.grad(ours(*leaves), leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    if dtype == torch.float64:
        assert gradcheck(ours, leaves)


def test_rows_are_padded_where_that_adds_less_than_the_calls_cost() -> None:
    assert module._pads([10] * 16, torch.float32)
    assert not module._pads([1000] + [10] * 15, torch.float32)  # a skewed router must not multiply the work
    assert not module._pads([1] * 4 + [0] * 12, torch.float32)  # a few tokens touch few experts
    assert not module._pads([200] * 15 + [260], torch.float32)
    assert module._pads([200] * 15 + [260], torch.bfloat16)


def test_bfloat16_rows_come_in_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_pads", lambda counts, dtype: False)
    generator = torch.Generator().manual_seed(0)
    indices = torch.tensor([[0, 1]] * 33 + [[1, 3]] * 40)
    counts = torch.bincount(indices.flatten(), minlength=5)
    rows = module.Rows.of(indices, counts, torch.bfloat16)
    assert rows.sizes == [64, 96, 0, 64, 0]
    x = torch.randn(73, 16, generator=generator)
    gate_up, down = torch.randn(5, 16, 16, generator=generator), torch.randn(5, 16, 8, generator=generator)
    weights = torch.rand(73, 2, generator=generator)
    leaves = [leaf.bfloat16().requires_grad_() for leaf in (x, weights, gate_up, down)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = routed_experts(leaves[0], indices, leaves[1], counts, leaves[2], leaves[3])
    expected = naive_experts(wide[0], indices, wide[1], wide[2], wide[3])
    upstream = torch.randn(73, 16, generator=generator).bfloat16()
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, leaves, upstream),
        torch.autograd.grad(expected, wide, upstream.double()),
        strict=True,
    )
    for mine, theirs in pairs:
        assert (mine.double() - theirs).norm() < 0.01 * theirs.norm()  # bfloat16 has 8 bits
