"""Gradient of the embedding: kernels against the definition, over runs of equal tokens of all lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ling_flow.kernels import embedding
from ling_flow.kernels.shapes import normal


def tokens(which: str, count: int, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if which == "even":
        return torch.randint(vocabulary, (count,), generator=generator)
    if which == "equal":
        return torch.full((count,), vocabulary - 1)
    # As in text: one of them is a third of all, and most are rare.
    return (torch.rand(count, generator=generator) ** 6 * vocabulary).long()


@pytest.mark.parametrize("which", ["even", "equal", "skewed"])
@pytest.mark.parametrize(("count", "width"), [(0, 16), (1, 16), (33, 7), (150, 600)])
def test_gradient(which: str, count: int, width: int, device: torch.device) -> None:
    tokens_N = tokens(which, count, 40).to(device)
    for dtype, table in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                         (torch.bfloat16, torch.bfloat16)):  # fmt: skip
        grad_ND = normal((count, width), dtype).to(device)
        found = embedding.embedding_backward_triton(tokens_N, grad_ND, 40, table)
        expected = embedding.embedding_backward_reference(tokens_N, grad_ND, 40, table)
        # Float32 sums in another order.
        torch.testing.assert_close(found, expected, rtol=1e-5 if table == torch.float32 else 2**-7, atol=1e-5)


@pytest.mark.parametrize(
    "lengths", [(31, 32, 33, 1), (33, 33, 33, 33), (64, 65, 1, 97), (1, 40, 1, 33, 34, 200), (300,), (32, 32)]
)
def test_runs_of_pieces_do_not_meet(lengths: tuple[int, ...], device: torch.device) -> None:
    """Whole numbers, so that every order gives the same sum."""
    tokens_N = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    tokens_N = tokens_N[torch.randperm(len(tokens_N), generator=torch.Generator().manual_seed(0))].to(device)
    grad_ND = (normal((len(tokens_N), 5), torch.float32).to(device) * 100).round()
    found = embedding.embedding_backward_triton(tokens_N, grad_ND, len(lengths) + 2, torch.float32)
    assert torch.equal(
        found, embedding.embedding_backward_reference(tokens_N, grad_ND, len(lengths) + 2, torch.float32)
    )


def test_the_definition_is_torch(device: torch.device) -> None:
    weight_VD = normal((11, 6), torch.float32, device).requires_grad_()
    tokens_BS = tokens("skewed", 24, 11).view(4, 6).to(device)
    grad = normal((4, 6, 6), torch.float32, device)
    found = embedding.embedding(tokens_BS, weight_VD)
    assert torch.equal(found, weight_VD[tokens_BS])
    found.backward(grad)
    expected = embedding.embedding_backward_reference(tokens_BS.flatten(), grad.view(-1, 6), 11, torch.float32)
    torch.testing.assert_close(weight_VD.grad, expected)
