"""Products of blockwise FP8 matrices, rows grouped by expert (Ling 2.0 §5.1; DeepSeek-V3 §3.3).

Each 128 values along the sum are multiplied in FP8 and added up in float32 from zero; that partial sum is scaled by
both scales and added to a float32 sum, as DeepGEMM does, because the tensor cores alone keep about 14 bits. Rows are
those of a `RowMap`; a plain matrix product is the one with `row_map.dense_map(T)` and weights (1, A, B).

The gradient of the rows is the forward product with `fp8.transpose_blocks(w)`, which rounds nothing. The gradient of
the weights sums along the rows, so both its operands are stored by columns (`fp8.quantize_columns`): rows contiguous,
which is what FP8 tensor cores read.

A program of one warp group makes 128×128 sums in two halves of 64 rows, so that sums (128 registers a thread) and
partial sums (64) fit; two programs share a multiprocessor, and one scales while the tensor cores work for the other.

Rows of padding: in outputs undefined; by columns they hold zeros.

Limits of the kernels: E4M3 with float32 scales, contiguous; fast where all sides are multiples of 16. A tile has 128
rows: an expert with few wastes the rest. A weight's gradient sums over all rows of its expert in one program. No
multicast: the L2 cache sets the pace (docs/log.md, 2026-11-27).

Shapes: T tokens, R rows of the map, E experts, A outputs, B inputs, M tiles of rows, N rows of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ling_flow.kernels._triton import ceil_div, described, dot, jit, narrow, tl
from ling_flow.kernels.fp8 import Quantized, dequantize_rows, transpose_blocks
from ling_flow.kernels.grouped_gemm import GROUP, ordered
from ling_flow.kernels.row_map import TILE, RowMap

WARPS = 4
ROWS_STAGES, WEIGHTS_STAGES = 3, 3  # of 32 KB: two programs' fit a multiprocessor


# The definition, in torch


def _product(left_NB: Tensor, right_AB: Tensor) -> Tensor:
    """left · rightᵀ in float32, added up in steps of 128 as the kernels do."""
    sum_NA = left_NB.new_zeros(left_NB.shape[0], right_AB.shape[0])
    for step in range(0, left_NB.shape[1], TILE):
        sum_NA.addmm_(left_NB[:, step : step + TILE], right_AB[:, step : step + TILE].T)
    return sum_NA


def _wide_AN(x_AR: Quantized, count: int, tile: int) -> Tensor:
    """One expert's values; `tile` is its first."""
    scales_MA = x_AR.scales[tile : tile + ceil_div(count, TILE)]
    values_AN = x_AR.values[:, tile * TILE : tile * TILE + count]
    return values_AN.float() * scales_MA.T.repeat_interleave(TILE, 1)[:, :count]


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
    for expert, (count, tile) in enumerate(zip(row_map.counts_E.tolist(), row_map.tiles_E.tolist(), strict=True)):
        out[expert] += _product(_wide_AN(grad_AR, count, tile), _wide_AN(x_BR, count, tile))
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
    x: Quantized, w_EAB: Quantized, row_map: RowMap, gather: bool = False, stages: int = ROWS_STAGES
) -> Tensor:
    columns, depth = w_EAB.values.shape[1:]
    y = torch.empty((row_map.rows, columns), dtype=torch.bfloat16, device=x.values.device)
    row_tiles = len(row_map.tile_rows_M)
    if row_tiles and columns:
        _rows_kernel[(row_tiles * ceil_div(columns, TILE),)](
            x.values, x.scales, w_EAB.values, w_EAB.scales, y, row_map.pair_R, row_map.tile_expert_M,
            row_map.tile_start_M, row_map.tile_rows_M, row_tiles, columns, depth, x.values.shape[0],
            TOP_K=row_map.top_k, GATHER=gather, EVEN_COLUMNS=columns % TILE == 0, EVEN_DEPTH=depth % TILE == 0,
            LARGE=x.values.numel() >= 2**31, GROUP=GROUP, TILE=TILE, STAGES=stages, num_warps=WARPS, num_stages=stages,
        )  # fmt: skip
    return y


def grouped_wgrad_fp8_triton(
    grad_AR: Quantized,
    x_BR: Quantized,
    row_map: RowMap,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    add: bool = False,
    stages: int = WEIGHTS_STAGES,
) -> Tensor:
    experts, outputs, inputs = len(row_map.counts_E), grad_AR.values.shape[0], x_BR.values.shape[0]
    if out is None:
        out = torch.empty((experts, outputs, inputs), dtype=out_dtype, device=x_BR.values.device)
    assert out.is_contiguous(), "the gradient is written in place"
    if not grad_AR.values.shape[1]:  # no rows at all
        return out if add else out.zero_()
    if out.numel():
        _weights_kernel[(experts * ceil_div(outputs, TILE) * ceil_div(inputs, TILE),)](
            described(grad_AR.values, TILE // 2, TILE), grad_AR.scales, described(x_BR.values, TILE, TILE), x_BR.scales,
            out, row_map.counts_E, row_map.tiles_E, outputs, inputs, ADD=add, GROUP=GROUP, TILE=TILE, STAGES=stages,
            num_warps=WARPS, num_stages=stages,
        )  # fmt: skip
    return out


@jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    x, x_scales, w, w_scales, y, pair_R, tile_expert_M, tile_start_M, tile_rows_M, row_tiles, columns, depth, rows,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, EVEN_COLUMNS: tl.constexpr, EVEN_DEPTH: tl.constexpr,
    LARGE: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = TILE // 2
    tile, block = ordered(tl.program_id(0), row_tiles, tl.cdiv(columns, TILE), GROUP)
    count = tl.load(tile_rows_M + tile)
    if count == 0:
        return
    start, expert = tl.load(tile_start_M + tile), tl.load(tile_expert_M + tile)
    steps = tl.cdiv(depth, TILE)
    k, within = tl.arange(0, TILE), tl.arange(0, HALF)
    # Where there is no row, the tile's first is read and its product not stored: a mask would cost more.
    row_1 = start + tl.where(within < count, within, 0)
    row_2 = start + tl.where(within + HALF < count, within + HALF, 0)
    source_1 = tl.load(pair_R + row_1) // TOP_K if GATHER else row_1
    source_2 = tl.load(pair_R + row_2) // TOP_K if GATHER else row_2
    scale_at_1, scale_at_2 = x_scales + source_1, x_scales + source_2
    # Addresses are one for all threads and an offset, of 32 bits where that is enough: every register counts.
    if LARGE:
        source_1, source_2 = source_1.to(tl.int64), source_2.to(tl.int64)
    x_offset_1, x_offset_2 = source_1[:, None] * depth + k[None, :], source_2[:, None] * depth + k[None, :]
    w_row = expert * columns + block * TILE
    w_at, w_offset = w + w_row.to(tl.int64) * depth, k[None, :] * depth + k[:, None]
    w_scale_at = w_scales + (expert.to(tl.int64) * tl.cdiv(columns, TILE) + block) * steps
    there = (block * TILE + k < columns)[None, :]
    acc_1 = tl.zeros((HALF, TILE), dtype=tl.float32)
    acc_2 = tl.zeros((HALF, TILE), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        inside = k < depth - step * TILE
        if not EVEN_DEPTH:
            right = tl.load(w_at + w_offset, mask=inside[:, None] & there, other=0.0)
        else:
            right = tl.load(w_at + w_offset) if EVEN_COLUMNS else tl.load(w_at + w_offset, mask=there, other=0.0)
        if EVEN_DEPTH:
            left_1, left_2 = tl.load(x + x_offset_1), tl.load(x + x_offset_2)
        else:
            left_1 = tl.load(x + x_offset_1, mask=inside[None, :], other=0.0)
            left_2 = tl.load(x + x_offset_2, mask=inside[None, :], other=0.0)
        w_scale = tl.load(w_scale_at + step)
        part = dot(left_1, right, tl.zeros((HALF, TILE), dtype=tl.float32))
        acc_1 += part * (tl.load(scale_at_1) * w_scale)[:, None]
        part = dot(left_2, right, tl.zeros((HALF, TILE), dtype=tl.float32))
        acc_2 += part * (tl.load(scale_at_2) * w_scale)[:, None]
        x += TILE
        w_at += TILE
        scale_at_1 += rows
        scale_at_2 += rows
    to = y + start.to(tl.int64) * columns + block * TILE + within[:, None] * columns + k[None, :]
    tl.store(to, narrow(acc_1, y.dtype.element_ty), mask=(within < count)[:, None] & there)
    tl.store(to + HALF * columns, narrow(acc_2, y.dtype.element_ty), mask=(within + HALF < count)[:, None] & there)


@jit
def _weights_kernel(  # type: ignore[no-untyped-def]
    grad, grad_scales, x, x_scales, out, counts_E, tiles_E, outputs, inputs,
    ADD: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = TILE // 2
    blocks_a, blocks_b = tl.cdiv(outputs, TILE), tl.cdiv(inputs, TILE)
    expert = tl.program_id(0) // (blocks_a * blocks_b)
    block_a, block_b = ordered(tl.program_id(0) % (blocks_a * blocks_b), blocks_a, blocks_b, GROUP)
    count, tile = tl.load(counts_E + expert), tl.load(tiles_E + expert)
    k, within = tl.arange(0, TILE), tl.arange(0, HALF)
    a_1, b = block_a * TILE + within, block_b * TILE + k
    a_2 = a_1 + HALF
    to = out + (expert.to(tl.int64) * outputs + block_a * TILE) * inputs + block_b * TILE
    to += within[:, None] * inputs + k[None, :]
    inside_1 = (a_1 < outputs)[:, None] & (b < inputs)[None, :]
    inside_2 = (a_2 < outputs)[:, None] & (b < inputs)[None, :]
    acc_1 = tl.zeros((HALF, TILE), dtype=tl.float32)
    acc_2 = tl.zeros((HALF, TILE), dtype=tl.float32)
    # Sides that are no multiple of 128 read scales of their neighbours, or the last ones: their sums are not stored.
    grad_scale_at_1 = grad_scales + tile.to(tl.int64) * outputs + tl.minimum(a_1, outputs - 1)
    grad_scale_at_2 = grad_scales + tile.to(tl.int64) * outputs + tl.minimum(a_2, outputs - 1)
    x_scale_at = x_scales + tile.to(tl.int64) * inputs + tl.minimum(b, inputs - 1)
    for done in tl.range(0, count, TILE, num_stages=STAGES):
        row = tile * TILE + done
        right = tl.trans(x.load([block_b * TILE, row]))
        x_scale = tl.load(x_scale_at)[None, :]
        part = dot(grad.load([block_a * TILE, row]), right, tl.zeros((HALF, TILE), dtype=tl.float32))
        acc_1 += part * tl.load(grad_scale_at_1)[:, None] * x_scale
        part = dot(grad.load([block_a * TILE + HALF, row]), right, tl.zeros((HALF, TILE), dtype=tl.float32))
        acc_2 += part * tl.load(grad_scale_at_2)[:, None] * x_scale
        grad_scale_at_1 += outputs
        grad_scale_at_2 += outputs
        x_scale_at += inputs
    if ADD:
        acc_1 += tl.load(to, mask=inside_1, other=0.0).to(tl.float32)
    tl.store(to, narrow(acc_1, out.dtype.element_ty), mask=inside_1)
    to += HALF * inputs
    if ADD:
        acc_2 += tl.load(to, mask=inside_2, other=0.0).to(tl.float32)
    tl.store(to, narrow(acc_2, out.dtype.element_ty), mask=inside_2)
