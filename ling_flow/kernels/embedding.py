"""Rows of a table by token, with a gradient that is the same in every run.

The gradient of a token's row is the sum over its occurrences, float32, narrowed once. On CUDA torch adds with
atomics; here the tokens are sorted (stable), and each run of equal ones is summed in its order: pieces of at most 32
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

PIECE = 32  # a piece begins where a run does and at every multiple of this: of a run's pieces, programs sum one each
# Rows that a program reads at a time and adds up as a tree, its most columns, and warps; the first is taken.
TILES = ((2, 1024, 4), (4, 2048, 8), (4, 1024, 4))


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


def embedding_backward_triton(
    tokens_N: Tensor, grad_ND: Tensor, vocabulary: int, dtype: torch.dtype, tile: tuple[int, int, int] = TILES[0]
) -> Tensor:
    count, width = grad_ND.shape
    grad_VD = torch.zeros((vocabulary, width), dtype=dtype, device=grad_ND.device)
    if not grad_ND.numel():
        return grad_VD
    grad_ND = grad_ND.contiguous()
    tokens_N, order_N = tokens_N.to(torch.int32).sort(stable=True)  # half the work of int64
    blocks, (block_n, block_d, warps) = ceil_div(count, PIECE), tile
    block_d = min(next_power_of_2(width), block_d)
    parts = ceil_div(width, block_d)
    # Sums of the pieces of runs that have several: see `_sum_pieces_kernel`.
    sums = torch.empty((2 * blocks, width), dtype=torch.float32, device=grad_ND.device)
    _sum_pieces_kernel[(count * parts,)](
        tokens_N, order_N, grad_ND, sums, grad_VD, count, width, PARTS=parts, PIECE=PIECE, BLOCK_N=block_n,
        BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip
    _sum_runs_kernel[(blocks * parts,)](
        tokens_N, sums, grad_VD, count, width, PARTS=parts, PIECE=PIECE, BLOCK_N=block_n, BLOCK_D=block_d,
        num_warps=warps,
    )  # fmt: skip
    return grad_VD


@jit
def _sum_pieces_kernel(  # type: ignore[no-untyped-def]
    tokens_N, order_N, grad_ND, sums, grad_VD, count, width,
    PARTS: tl.constexpr, PIECE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) // PARTS
    token = tl.load(tokens_N + at)
    begins = tl.load(tokens_N + at - 1, mask=at > 0, other=-1) != token  # a run does, here
    if (at % PIECE != 0) & (begins == 0):
        return
    next = at + tl.arange(0, PIECE)
    ahead = tl.load(tokens_N + next, mask=(next < count) & (next // PIECE == at // PIECE), other=-1)
    stop = at + tl.sum((ahead == token).to(tl.int32), 0)
    ends = tl.load(tokens_N + stop, mask=stop < count, other=-1) != token
    column = tl.program_id(0) % PARTS * BLOCK_D + tl.arange(0, BLOCK_D)
    there = column < width
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(at, stop, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        row = tl.load(order_N + place, mask=place < stop, other=0).to(tl.int64)
        inside = (place < stop)[:, None] & there[None, :]
        wide = tl.load(grad_ND + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(wide, 0)
    if begins & ends:
        to = grad_VD + token.to(tl.int64) * width + column
        tl.store(to, narrow(total, grad_VD.dtype.element_ty), mask=there)
    else:
        # Of 32 places the first may go on with a run that began before, and the last may begin one that goes on.
        slot = at // PIECE * 2 + begins.to(tl.int32)
        tl.store(sums + slot.to(tl.int64) * width + column, total, mask=there)


@jit
def _sum_runs_kernel(  # type: ignore[no-untyped-def]
    tokens_N, sums, grad_VD, count, width,
    PARTS: tl.constexpr, PIECE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # The run that begins in these 32 places and goes on after them, if there is one.
    block = tl.program_id(0) // PARTS
    after = (block + 1) * PIECE
    if after >= count:
        return
    token = tl.load(tokens_N + after)
    if tl.load(tokens_N + after - 1) != token:
        return
    if tl.load(tokens_N + block * PIECE - 1, mask=block > 0, other=-1) == token:
        return
    column = tl.program_id(0) % PARTS * BLOCK_D + tl.arange(0, BLOCK_D)
    there = column < width
    sums += column[None, :]
    total = tl.sum(tl.load(sums + (2 * block + 1).to(tl.int64) * width, mask=there[None, :], other=0.0), 0)
    more = block + 1  # the piece at which to go on; 0 at the end
    while more > 0:
        piece = more + tl.arange(0, BLOCK_N)
        same = tl.load(tokens_N + piece * PIECE, mask=piece * PIECE < count, other=-1) == token
        source = sums + (2 * piece).to(tl.int64)[:, None] * width
        total += tl.sum(tl.load(source, mask=same[:, None] & there[None, :], other=0.0), 0)
        more = tl.where(tl.sum(same.to(tl.int32), 0) == BLOCK_N, more + BLOCK_N, 0)
    to = grad_VD + token.to(tl.int64) * width + column
    tl.store(to, narrow(total, grad_VD.dtype.element_ty), mask=there)
