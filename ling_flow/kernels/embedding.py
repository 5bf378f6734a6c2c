"""Rows of a table by token, with a gradient that is the same in every run.

The gradient of a token's row is the sum over its occurrences, float32, narrowed once. On CUDA torch adds with
atomics; here the tokens are sorted (stable), and each run of equal ones is summed in its order: pieces of 32
occurrences first, then the pieces.

Limits of the kernels: gradients of float32, bfloat16 or float16; any shape, fast where D is a multiple of 16.

Shapes: N tokens (any dimensions), V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ling_flow.kernels._triton import ceil_div, jit, narrow, next_power_of_2, tl

PIECE = 32  # occurrences that one program sums
ROWS = 8  # read at a time, and added up as a tree
COLUMNS = 512  # of a program: with 4 warps, 4 reads of 16 bytes a thread


def embedding(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    """The row of each token: (…) → (…, D)."""
    if weight_VD.is_cuda and weight_VD.dtype != torch.float64:
        return _Embedding.apply(tokens, weight_VD)
    return functional.embedding(tokens, weight_VD)


def embedding_backward_reference(tokens_N: Tensor, grad_ND: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """The definition of the gradient (V, D)."""
    wide_ND = grad_ND.to(torch.promote_types(grad_ND.dtype, torch.float32))
    return wide_ND.new_zeros(vocabulary, grad_ND.shape[1]).index_add_(0, tokens_N.long(), wide_ND).to(dtype)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.vocabulary, ctx.dtype = len(weight_VD), weight_VD.dtype
        return functional.embedding(tokens, weight_VD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        tokens_N, grad_ND = ctx.saved_tensors[0].flatten(), grad.reshape(-1, grad.shape[-1])
        return None, embedding_backward_triton(tokens_N, grad_ND, ctx.vocabulary, ctx.dtype)


# Triton


def embedding_backward_triton(tokens_N: Tensor, grad_ND: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    count, width = grad_ND.shape
    grad_VD = torch.zeros((vocabulary, width), dtype=dtype, device=grad_ND.device)
    if not grad_ND.numel():
        return grad_VD
    grad_ND = grad_ND.contiguous()
    tokens_N, order_N = tokens_N.sort(stable=True)
    first_N = torch.searchsorted(tokens_N, tokens_N, out_int32=True)
    end_N = torch.searchsorted(tokens_N, tokens_N, right=True, out_int32=True)
    # Of a run longer than a piece, the sums of its pieces. Only pieces of such runs have one: see `_slot`.
    sums = torch.empty((2 * ceil_div(count, PIECE), width), dtype=torch.float32, device=grad_ND.device)
    columns = min(next_power_of_2(width), COLUMNS)
    grid = ceil_div(width, columns) * count  # one dimension: others are limited
    for kernel in (_sum_pieces_kernel, _sum_runs_kernel):
        kernel[(grid,)](
            tokens_N, order_N, first_N, end_N, grad_ND, sums, grad_VD, width, PIECE=PIECE, ROWS=ROWS,
            BLOCK_D=columns, num_warps=4,
        )  # fmt: skip
    return grad_VD


@jit
def _slot(at, is_first, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the sum of the piece that begins at `at` lies.

    Within `PIECE` positions, of all runs longer than that, one first piece can begin, and one that is not the first.
    """
    return 2 * (at // PIECE) + tl.where(is_first, 0, 1)


@jit
def _sum_pieces_kernel(  # type: ignore[no-untyped-def]
    tokens_N, order_N, first_N, end_N, grad_ND, sums, grad_VD, width,
    PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(width, BLOCK_D)
    at = tl.program_id(0) // parts
    first, end = tl.load(first_N + at), tl.load(end_N + at)
    if (at - first) % PIECE != 0:
        return
    column = tl.program_id(0) % parts * BLOCK_D + tl.arange(0, BLOCK_D)
    there = column < width
    total = tl.zeros((BLOCK_D,), tl.float32)
    stop = min(at + PIECE, end)
    for start in range(at, stop, ROWS):
        place = start + tl.arange(0, ROWS)
        row = tl.load(order_N + place, mask=place < stop, other=0).to(tl.int64)
        inside = (place < stop)[:, None] & there[None, :]
        wide = tl.load(grad_ND + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(wide, 0)
    if end - first <= PIECE:
        to = grad_VD + tl.load(tokens_N + at).to(tl.int64) * width + column
        tl.store(to, narrow(total, grad_VD.dtype.element_ty), mask=there)
    else:
        tl.store(sums + _slot(at, at == first, PIECE).to(tl.int64) * width + column, total, mask=there)


@jit
def _sum_runs_kernel(  # type: ignore[no-untyped-def]
    tokens_N, order_N, first_N, end_N, grad_ND, sums, grad_VD, width,
    PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(width, BLOCK_D)
    at = tl.program_id(0) // parts
    first, end = tl.load(first_N + at), tl.load(end_N + at)
    if (at != first) | (end - first <= PIECE):
        return
    column = tl.program_id(0) % parts * BLOCK_D + tl.arange(0, BLOCK_D)
    there = column < width
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, end, ROWS * PIECE):
        place = start + tl.arange(0, ROWS) * PIECE
        inside = (place < end)[:, None] & there[None, :]
        slot = _slot(place, place == first, PIECE).to(tl.int64)
        total += tl.sum(tl.load(sums + slot[:, None] * width + column[None, :], mask=inside, other=0.0), 0)
    to = grad_VD + tl.load(tokens_N + at).to(tl.int64) * width + column
    tl.store(to, narrow(total, grad_VD.dtype.element_ty), mask=there)
