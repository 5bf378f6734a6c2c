"""The router's kernels: the choice against the definition with ties, to the index; products and gradients against
float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ling_flow.kernels import router, router_triton
from ling_flow.kernels.router import choose_experts, choose_experts_reference, expert_weights
from ling_flow.kernels.shapes import normal

# experts, top_k, n_group, topk_group
CHOICES = [
    (256, 8, 8, 4),
    (16, 2, 4, 2),
    (32, 4, 4, 2),
    (24, 3, 4, 2),
    (5, 2, 1, 1),
    (20, 1, 1, 1),
    (48, 6, 3, 2),
    (512, 8, 8, 8),
]
SCALING = 2.5


def levels(shape: tuple[int, ...], count: int, device: torch.device, seed: int = 0) -> Tensor:
    """Few different values, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(count, shape, generator=generator) - count // 2).to(device).float() / 2


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("experts", "top_k", "n_group", "topk_group"), CHOICES)
def test_choice(experts: int, top_k: int, n_group: int, topk_group: int, ties: bool, device: torch.device) -> None:
    tokens = 41
    if ties:
        logits, bias = levels((tokens, experts), 5, device), levels((experts,), 3, device, seed=1)
        logits[0], logits[1] = 0.0, 30.0  # nothing but ties; scores that are 1 to the bit
    else:
        logits, bias = normal((tokens, experts), torch.float32, device), normal((experts,), torch.float32, device, 1)
    found = router_triton.choose_triton(logits, bias, top_k, n_group, topk_group, SCALING)
    scores = logits.sigmoid()
    indices = choose_experts_reference(scores, bias, top_k, n_group, topk_group)
    assert torch.equal(found[0], indices)
    torch.testing.assert_close(found[1], expert_weights(scores, indices, SCALING), rtol=1e-6, atol=0)
    assert torch.equal(found[2], torch.bincount(indices.flatten(), minlength=experts))
    if not ties:
        assert torch.equal(indices, choose_experts(scores, bias, top_k, n_group, topk_group))


def test_the_definition_with_ties_is_a_loop() -> None:
    scores, bias = levels((50, 16), 4, torch.device("cpu")), levels((16,), 3, torch.device("cpu"), seed=1)
    found = choose_experts_reference(scores, bias, 3, 4, 2)
    for row, chosen in zip((scores + bias).tolist(), found.tolist(), strict=True):
        groups = sorted(range(4), key=lambda g: -sum(sorted(row[4 * g : 4 * g + 4], reverse=True)[:2]))[:2]
        allowed = [4 * group + member for group in sorted(groups) for member in range(4)]
        assert chosen == sorted(allowed, key=lambda expert: -row[expert])[:3]


def test_bad_logits_stay_visible_and_within_the_experts(device: torch.device) -> None:
    logits = normal((4, 32), torch.float32, device)
    logits[0], logits[1, 7], logits[2, 3], logits[3, 9] = float("nan"), float("nan"), float("inf"), -float("inf")
    indices, weights, counts = router_triton.choose_triton(logits, torch.zeros(32, device=device), 4, 4, 2, SCALING)
    assert indices.min() >= 0
    assert indices.max() < 32
    assert all(len(set(row)) == 4 for row in indices.tolist())
    assert not weights[:2].isfinite().all(1).any()
    assert weights[2:].isfinite().all()
    assert counts.sum() == 16


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, device: torch.device) -> None:
    x = normal((tokens, 64), torch.bfloat16, device).requires_grad_()
    weight = normal((16, 64), torch.float32, device).requires_grad_()
    found = router_triton.route_triton(x, weight, torch.zeros(16, device=device), 2, 4, 2, SCALING)
    expected = router.route_reference(x, weight, torch.zeros(16, device=device), 2, 4, 2, SCALING)
    assert torch.equal(found[0], expected.indices_TK)
    assert torch.equal(found[3], expected.counts_E)
    torch.testing.assert_close(found[1], expected.weights_TK)
    grad_x, grad_weight = torch.autograd.grad(found[1].square().sum(), (x, weight))
    assert grad_x.shape == x.shape
    assert grad_weight.isfinite().all()


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_three_parts_are_the_whole(parts: int, device: torch.device) -> None:
    x = normal((37, 50), torch.float32, device) * normal((37, 50), torch.float32, device, seed=1).exp()
    pieces = router_triton.split_triton(x, parts).double()
    error = (pieces.sum(0) - x.double()).abs() / x.abs()
    assert error.max() <= {1: 2**-8, 2: 2**-17, 3: 0.0}[parts]


@pytest.mark.parametrize("tile", [router_triton.SMALL, router_triton.LARGE], ids=["small", "large"])
@pytest.mark.parametrize(("tokens", "hidden", "experts"), [(70, 128, 16), (33, 72, 5), (150, 200, 130)])
def test_products(
    tokens: int, hidden: int, experts: int, tile: object, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_triton, "SMALL", tile)
    x, weight = normal((tokens, hidden), torch.bfloat16, device), normal((experts, hidden), torch.float32, device, 1)
    exact = x.double() @ weight.double().T
    # Every product is exact; what is left is the order of float32 sums, and that tensor cores cut instead of rounding.
    atol = 1e-4 if device.type == "cuda" else 2e-5
    torch.testing.assert_close(router_triton.logits_triton(x, weight).double(), exact, rtol=1e-6, atol=atol)
    grad = normal((tokens, experts), torch.float32, device, seed=2)
    parts = router_triton.split_triton(grad, 2)
    found = router_triton.input_gradient_triton(parts, weight, torch.bfloat16).double()
    exact = grad.double() @ weight.double()
    torch.testing.assert_close(found, exact, rtol=2**-8, atol=float(exact.abs().max()) * 1e-4)
    exact = grad.double().T @ x.double()
    found = router_triton.weight_gradient_triton(parts, x).double()
    torch.testing.assert_close(found, exact, rtol=2**-16, atol=float(exact.abs().max()) * 1e-5)


@pytest.mark.parametrize("of", ["weights", "logits", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_k", "weight_dtype"), [(3, torch.float32), (1, torch.float32), (3, torch.bfloat16)])
def test_gradients(top_k: int, weight_dtype: torch.dtype, dtype: torch.dtype, of: str, device: torch.device) -> None:
    tokens, hidden, experts = 45, 64, 12
    x, bias = (
        normal((tokens, hidden), dtype, device).requires_grad_(),
        normal((experts,), torch.float32, device, 2) / 10,
    )
    weight = (normal((experts, hidden), torch.float32, device, 1) / 8).to(weight_dtype).requires_grad_()
    upstream = normal((tokens, experts), torch.float32, device, 3)
    indices, weights, logits, _ = router_triton.route_triton(x, weight, bias, top_k, 4, 2, SCALING)
    wide_x, wide_weight = (leaf.detach().double().requires_grad_() for leaf in (x, weight))
    exact_logits = wide_x @ wide_weight.T
    exact_weights = expert_weights(exact_logits.sigmoid(), indices, SCALING)
    torch.testing.assert_close(weights.double(), exact_weights, rtol=1e-4, atol=1e-5)

    def total(weights: Tensor, logits: Tensor) -> Tensor:
        value = (weights * upstream[:, :top_k]).sum() if of != "logits" else 0
        return value + ((logits * upstream).sum() if of != "weights" else 0)

    found = torch.autograd.grad(total(weights, logits), (x, weight))
    expected = torch.autograd.grad(total(exact_weights, exact_logits), (wide_x, wide_weight))
    for mine, exact, leaf in zip(found, expected, (x, weight), strict=True):
        assert mine.dtype == leaf.dtype
        rounding = 2**-8 if leaf.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(mine.double(), exact, rtol=rounding, atol=float(exact.abs().max()) * 1e-4)


def test_the_whole_on_a_cpu_is_its_parts() -> None:
    x, weight = normal((30, 24), torch.bfloat16), normal((16, 24), torch.float32, seed=1)
    bias = normal((16,), torch.float32, seed=2)
    found = router.route(x, weight, bias, 2, 4, 2, SCALING)
    scores = (x.float() @ weight.T).sigmoid()
    assert torch.equal(found.indices_TK, choose_experts(scores, bias, 2, 4, 2))
    assert torch.equal(found.counts_E, torch.bincount(found.indices_TK.flatten(), minlength=16))
