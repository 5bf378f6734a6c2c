import pytest
import torch
from torch.nn import functional

from ling_flow.kernels import linear_cross_entropy as module
from ling_flow.kernels.linear_cross_entropy import linear_cross_entropy, linear_logprobs

TOKENS, HIDDEN, VOCABULARY = 11, 6, 13


@pytest.fixture(autouse=True)
def ragged_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", 4 * VOCABULARY)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()
    head = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()
    return hidden, head, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def check(ours: torch.Tensor, expected: torch.Tensor, leaves: tuple[torch.Tensor, ...], upstream: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_cross_entropy_and_gradients(inputs: tuple[torch.Tensor, ...]) -> None:
    hidden, head, targets = inputs
    expected = functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
    check(linear_cross_entropy(hidden, head, targets), expected, (hidden, head), torch.tensor(0.3, dtype=torch.float64))
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, head, targets), expected.detach())


def test_logprobs_and_gradients(inputs: tuple[torch.Tensor, ...]) -> None:
    hidden, head, targets = inputs
    expected = torch.log_softmax(hidden @ head.T, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    upstream = torch.randn(TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check(linear_logprobs(hidden, head, targets), expected, (hidden, head), upstream)


def test_an_impossible_target_costs_its_logit_and_not_infinity() -> None:
    hidden, head = torch.tensor([[200.0]]).requires_grad_(), torch.tensor([[1.0], [-1.0]])
    assert linear_cross_entropy(hidden, head, torch.tensor([1])).item() == pytest.approx(400.0)
