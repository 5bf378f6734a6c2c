"""Products of blockwise FP8 matrices, rows grouped by expert (Ling 2.0 §5.1; DeepSeek-V3 §3.3).

Each 128 values along the sum are multiplied in FP8 and added up in float32 from zero; that partial sum is scaled by
both scales and added to a float32 sum, as DeepGEMM does, because the tensor cores alone keep about 14 bits. Rows are
those of a `RowMap`; a plain matrix product is the one with `row_map.dense_map(T)` and weights (1, A, B).

The gradient of the rows is the forward product with `fp8.transpose_blocks(w)`, which rounds nothing. The gradient of
the weights sums along the rows, so both its operands are stored by columns (`fp8.quantize_columns`): rows contiguous,
which is what FP8 tensor cores read.

Rows of padding: in outputs undefined; by columns they hold zeros, up to the next multiple of 16.

Limits of the kernels: E4M3 with float32 scales, contiguous; fast where all sides are multiples of 16. A tile has 128
rows: an expert with few wastes the rest. A weight's gradient sums over all rows of its expert in one program. No copies
by the hardware's tensor engine (TMA), no multicast: of large products the L2 cache sets the pace.

Shapes: T tokens, R rows of the map, E experts, A outputs, B inputs, M tiles of rows, N rows of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ling_flow.kernels._triton import ceil_div, dot, jit, narrow, tl
from ling_flow.kernels.fp8 import Quantized, dequantize_rows, transpose_blocks
from ling_flow.kernels.grouped_gemm import GROUP, Tiles, ordered
from ling_flow.kernels.row_map import ALIGN, TILE, RowMap

# The first is used, or where the columns are no multiple of 256 the second; the others are for a sweep on a GPU. Depth
# is that of a tile of scales. Sums and partial sums of 128×128 take 64 and 64 registers of each of 256 threads. Of 256
# columns, one half after the other is added up, by 512 threads with 64 and 32; a quarter less goes through L2.
ROWS_TILES = (
    Tiles(2 * TILE, TILE, 16, 4), Tiles(TILE, TILE, 8, 4), Tiles(2 * TILE, TILE, 16, 3), Tiles(TILE, TILE, 8, 3),
    Tiles(TILE, TILE, 8, 5),
)  # fmt: skip
WEIGHTS_TILES = (Tiles(TILE, TILE, 8, 4), Tiles(TILE, TILE, 8, 3), Tiles(TILE, TILE, 8, 5))


# The definition, in torch


def _product(left_NB: Tensor, right_AB: Tensor) -> Tensor:
    """left · rightᵀ in float32, added up in steps of 128 as the kernels do."""
    sum_NA = left_NB.new_zeros(left_NB.shape[0], right_AB.shape[0])
    for step in range(0, left_NB.shape[1], TILE):
        sum_NA.addmm_(left_NB[:, step : step + TILE], right_AB[:, step : step + TILE].T)
    return sum_NA


def _wide_AN(x_AR: Quantized, rows: slice, tile: int) -> Tensor:
    """One expert's values; `tile` is its first."""
    count = rows.stop - rows.start
    scales_MA = x_AR.scales[tile : tile + ceil_div(count, TILE)]
    return x_AR.values[:, rows].float() * scales_MA.T.repeat_interleave(TILE, 1)[:, :count]


def grouped_forward_fp8_reference(x: Quantized, w_EAB: Quantized, row_map: RowMap, gather: bool) -> Tensor:
    outputs, inputs = w_EAB.values.shape[1:]
    y_RA = torch.zeros((row_map.rows, outputs), dtype=torch.bfloat16, device=x.values.device)
    wide = dequantize_rows(x)
    for expert, rows in row_map.filled():
        scales_AB = w_EAB.scales[expert].repeat_interleave(TILE, 0)[:outputs].repeat_interleave(TILE, 1)[:, :inputs]
        w_AB = w_EAB.values[expert].float() * scales_AB
        y_RA[rows] = _product(wide[row_map.tokens(rows)] if gather else wide[rows], w_AB).bfloat16()
    return y_RA


def grouped_wgrad_fp8_reference(
    grad_AR: Quantized,
    x_BR: Quantized,
    row_map: RowMap,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    if out is None:
        shape = (len(row_map.counts_E), grad_AR.values.shape[0], x_BR.values.shape[0])
        out = torch.zeros(shape, dtype=out_dtype, device=x_BR.values.device)
    elif not add:
        out.zero_()
    tiles_E = row_map.tiles_E.tolist()
    for expert, rows in row_map.filled():
        out[expert] += _product(_wide_AN(grad_AR, rows, tiles_E[expert]), _wide_AN(x_BR, rows, tiles_E[expert]))
    return out


# Dispatch


def grouped_forward_fp8(x: Quantized, w_EAB: Quantized, row_map: RowMap, gather: bool = False) -> Tensor:
    """bfloat16 (R, A): each row times its expert's weights.

    Args:
        x: by rows, (R, B) or with `gather` the tokens (T, B).
        w_EAB: in blocks.
    """
    if x.values.is_cuda:
        return grouped_forward_fp8_triton(x, w_EAB, row_map, gather)
    return grouped_forward_fp8_reference(x, w_EAB, row_map, gather)


def grouped_dgrad_fp8(grad: Quantized, w_EAB: Quantized, row_map: RowMap, gather: bool = False) -> Tensor:
    """bfloat16 (R, B): each row's gradient, quantised by rows, times its expert's weights transposed."""
    return grouped_forward_fp8(grad, transpose_blocks(w_EAB), row_map, gather)


def grouped_wgrad_fp8(
    grad_AR: Quantized,
    x_BR: Quantized,
    row_map: RowMap,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """(E, A, B): gradient of each expert's weights, zero where it has no rows.

    Args:
        grad_AR: by columns.
        x_BR: by columns.
        out_dtype: of the result where `out` is not given.
        out: written to and returned.
        add: add to `out` instead of overwriting it.
    """
    if add and out is None:
        raise ValueError("add=True needs out=, the tensor to add to")
    if x_BR.values.is_cuda:
        return grouped_wgrad_fp8_triton(grad_AR, x_BR, row_map, out_dtype, out, add)
    return grouped_wgrad_fp8_reference(grad_AR, x_BR, row_map, out_dtype, out, add)


# Triton


def grouped_forward_fp8_triton(
    x: Quantized, w_EAB: Quantized, row_map: RowMap, gather: bool = False, tiles: Tiles | None = None
) -> Tensor:
    columns, depth = w_EAB.values.shape[1:]
    tiles = tiles or ROWS_TILES[0 if columns % (2 * TILE) == 0 else 1]
    assert tiles.depth == TILE, "one scale per block of weights"
    halves = tiles.columns // TILE
    assert columns % (2 * TILE) == 0 if halves == 2 else halves == 1
    y = torch.empty((row_map.rows, columns), dtype=torch.bfloat16, device=x.values.device)
    row_tiles = len(row_map.tile_rows_M)
    if row_tiles and columns:
        grid = (row_tiles * ceil_div(columns, tiles.columns),)
        _rows_kernel[grid](
            x.values, x.scales, w_EAB.values, w_EAB.scales, y, row_map.pair_R, row_map.tile_expert_M,
            row_map.tile_start_M, row_map.tile_rows_M, row_tiles, columns, depth, x.values.shape[0],
            TOP_K=row_map.top_k, GATHER=gather, EVEN_COLUMNS=columns % TILE == 0, EVEN_DEPTH=depth % TILE == 0,
            WIDE=halves == 2, GROUP=GROUP, TILE=TILE, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return y


def grouped_wgrad_fp8_triton(
    grad_AR: Quantized,
    x_BR: Quantized,
    row_map: RowMap,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    add: bool = False,
    tiles: Tiles | None = None,
) -> Tensor:
    experts, outputs, inputs = len(row_map.counts_E), grad_AR.values.shape[0], x_BR.values.shape[0]
    if out is None:
        out = torch.empty((experts, outputs, inputs), dtype=out_dtype, device=x_BR.values.device)
    assert out.is_contiguous(), "the gradient is written in place"
    tiles = tiles or WEIGHTS_TILES[0]
    assert tiles.columns == tiles.depth == TILE, "one scale per tile of rows"
    if out.numel():
        grid = (experts * ceil_div(outputs, TILE) * ceil_div(inputs, TILE),)
        _weights_kernel[grid](
            grad_AR.values, grad_AR.scales, x_BR.values, x_BR.scales, out, row_map.counts_E, row_map.starts_E,
            row_map.tiles_E, outputs, inputs, row_map.rows, ADD=add, GROUP=GROUP, TILE=TILE, ALIGN=ALIGN,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out


@jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    x, x_scales, w, w_scales, y, pair_R, tile_expert_M, tile_start_M, tile_rows_M, row_tiles, columns, depth, rows,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, EVEN_COLUMNS: tl.constexpr, EVEN_DEPTH: tl.constexpr,
    WIDE: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = 2 if WIDE else 1  # of weights that a program reads at a step
    tile, block = ordered(tl.program_id(0), row_tiles, tl.cdiv(columns, BLOCKS * TILE), GROUP)
    block *= BLOCKS
    count = tl.load(tile_rows_M + tile)
    if count == 0:
        return
    within = tl.arange(0, TILE)
    real = within < count
    start = tl.load(tile_start_M + tile).to(tl.int64)
    # Where there is no row, the tile's first is read and its product not stored: a mask would cost more.
    row = start + tl.where(real, within, 0)
    source = (tl.load(pair_R + row) // TOP_K).to(tl.int64) if GATHER else row
    column = block * TILE + within
    expert = tl.load(tile_expert_M + tile).to(tl.int64)
    steps = tl.cdiv(depth, TILE)
    x_at = x + source[:, None] * depth + within[None, :]
    w_at = w + (expert * columns + block * TILE) * depth + within[None, :] * depth + within[:, None]
    x_scale_at = x_scales + source
    w_scale_at = w_scales + (expert * tl.cdiv(columns, TILE) + block) * steps
    there = (column < columns)[None, :]
    acc = tl.zeros((TILE, TILE), dtype=tl.float32)
    if WIDE:
        acc_2 = tl.zeros((TILE, TILE), dtype=tl.float32)
    for step in range(0, steps):
        inside = within < depth - step * TILE
        if EVEN_DEPTH:
            left = tl.load(x_at)
            right = tl.load(w_at) if EVEN_COLUMNS else tl.load(w_at, mask=there, other=0.0)
        else:
            left = tl.load(x_at, mask=inside[None, :], other=0.0)
            right = tl.load(w_at, mask=inside[:, None] & there, other=0.0)
        x_scale = tl.load(x_scale_at)
        scale = x_scale * tl.load(w_scale_at + step)
        acc += dot(left, right, tl.zeros((TILE, TILE), dtype=tl.float32)) * scale[:, None]
        if WIDE:
            if EVEN_DEPTH:
                right = tl.load(w_at + TILE * depth)
            else:
                right = tl.load(w_at + TILE * depth, mask=inside[:, None], other=0.0)
            scale = x_scale * tl.load(w_scale_at + steps + step)
            acc_2 += dot(left, right, tl.zeros((TILE, TILE), dtype=tl.float32)) * scale[:, None]
        x_at += TILE
        w_at += TILE
        x_scale_at += rows
    to = y + start * columns + within[:, None] * columns + column[None, :]
    tl.store(to, narrow(acc, y.dtype.element_ty), mask=real[:, None] & there)
    if WIDE:
        tl.store(to + TILE, narrow(acc_2, y.dtype.element_ty), mask=real[:, None])


@jit
def _weights_kernel(  # type: ignore[no-untyped-def]
    grad, grad_scales, x, x_scales, out, counts_E, starts_E, tiles_E, outputs, inputs, rows,
    ADD: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    blocks_a, blocks_b = tl.cdiv(outputs, TILE), tl.cdiv(inputs, TILE)
    expert = tl.program_id(0) // (blocks_a * blocks_b)
    block_a, block_b = ordered(tl.program_id(0) % (blocks_a * blocks_b), blocks_a, blocks_b, GROUP)
    count, first = tl.load(counts_E + expert), tl.load(tiles_E + expert).to(tl.int64)
    # Told as multiples of 16, so that the mask leaves 16-byte reads whole: what is past the count up to there is zero.
    start = tl.multiple_of(tl.load(starts_E + expert), ALIGN)
    limit = tl.multiple_of((count + ALIGN - 1) // ALIGN * ALIGN, ALIGN)
    within = tl.arange(0, TILE)
    a, b = block_a * TILE + within, block_b * TILE + within
    there_a, there_b = a < outputs, b < inputs
    # A row that is not there reads the first: its products are not stored.
    grad_at = grad + tl.where(there_a, a, 0).to(tl.int64)[:, None] * rows + start + within[None, :]
    x_at = x + tl.where(there_b, b, 0).to(tl.int64)[None, :] * rows + start + within[:, None]
    grad_scale_at, x_scale_at = grad_scales + first * outputs + a, x_scales + first * inputs + b
    acc = tl.zeros((TILE, TILE), dtype=tl.float32)
    for done in range(0, count, TILE):
        real = within < limit - done
        left = tl.load(grad_at, mask=real[None, :], other=0.0)
        right = tl.load(x_at, mask=real[:, None], other=0.0)
        grad_scale = tl.load(grad_scale_at, mask=there_a, other=0.0)
        x_scale = tl.load(x_scale_at, mask=there_b, other=0.0)
        part = dot(left, right, tl.zeros((TILE, TILE), dtype=tl.float32))
        acc += part * grad_scale[:, None] * x_scale[None, :]
        grad_at += TILE
        x_at += TILE
        grad_scale_at += outputs
        x_scale_at += inputs
    to = out + (expert.to(tl.int64) * outputs + block_a * TILE) * inputs + block_b * TILE
    to += within[:, None] * inputs + within[None, :]
    inside = there_a[:, None] & there_b[None, :]
    if ADD:
        acc += tl.load(to, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, narrow(acc, out.dtype.element_ty), mask=inside)
