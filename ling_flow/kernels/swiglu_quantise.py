"""SwiGLU of the experts with the routing weight applied: silu(gate) · up · p, and the same quantised for FP8 products.

The weight of a row is applied before the down projection (Ling 2.0 §5.3.3), so the experts' outputs need not be kept.
All arithmetic is float32, narrowed once to the dtype of z. What is quantised is that narrowed value, so the fused
kernels give what `swiglu_weighted` followed by `fp8.quantize_rows` or `quantize_columns` would, and h is not written.

Limits of the kernels: contiguous inputs of float32, bfloat16 or float16, any shape, fast where F is a multiple of 16.
`swiglu_quantize_backward` is one kernel only where F is a multiple of 128: elsewhere a tile of 128 columns of
[gate | up] holds some of both, and the gradient is written once before it is quantised. That kernel reads z and grad_h
twice, the second time from the cache.

Shapes: T tokens, K chosen, F expert width, R rows of a `RowMap`, M its tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ling_flow.kernels import fp8
from ling_flow.kernels._triton import INTERPRETED, ceil_div, jit, narrow, tl
from ling_flow.kernels.fp8 import (
    STORED,
    Quantized,
    largest,
    room_by_columns,
    rows_of_threads,
    scale_and_inverse,
    store_by_columns,
)
from ling_flow.kernels.row_map import TILE, RowMap
from ling_flow.kernels.swiglu import (
    pairs_and_weights,
    silu,
    swiglu_backward_triton,
    swiglu_gradients,
    swiglu_triton,
)

# The first is taken.
ROWS_TILES = ((16, 4), (32, 4))  # rows and warps of a program of 128 columns
# Columns of a program of 128 rows, rows that a thread holds, warps.
COLUMNS_TILES = ((64, 16, 4), (64, 8, 4), (32, 16, 4))
# Rows of a program by rows, columns of one by columns, rows that a thread of this one holds, warps of either.
BACKWARD_TILES = ((32, 32, 16, 4), (32, 64, 16, 8), (64, 32, 16, 4))

# The definition, in torch


def _wide(z_R2F: Tensor, weights_TK: Tensor | None, row_map: RowMap) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows that are no padding, their gate, up and weight, in float32 or wider."""
    row_N = (row_map.pair_R >= 0).nonzero()[:, 0]
    gate_NF, up_NF = z_R2F[row_N].to(torch.promote_types(z_R2F.dtype, torch.float32)).chunk(2, 1)
    if weights_TK is None:
        return row_N, gate_NF, up_NF, gate_NF.new_ones(len(row_N), 1)
    return row_N, gate_NF, up_NF, weights_TK.flatten()[row_map.pair_R[row_N].long(), None].to(gate_NF.dtype)


def swiglu_weighted_reference(z_R2F: Tensor, weights_TK: Tensor | None, row_map: RowMap) -> Tensor:
    row_N, gate_NF, up_NF, p_N1 = _wide(z_R2F, weights_TK, row_map)
    h_RF = z_R2F.new_zeros(row_map.rows, z_R2F.shape[1] // 2)
    h_RF[row_N] = (functional.silu(gate_NF) * up_NF * p_N1).to(z_R2F.dtype)
    return h_RF


def swiglu_weighted_backward_reference(
    z_R2F: Tensor, grad_h_RF: Tensor, weights_TK: Tensor | None, row_map: RowMap
) -> tuple[Tensor, Tensor | None]:
    row_N, gate_NF, up_NF, p_N1 = _wide(z_R2F, weights_TK, row_map)
    grad_NF, sigmoid_NF = grad_h_RF[row_N].to(gate_NF.dtype), gate_NF.sigmoid()
    silu_NF, grad_p_NF = gate_NF * sigmoid_NF, grad_NF * p_N1
    grad_gate_NF = grad_p_NF * up_NF * (sigmoid_NF * (1 + gate_NF * (1 - sigmoid_NF)))
    grad_z_R2F = z_R2F.new_zeros(row_map.rows, z_R2F.shape[1])
    grad_z_R2F[row_N] = torch.cat([grad_gate_NF, grad_p_NF * silu_NF], 1).to(z_R2F.dtype)
    if weights_TK is None:
        return grad_z_R2F, None
    grad_weights_TK = gate_NF.new_zeros(row_map.place_TK.shape)
    grad_weights_TK.view(-1)[row_map.pair_R[row_N].long()] = (grad_NF * (silu_NF * up_NF)).sum(1)
    return grad_z_R2F, grad_weights_TK


def swiglu_quantize_reference(z_R2F: Tensor, weights_TK: Tensor | None, row_map: RowMap, by_columns: bool) -> Quantized:
    h_RF = swiglu_weighted_reference(z_R2F, weights_TK, row_map)
    return fp8.quantize_columns_reference(h_RF, row_map, False) if by_columns else fp8.quantize_rows_reference(h_RF)


def swiglu_quantize_backward_reference(
    z_R2F: Tensor, grad_h_RF: Tensor, weights_TK: Tensor | None, row_map: RowMap
) -> tuple[Quantized, Quantized, Tensor | None]:
    grad_z_R2F, grad_weights_TK = swiglu_weighted_backward_reference(z_R2F, grad_h_RF, weights_TK, row_map)
    by_rows = fp8.quantize_rows_reference(grad_z_R2F)
    return by_rows, fp8.quantize_columns_reference(grad_z_R2F, row_map, False), grad_weights_TK


# Dispatch


def swiglu_weighted(z_R2F: Tensor, weights_TK: Tensor | None, row_map: RowMap) -> Tensor:
    """silu(gate) · up · weight of each row (R, F), zero in padding; with a gradient.

    Args:
        z_R2F: [gate | up]; rows of padding are not read, so a dense layer may pass its T rows with a `dense_map`.
        weights_TK: of the pairs; None for ones.
    """
    return _SwiGLUWeighted.apply(z_R2F, weights_TK, row_map)


def swiglu_weighted_forward(z_R2F: Tensor, weights_TK: Tensor | None, row_map: RowMap) -> Tensor:
    """`swiglu_weighted` without a record for the backward pass."""
    if z_R2F.is_cuda:
        return swiglu_triton(z_R2F, weights_TK, row_map)
    return swiglu_weighted_reference(z_R2F, weights_TK, row_map)


def swiglu_weighted_backward(
    z_R2F: Tensor, grad_h_RF: Tensor, weights_TK: Tensor | None, row_map: RowMap
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `swiglu_weighted`: of z (R, 2F), zero in padding, and of the weights (T, K), float32, if any."""
    if z_R2F.is_cuda:
        return swiglu_backward_triton(z_R2F, grad_h_RF, weights_TK, row_map)
    return swiglu_weighted_backward_reference(z_R2F, grad_h_RF, weights_TK, row_map)


def swiglu_quantize(z_R2F: Tensor, weights_TK: Tensor | None, row_map: RowMap, by_columns: bool) -> Quantized:
    """`swiglu_weighted` in FP8: 1×128 by rows for the product with `down`, 128×1 by columns for its gradient."""
    if z_R2F.is_cuda:
        return swiglu_quantize_triton(z_R2F, weights_TK, row_map, by_columns)
    return swiglu_quantize_reference(z_R2F, weights_TK, row_map, by_columns)


def swiglu_quantize_backward(
    z_R2F: Tensor, grad_h_RF: Tensor, weights_TK: Tensor | None, row_map: RowMap
) -> tuple[Quantized, Quantized, Tensor | None]:
    """The gradient of z in FP8, by rows and by columns, and that of the weights (T, K), float32, if any.

    By rows, padding is undefined.
    """
    if z_R2F.is_cuda:
        return swiglu_quantize_backward_triton(z_R2F, grad_h_RF, weights_TK, row_map)
    return swiglu_quantize_backward_reference(z_R2F, grad_h_RF, weights_TK, row_map)


class _SwiGLUWeighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_R2F: Tensor, weights_TK: Tensor | None, row_map: RowMap) -> Tensor:
        ctx.row_map = row_map
        ctx.save_for_backward(z_R2F, weights_TK)
        return swiglu_weighted_forward(z_R2F, weights_TK, row_map)

    @staticmethod
    def backward(ctx: Any, grad_h_RF: Tensor) -> tuple[Tensor, Tensor | None, None]:
        z_R2F, weights_TK = ctx.saved_tensors
        grad_z_R2F, grad_weights_TK = swiglu_weighted_backward(z_R2F, grad_h_RF, weights_TK, ctx.row_map)
        if grad_weights_TK is not None:
            grad_weights_TK = grad_weights_TK.to(weights_TK.dtype)
        return grad_z_R2F[: len(z_R2F)], grad_weights_TK, None


# Triton


def swiglu_quantize_triton(
    z_R2F: Tensor,
    weights_TK: Tensor | None,
    row_map: RowMap,
    by_columns: bool,
    tile: tuple[int, ...] | None = None,
) -> Quantized:
    rows, width, device = row_map.rows, z_R2F.shape[1] // 2, z_R2F.device
    z_R2F = z_R2F.contiguous()
    weighted = weights_TK is not None
    weights = z_R2F if weights_TK is None else weights_TK.contiguous()  # not touched without weights
    if not by_columns:
        values = torch.empty((rows, width), dtype=STORED, device=device)
        scales = torch.empty((ceil_div(width, TILE), rows), dtype=torch.float32, device=device)
        if values.numel():
            block_r, warps = tile or ROWS_TILES[0]
            grid = ceil_div(width, TILE) * ceil_div(rows, block_r)  # one dimension: others are limited
            _quantize_rows_kernel[(grid,)](
                z_R2F, weights, row_map.pair_R, values, scales, rows, width, WEIGHTED=weighted, BLOCK_R=block_r,
                TILE=TILE, num_warps=warps,
            )  # fmt: skip
        return Quantized(values, scales)
    found = room_by_columns(row_map, width, device)
    if found.values.numel():
        block, held, warps = tile or COLUMNS_TILES[0]
        parts = ceil_div(width, block)
        _quantize_columns_kernel[(parts * len(row_map.tile_rows_M),)](
            z_R2F, weights, row_map.pair_R, row_map.tile_start_M, row_map.tile_rows_M, *found, found.values.shape[1],
            width, WEIGHTED=weighted, PARTS=parts, TILE=TILE, BLOCK=block, HELD=held, num_warps=warps,
        )  # fmt: skip
    return found


def swiglu_quantize_backward_triton(
    z_R2F: Tensor,
    grad_h_RF: Tensor,
    weights_TK: Tensor | None,
    row_map: RowMap,
    tile: tuple[int, int, int, int] = BACKWARD_TILES[0],
) -> tuple[Quantized, Quantized, Tensor | None]:
    rows, width, device = row_map.rows, z_R2F.shape[1] // 2, z_R2F.device
    if width % TILE:
        grad_z_R2F, grad_weights_TK = swiglu_backward_triton(z_R2F, grad_h_RF, weights_TK, row_map)
        return *fp8.quantize_both_triton(grad_z_R2F, row_map), grad_weights_TK
    z_R2F, grad_h_RF = z_R2F.contiguous(), grad_h_RF.contiguous()
    weights = z_R2F if weights_TK is None else weights_TK.contiguous()  # not touched without weights
    parts, pairs = width // TILE, row_map.place_TK.numel()
    by_columns = room_by_columns(row_map, 2 * width, device)
    by_rows = Quantized(
        torch.empty((rows, 2 * width), dtype=STORED, device=device),
        torch.empty((2 * parts, rows), dtype=torch.float32, device=device),
    )
    # A pair's part of its weight's gradient from each 128 columns, to be summed in their order.
    partial_FN = torch.empty((parts, pairs), dtype=torch.float32, device=device)
    if by_columns.values.numel():
        block_r, block, held, warps = tile
        programs = TILE // block_r + TILE // block  # of a tile
        _quantize_backward_kernel[(len(row_map.tile_rows_M) * parts * programs,)](
            z_R2F, grad_h_RF, weights, row_map.pair_R, row_map.tile_start_M, row_map.tile_rows_M, *by_rows,
            *by_columns, partial_FN, pairs, rows, by_columns.values.shape[1], width, WEIGHTED=weights_TK is not None,
            PARTS=parts, BLOCK_R=block_r, TILE=TILE, BLOCK=block, HELD=held, num_warps=warps,
        )  # fmt: skip
    return by_rows, by_columns, None if weights_TK is None else partial_FN.sum(0).view(row_map.place_TK.shape)


@jit
def _quantize_rows_kernel(  # type: ignore[no-untyped-def]
    z, weights, pair_R, values, scales, rows, width,
    WEIGHTED: tl.constexpr, BLOCK_R: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(width, TILE)
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tile * TILE + tl.arange(0, TILE)
    there = (column < width)[None, :]
    pair, weight = pairs_and_weights(pair_R, weights, row, row < rows, WEIGHTED)
    source = z + row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
    wide = rounded(_hidden(source, width, (pair >= 0)[:, None] & there, weight, WEIGHTED), z.dtype.element_ty)
    scale, inverse = scale_and_inverse(largest(wide, 1))
    to = values + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(to, narrow(wide * inverse[:, None], tl.float8e4nv), mask=(row < rows)[:, None] & there)
    tl.store(scales + tile.to(tl.int64) * rows + row, scale, mask=row < rows)


@jit
def _quantize_columns_kernel(  # type: ignore[no-untyped-def]
    z, weights, pair_R, tile_start_M, tile_rows_M, values, scales, stride, width,
    WEIGHTED: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    tile, first = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS * BLOCK
    count, start = tl.load(tile_rows_M + tile), tl.load(tile_start_M + tile)
    if count == 0:
        return
    within, column = rows_of_threads(TILE, HELD), tl.arange(0, BLOCK)
    _, weight = pairs_and_weights(pair_R, weights, start + within, within < count, WEIGHTED)
    source = z + start.to(tl.int64) * (2 * width) + first + (within[:, None] * (2 * width) + column[None, :])
    inside = (within < count)[:, None] & (first + column < width)[None, :]
    wide = narrow(_hidden(source, width, inside, weight, WEIGHTED), z.dtype.element_ty).to(tl.float32)
    store_by_columns(values, scales, wide, tile, first, stride, width, TILE, HELD, BLOCK)


@jit
def _quantize_backward_kernel(  # type: ignore[no-untyped-def]
    z, grad_h, weights, pair_R, tile_start_M, tile_rows_M, row_values, row_scales,
    values, scales, partial_FN, pairs, rows, stride, width, WEIGHTED: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    # A tile of rows × 128 columns of each half is read by rows and by columns, by neighbouring programs: the second
    # reading is from the cache.
    by_rows: tl.constexpr = TILE // BLOCK_R
    programs: tl.constexpr = by_rows + TILE // BLOCK
    step, part = tl.program_id(0) % programs, tl.program_id(0) // programs % PARTS
    tile = tl.program_id(0) // programs // PARTS
    count, start = tl.load(tile_rows_M + tile), tl.load(tile_start_M + tile)
    if step < by_rows:
        if step * BLOCK_R < count:
            within, first = step * BLOCK_R + tl.arange(0, BLOCK_R), part * TILE
            pair, weight, gate, up, grad = _read(
                z, grad_h, weights, pair_R, start, within, count, first, width, WEIGHTED, TILE
            )
            grad_gate, grad_up, grad_weight = swiglu_gradients(gate, up, grad, weight[:, None])
            if WEIGHTED:
                to = partial_FN + tl.full((), part, tl.int64) * pairs + pair
                tl.store(to, tl.sum(grad_weight, 1), mask=within < count)
            grad_gate, grad_up = rounded(grad_gate, z.dtype.element_ty), rounded(grad_up, z.dtype.element_ty)
            _store_by_rows(row_values, row_scales, grad_gate, start, within, count, first, rows, width, TILE)
            _store_by_rows(row_values, row_scales, grad_up, start, within, count, first + width, rows, width, TILE)
    elif count > 0:
        within, first = rows_of_threads(TILE, HELD), part * TILE + (step - by_rows) * BLOCK
        _pair, weight, gate, up, grad = _read(
            z, grad_h, weights, pair_R, start, within, count, first, width, WEIGHTED, BLOCK
        )
        grad_gate, grad_up, _grad_weight = swiglu_gradients(gate, up, grad, weight[:, None])
        # Both narrowed before either is stored: what is held meanwhile is half as large.
        grad_gate = narrow(grad_gate, z.dtype.element_ty).to(tl.float32)
        grad_up = narrow(grad_up, z.dtype.element_ty).to(tl.float32)
        store_by_columns(values, scales, grad_gate, tile, first, stride, 2 * width, TILE, HELD, BLOCK)
        first += width
        store_by_columns(values, scales, grad_up, tile, first, stride, 2 * width, TILE, HELD, BLOCK)


@jit
def _store_by_rows(  # type: ignore[no-untyped-def]
    values, scales, wide, start, within, count, first, rows, width, TILE: tl.constexpr
):  # fmt: skip
    """Quantise rows of 128 columns from `first` on of (R, 2F)."""
    scale, inverse = scale_and_inverse(largest(wide, 1))
    at = start.to(tl.int64) * (2 * width) + first + (within[:, None] * (2 * width) + tl.arange(0, TILE)[None, :])
    tl.store(values + at, narrow(wide * inverse[:, None], tl.float8e4nv), mask=(within < count)[:, None])
    tl.store(scales + (first // TILE).to(tl.int64) * rows + start + within, scale, mask=within < count)


@jit
def _read(  # type: ignore[no-untyped-def]
    z, grad_h, weights, pair_R, start, within, count, first, width, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of rows of a tile: pairs, weights, and of `BLOCK` columns from `first` on gate, up and the gradient of h."""
    real = within < count
    pair, weight = pairs_and_weights(pair_R, weights, start + within, real, WEIGHTED)
    column = first + tl.arange(0, BLOCK)[None, :]
    at = start.to(tl.int64) * (2 * width) + (within[:, None] * (2 * width) + column)
    grad_at = start.to(tl.int64) * width + (within[:, None] * width + column)
    gate = tl.load(z + at, mask=real[:, None], other=0.0).to(tl.float32)
    up = tl.load(z + width + at, mask=real[:, None], other=0.0).to(tl.float32)
    grad = tl.load(grad_h + grad_at, mask=real[:, None], other=0.0).to(tl.float32)
    return pair, weight, gate, up, grad


@jit
def _hidden(source, width, inside, weight, WEIGHTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """silu(gate) · up · weight, float32."""
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    _, activated = silu(gate)
    product = activated * up
    if WEIGHTED:
        product = product * weight[:, None]
    return product


@jit
def rounded(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 narrowed to `dtype` and widened again."""
    if INTERPRETED or dtype != tl.bfloat16:
        x = narrow(x, dtype).to(tl.float32)
    else:  # two at a time: one at a time it is an instruction of a quarter of the rate
        x = tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
            "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return x
