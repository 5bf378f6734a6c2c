"""Tokens to the rows of their experts and back: a copy to each of a token's K rows, and the sum of them.

The sum is float32, in the order of k, narrowed once. Each is the other's gradient, without atomics: the same bits in
every run. Both go by token (SonicMoE's gather-and-sum, arXiv 2512.14080), so that a token is read, or written, once.

Limits of the kernels: contiguous inputs of float32, bfloat16 or float16; any shape, fast where D is a multiple of 16;
K is compiled in and unrolled.

Shapes: T tokens, K chosen, D hidden, R rows of a `RowMap`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ling_flow.kernels._triton import ceil_div, jit, narrow, next_power_of_2, tl
from ling_flow.kernels.row_map import RowMap

# (tokens, columns, warps) of a program, the first of which is taken: its threads read and write 16 bytes at a time, and
# need few enough registers that 8 to 12 programs share a multiprocessor.
GATHER_TILES = ((4, 1024, 4), (2, 1024, 4), (8, 1024, 8), (1, 2048, 4), (4, 2048, 8))
SUM_TILES = ((2, 1024, 4), (1, 1024, 4), (4, 512, 4), (1, 2048, 8), (1, 2048, 4), (4, 1024, 8))
BACKWARD_TILES = ((1, 2048, 4), (1, 1024, 4), (1, 2048, 8))
PADDING_ROWS = 64  # that a program looks through for padding


# The definition, in torch


def gather_rows_reference(x_TD: Tensor, row_map: RowMap) -> Tensor:
    rows_RD = x_TD.new_zeros(row_map.rows, x_TD.shape[1])
    return rows_RD.index_copy_(0, row_map.place_TK.flatten().long(), x_TD.repeat_interleave(row_map.top_k, 0))


def sum_rows_reference(y_RD: Tensor, row_map: RowMap, weights_TK: Tensor | None = None) -> Tensor:
    tokens, top_k = row_map.place_TK.shape
    sum_TD = y_RD.new_zeros(tokens, y_RD.shape[1], dtype=torch.promote_types(y_RD.dtype, torch.float32))
    for k in range(top_k):
        wide_TD = y_RD[row_map.place_TK[:, k].long()].to(sum_TD.dtype)
        sum_TD += wide_TD if weights_TK is None else wide_TD * weights_TK[:, k, None]
    return sum_TD.to(y_RD.dtype)


def weighted_sum_rows_backward_reference(
    grad_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, row_map: RowMap
) -> tuple[Tensor, Tensor]:
    place_TK = row_map.place_TK.long()
    wide_TD = grad_TD.to(torch.promote_types(grad_TD.dtype, torch.float32))
    grad_y_RD = torch.zeros_like(y_RD)
    grad_weights_TK = torch.empty_like(weights_TK, dtype=wide_TD.dtype)
    for k in range(row_map.top_k):
        grad_y_RD[place_TK[:, k]] = (wide_TD * weights_TK[:, k, None]).to(y_RD.dtype)
        grad_weights_TK[:, k] = (y_RD[place_TK[:, k]].to(wide_TD.dtype) * wide_TD).sum(1)
    return grad_y_RD, grad_weights_TK.to(weights_TK.dtype)


# Dispatch


def gather_rows(x_TD: Tensor, row_map: RowMap) -> Tensor:
    """Each row's token (R, D), zero in padding."""
    return _GatherRows.apply(x_TD, row_map)


def sum_rows(y_RD: Tensor, row_map: RowMap) -> Tensor:
    """The sum of each token's K rows (T, D)."""
    return _SumRows.apply(y_RD, row_map)


def weighted_sum_rows(y_RD: Tensor, weights_TK: Tensor, row_map: RowMap) -> Tensor:
    """Σ_k weight_k · row_k of each token (T, D)."""
    return _WeightedSumRows.apply(y_RD, weights_TK, row_map)


def _gather(x_TD: Tensor, row_map: RowMap) -> Tensor:
    return gather_rows_triton(x_TD, row_map) if x_TD.is_cuda else gather_rows_reference(x_TD, row_map)


def _sum(y_RD: Tensor, row_map: RowMap, weights_TK: Tensor | None = None) -> Tensor:
    if y_RD.is_cuda:
        return sum_rows_triton(y_RD, row_map, weights_TK)
    return sum_rows_reference(y_RD, row_map, weights_TK)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_map: RowMap) -> Tensor:
        ctx.row_map = row_map
        return _gather(x_TD, row_map)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return _sum(grad_RD, ctx.row_map), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, row_map: RowMap) -> Tensor:
        ctx.row_map = row_map
        return _sum(y_RD, row_map)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return _gather(grad_TD, ctx.row_map), None


class _WeightedSumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor, row_map: RowMap) -> Tensor:
        ctx.row_map = row_map
        ctx.save_for_backward(y_RD, weights_TK)
        return _sum(y_RD, row_map, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_RD, weights_TK = ctx.saved_tensors
        if y_RD.is_cuda:
            return *weighted_sum_rows_backward_triton(grad_TD, y_RD, weights_TK, ctx.row_map), None
        return *weighted_sum_rows_backward_reference(grad_TD, y_RD, weights_TK, ctx.row_map), None


# Triton


def gather_rows_triton(x_TD: Tensor, row_map: RowMap, tile: tuple[int, int, int] = GATHER_TILES[0]) -> Tensor:
    tokens, width = x_TD.shape
    x_TD = x_TD.contiguous()
    rows_RD = torch.empty((row_map.rows, width), dtype=x_TD.dtype, device=x_TD.device)
    if rows_RD.numel():
        block_t, block_d, warps = _tile(tile, width)
        padding = ceil_div(row_map.rows, PADDING_ROWS)
        grid = ceil_div(width, block_d) * (padding + ceil_div(tokens, block_t))  # one dimension: others are limited
        _gather_kernel[(grid,)](
            x_TD, row_map.place_TK, row_map.pair_R, rows_RD, tokens, row_map.rows, width, padding, K=row_map.top_k,
            PADDING_ROWS=PADDING_ROWS, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return rows_RD


def sum_rows_triton(
    y_RD: Tensor, row_map: RowMap, weights_TK: Tensor | None = None, tile: tuple[int, int, int] = SUM_TILES[0]
) -> Tensor:
    tokens, width = len(row_map.place_TK), y_RD.shape[1]
    y_RD = y_RD.contiguous()
    sum_TD = torch.empty((tokens, width), dtype=y_RD.dtype, device=y_RD.device)
    if sum_TD.numel():
        weighted = weights_TK is not None
        weights = sum_TD if weights_TK is None else weights_TK.contiguous()  # not touched without weights
        block_t, block_d, warps = _tile(tile, width)
        grid = ceil_div(width, block_d) * ceil_div(tokens, block_t)
        _sum_kernel[(grid,)](
            y_RD, row_map.place_TK, weights, sum_TD, tokens, width, K=row_map.top_k, WEIGHTED=weighted,
            BLOCK_T=block_t, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return sum_TD


def weighted_sum_rows_backward_triton(
    grad_TD: Tensor,
    y_RD: Tensor,
    weights_TK: Tensor,
    row_map: RowMap,
    tile: tuple[int, int, int] = BACKWARD_TILES[0],
) -> tuple[Tensor, Tensor]:
    tokens, width = grad_TD.shape
    grad_TD, y_RD, weights_TK = grad_TD.contiguous(), y_RD.contiguous(), weights_TK.contiguous()
    grad_y_RD, grad_weights_TK = torch.empty_like(y_RD), torch.zeros_like(weights_TK)
    if grad_y_RD.numel():
        _, block_d, warps = _tile(tile, width)
        padding = ceil_div(row_map.rows, PADDING_ROWS)
        _sum_backward_kernel[(padding + tokens,)](
            grad_TD, y_RD, weights_TK, row_map.place_TK, row_map.pair_R, grad_y_RD, grad_weights_TK, row_map.rows,
            width, padding, K=row_map.top_k, PADDING_ROWS=PADDING_ROWS, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return grad_y_RD, grad_weights_TK


def _tile(tile: tuple[int, int, int], width: int) -> tuple[int, int, int]:
    """As many elements, in fewer columns and more tokens where the rows are narrow."""
    tokens, columns, warps = tile
    narrower = max(min(columns, next_power_of_2(width)), 16)
    return tokens * columns // narrower, narrower, warps


@jit
def _zero_padding(  # type: ignore[no-untyped-def]
    pair_R, rows_RD, block, first, last, rows, width, ROWS: tl.constexpr
):
    """Zeros in the rows of padding among `ROWS`, in columns `first` to `last`."""
    row = block * ROWS + tl.arange(0, ROWS)
    empty = (tl.load(pair_R + row, mask=row < rows, other=0) < 0) & (row < rows)
    if tl.max(empty.to(tl.int32), 0) > 0:
        to = rows_RD + row.to(tl.int64)[:, None] * width
        zeros = tl.zeros((ROWS, 128), rows_RD.dtype.element_ty)
        for start in range(first, last, 128):
            column = start + tl.arange(0, 128)
            tl.store(to + column[None, :], zeros, mask=empty[:, None] & (column < last)[None, :])


@jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    x_TD, place_TK, pair_R, rows_RD, tokens, rows, width, padding,
    K: tl.constexpr, PADDING_ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(width, BLOCK_D)
    first, block = tl.program_id(0) % parts * BLOCK_D, tl.program_id(0) // parts
    if block < padding:
        _zero_padding(pair_R, rows_RD, block, first, min(first + BLOCK_D, width), rows, width, PADDING_ROWS)
    else:
        token = (block - padding) * BLOCK_T + tl.arange(0, BLOCK_T)
        column = first + tl.arange(0, BLOCK_D)
        real = token < tokens
        inside = real[:, None] & (column < width)[None, :]
        found = tl.load(x_TD + token.to(tl.int64)[:, None] * width + column[None, :], mask=inside)
        for k in tl.static_range(K):
            row = tl.load(place_TK + token * K + k, mask=real, other=0).to(tl.int64)
            tl.store(rows_RD + row[:, None] * width + column[None, :], found, mask=inside)


@jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    y_RD, place_TK, weights_TK, sum_TD, tokens, width,
    K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(width, BLOCK_D)
    token = tl.program_id(0) // parts * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(0) % parts * BLOCK_D + tl.arange(0, BLOCK_D)
    real = token < tokens
    inside = real[:, None] & (column < width)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(place_TK + token * K + k, mask=real, other=0).to(tl.int64)
        wide = tl.load(y_RD + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            wide = wide * tl.load(weights_TK + token * K + k, mask=real, other=0.0).to(tl.float32)[:, None]
        total += wide
    to = sum_TD + token.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(to, narrow(total, sum_TD.dtype.element_ty), mask=inside)


@jit
def _sum_backward_kernel(  # type: ignore[no-untyped-def]
    grad_TD, y_RD, weights_TK, place_TK, pair_R, grad_y_RD, grad_weights_TK, rows, width, padding,
    K: tl.constexpr, PADDING_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if block < padding:
        _zero_padding(pair_R, grad_y_RD, block, 0, width, rows, width, PADDING_ROWS)
    else:
        token = block - padding
        source = grad_TD + token.to(tl.int64) * width
        within = tl.arange(0, BLOCK_D)
        for k in tl.static_range(K):
            pair = token * K + k
            weight = tl.load(weights_TK + pair).to(tl.float32)
            base = tl.load(place_TK + pair).to(tl.int64) * width
            total = tl.zeros((BLOCK_D,), tl.float32)
            for first in range(0, width, BLOCK_D):
                column = first + within
                there = column < width
                grad = tl.load(source + column, mask=there, other=0.0).to(tl.float32)
                total += grad * tl.load(y_RD + base + column, mask=there, other=0.0).to(tl.float32)
                tl.store(grad_y_RD + base + column, narrow(grad * weight, grad_y_RD.dtype.element_ty), mask=there)
            tl.store(grad_weights_TK + pair, narrow(tl.sum(total, 0), grad_weights_TK.dtype.element_ty))
