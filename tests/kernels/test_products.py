import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ling_flow.kernels import products
from ling_flow.kernels.attention import causal_attention

BF16 = torch.bfloat16


@pytest.fixture(params=["has bfloat16", "has none"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "cpu_has_bfloat16", lambda: request.param == "has bfloat16")


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    """`found` is `exact` in bfloat16, up to the order of a float32 sum: one unit in the last place."""
    assert found.dtype == BF16
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2e-3)


@pytest.mark.usefixtures("processor")
def test_products_and_their_gradients_are_the_exact_ones_rounded():
    x, weight, grad = drawn(2, 5, 96, seed=0), drawn(64, 96, seed=1), drawn(2, 5, 64, seed=2)
    leaves = [x.clone().requires_grad_(), weight.float().requires_grad_()]
    y = products.linear(*leaves)
    y.backward(grad)
    wide = [leaf.detach().to(BF16).double().requires_grad_() for leaf in leaves]
    exact = functional.linear(*wide)
    exact.backward(grad.double())
    assert_rounded(y, exact)
    assert_rounded(leaves[0].grad, wide[0].grad)
    torch.testing.assert_close(leaves[1].grad.double(), wide[1].grad, rtol=2**-7, atol=2e-3)
    assert_rounded(products.matmul(x, weight.T), exact)


@pytest.mark.usefixtures("processor")
def test_attention_and_its_gradients():
    leaves = [drawn(2, heads, 17, 32, seed=heads + i).requires_grad_() for i, heads in enumerate((4, 2, 2))]
    out = causal_attention(*leaves)
    out.backward(torch.ones_like(out))
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = causal_attention(*wide)
    exact.backward(torch.ones_like(exact))
    assert out.dtype == BF16
    torch.testing.assert_close(out.double(), exact, rtol=2**-6, atol=1e-2)
    for leaf, exact_leaf in zip(leaves, wide, strict=True):
        torch.testing.assert_close(leaf.grad.double(), exact_leaf.grad, rtol=2**-5, atol=2e-2)
