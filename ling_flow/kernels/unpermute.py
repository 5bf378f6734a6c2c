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

from ling_flow.kernels.row_map import RowMap

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
    return gather_rows_reference(x_TD, row_map)


def _sum(y_RD: Tensor, row_map: RowMap, weights_TK: Tensor | None = None) -> Tensor:
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
        return *weighted_sum_rows_backward_reference(grad_TD, y_RD, weights_TK, ctx.row_map), None
