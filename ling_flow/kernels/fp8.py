"""Blockwise FP8 (Ling 2.0 §5.1; DeepSeek-V3 §3.3): E4M3 values with a float32 scale per tile.

Activations and gradients have tiles of 1×128: along the columns (`quantize_rows`) for the products that sum over
columns, along the rows (`quantize_columns`, stored transposed) for the gradients of weights, which sum over rows.
Weights have blocks of 128×128. A tile's scale is its largest magnitude / 448, and a value is stored as value·(448 /
largest), rounded to nearest even; both quotients are IEEE float32, so that scales and values are equal to the bit
wherever they are computed. A tile with a value that is not finite has the scale inf, and reads back as NaN.

Limits of the kernels: contiguous inputs of float32, bfloat16 or float16; any shape, fast where columns are a multiple
of 16.

Shapes: M rows, N columns, T tokens, R rows of a `RowMap`, E matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ling_flow.kernels._triton import ceil_div, jit, narrow, tl
from ling_flow.kernels.row_map import ALIGN, TILE, RowMap

STORED = torch.float8_e4m3fn
LARGEST = 448.0  # of STORED
LEAST = 2.0**-100  # largest magnitudes below count as this: a tile of zeros has a scale


class Quantized(NamedTuple):
    """FP8 values and their float32 scales.

    By rows: values (M, N), scales (ceil(N/128), M). By columns: values (N, R), scales (tiles of rows, N). Blocks:
    values (E, M, N), scales (E, ceil(M/128), ceil(N/128)). Scales of tiles lie so that neighbouring lanes read
    neighbouring scales.
    """

    values: Tensor
    scales: Tensor


# The definition, in torch


def _quantize_tiles(wide: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """float32 values with one tile over `dims` → (FP8 values, scales with those dims kept)."""
    largest = wide.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(dims, keepdim=True).clamp(min=LEAST)
    inverse = torch.full_like(largest, LARGEST) / largest  # a number / tensor would be number · (1 / tensor)
    return (wide * inverse).to(STORED), largest / LARGEST


def quantize_rows_reference(x_MN: Tensor) -> Quantized:
    columns = x_MN.shape[1]
    padded = functional.pad(x_MN.float(), (0, -columns % TILE)).unflatten(1, (-1, TILE))
    values, scales = _quantize_tiles(padded, (2,))
    return Quantized(values.flatten(1)[:, :columns].contiguous(), scales.squeeze(2).T.contiguous())


def quantize_columns_reference(x_TN: Tensor, row_map: RowMap, gather: bool) -> Quantized:
    row_MX, real_MX = _tile_rows(row_map)
    source_MX = row_map.pair_R[row_MX].long() // row_map.top_k if gather else row_MX
    tiles_MXN = torch.where(real_MX.unsqueeze(2), x_TN[source_MX.clamp(min=0)].float(), 0)
    values_MXN, scales_M1N = _quantize_tiles(tiles_MXN, (1,))
    values_RN = torch.zeros((row_map.rows, x_TN.shape[1]), dtype=STORED, device=x_TN.device)
    values_RN[row_MX[real_MX]] = values_MXN[real_MX]
    return Quantized(values_RN.T.contiguous(), scales_M1N.squeeze(1))


def _tile_rows(row_map: RowMap) -> tuple[Tensor, Tensor]:
    """The rows (M, 128) of each tile, and which of them are real."""
    within_X = torch.arange(TILE, device=row_map.pair_R.device)
    real_MX = within_X < row_map.tile_rows_M.unsqueeze(1)
    return torch.where(real_MX, row_map.tile_start_M.unsqueeze(1) + within_X, 0), real_MX


def quantize_blocks_reference(w_EMN: Tensor) -> Quantized:
    _, rows, columns = w_EMN.shape
    padded = functional.pad(w_EMN.float(), (0, -columns % TILE, 0, -rows % TILE))
    values, scales = _quantize_tiles(padded.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE)), (2, 4))
    values = values.flatten(3, 4).flatten(1, 2)[:, :rows, :columns]
    return Quantized(values.contiguous(), scales[:, :, 0, :, 0].contiguous())


def transpose_blocks_reference(w_EMN: Quantized) -> Quantized:
    values, scales = w_EMN.values.view(torch.uint8), w_EMN.scales
    return Quantized(values.mT.contiguous().view(STORED), scales.mT.contiguous())


def dequantize_rows(x_MN: Quantized) -> Tensor:
    """float32 (M, N)."""
    scales_MN = x_MN.scales.T.repeat_interleave(TILE, 1)[:, : x_MN.values.shape[1]]
    return x_MN.values.float() * scales_MN


def dequantize_columns(x_NR: Quantized, row_map: RowMap) -> Tensor:
    """float32 (R, N), zero in padding."""
    row_MX, real_MX = _tile_rows(row_map)
    scales_RN = x_NR.scales.new_zeros(row_map.rows, x_NR.values.shape[0])
    scales_RN[row_MX[real_MX]] = x_NR.scales.unsqueeze(1).expand(-1, TILE, -1)[real_MX]
    return x_NR.values.T.float() * scales_RN


def dequantize_blocks(w_EMN: Quantized) -> Tensor:
    """float32 (E, M, N)."""
    _, rows, columns = w_EMN.values.shape
    scales = w_EMN.scales.repeat_interleave(TILE, 1)[:, :rows].repeat_interleave(TILE, 2)[:, :, :columns]
    return w_EMN.values.float() * scales


# Dispatch


def quantize_rows(x_MN: Tensor) -> Quantized:
    """Tiles of 1×128 along the columns: values (M, N), scales (ceil(N/128), M)."""
    return quantize_rows_triton(x_MN) if x_MN.is_cuda else quantize_rows_reference(x_MN)


def quantize_columns(x: Tensor, row_map: RowMap, gather: bool = False) -> Quantized:
    """Tiles of 128×1 along the rows of each expert, transposed: values (N, R), scales (tiles, N).

    Args:
        x: (R, N) in the rows of the map, or with `gather` the tokens (T, N), which are looked up. Padding is stored as
            zero whatever it holds.
    """
    if x.is_cuda:
        return quantize_tiles_triton(x, row_map, gather, by_rows=False)[1]
    return quantize_columns_reference(x, row_map, gather)


def quantize_rows_and_columns(x_RN: Tensor, row_map: RowMap) -> tuple[Quantized, Quantized]:
    """Both of the above in one reading of x (R, N). By rows, the scales of padding are undefined."""
    if x_RN.is_cuda:
        by_rows, by_columns = quantize_tiles_triton(x_RN, row_map, False, by_rows=True)
        assert by_rows is not None
        return by_rows, by_columns
    return quantize_rows_reference(x_RN), quantize_columns_reference(x_RN, row_map, False)


def quantize_blocks(w_EMN: Tensor) -> Quantized:
    """Blocks of 128×128: values (E, M, N), scales (E, ceil(M/128), ceil(N/128))."""
    return quantize_blocks_triton(w_EMN) if w_EMN.is_cuda else quantize_blocks_reference(w_EMN)


def transpose_blocks(w_EMN: Quantized) -> Quantized:
    """The same matrices transposed: bytes and scales move, nothing is rounded (Ling 2.0 §5.2)."""
    return transpose_blocks_triton(w_EMN) if w_EMN.values.is_cuda else transpose_blocks_reference(w_EMN)


# Triton


def quantize_rows_triton(x_MN: Tensor) -> Quantized:
    rows, columns = x_MN.shape
    x_MN = x_MN.contiguous()
    values = torch.empty(x_MN.shape, dtype=STORED, device=x_MN.device)
    scales = torch.empty((ceil_div(columns, TILE), rows), dtype=torch.float32, device=x_MN.device)
    if x_MN.numel():
        grid = (ceil_div(rows, 32), ceil_div(columns, TILE))
        _quantize_rows_kernel[grid](x_MN, values, scales, rows, columns, BLOCK_M=32, TILE=TILE, num_warps=4)
    return Quantized(values, scales)


def quantize_tiles_triton(
    x: Tensor, row_map: RowMap, gather: bool, by_rows: bool
) -> tuple[Quantized | None, Quantized]:
    columns, device = x.shape[1], x.device
    x = x.contiguous()
    by_column = room_by_columns(row_map, columns, device)
    by_row = None
    if by_rows:
        by_row = Quantized(
            torch.empty((row_map.rows, columns), dtype=STORED, device=device),
            torch.empty((ceil_div(columns, TILE), row_map.rows), dtype=torch.float32, device=device),
        )
    if x.numel() and len(row_map.tile_rows_M):
        row_values, row_scales = by_row or by_column  # not touched without by_rows
        grid = (len(row_map.tile_rows_M), ceil_div(columns, TILE))
        _quantize_tiles_kernel[grid](
            x, row_map.pair_R, row_map.tile_start_M, row_map.tile_rows_M, row_values, row_scales, *by_column,
            row_map.rows, columns, TOP_K=row_map.top_k, GATHER=gather, BY_ROWS=by_rows, TILE=TILE, num_warps=16,
        )  # fmt: skip
    return by_row, by_column


def room_by_columns(row_map: RowMap, columns: int, device: torch.device) -> Quantized:
    """Room for values by columns, of which the rows past the last expert's are zero: the kernels write the others."""
    rows = row_map.rows
    values = torch.empty((columns, rows), dtype=STORED, device=device)
    scales = torch.empty((len(row_map.tile_rows_M), columns), dtype=torch.float32, device=device)
    if values.numel():
        grid = (ceil_div(rows - row_map.place_TK.numel(), 256), ceil_div(columns, 16))
        _zero_tail_kernel[grid](
            values, row_map.starts_E, row_map.counts_E, len(row_map.counts_E), rows, columns, ALIGN=ALIGN, BLOCK_R=256,
            BLOCK_N=16, num_warps=4,
        )  # fmt: skip
    return Quantized(values, scales)


def quantize_blocks_triton(w_EMN: Tensor) -> Quantized:
    matrices, rows, columns = w_EMN.shape
    w_EMN = w_EMN.contiguous()
    values = torch.empty(w_EMN.shape, dtype=STORED, device=w_EMN.device)
    blocks = (matrices, ceil_div(rows, TILE), ceil_div(columns, TILE))
    scales = torch.empty(blocks, dtype=torch.float32, device=w_EMN.device)
    if w_EMN.numel():
        _quantize_blocks_kernel[blocks](w_EMN, values, scales, rows, columns, TILE=TILE, num_warps=8)
    return Quantized(values, scales)


def transpose_blocks_triton(w_EMN: Quantized) -> Quantized:
    values = w_EMN.values.view(torch.uint8)
    matrices, rows, columns = values.shape
    out = torch.empty((matrices, columns, rows), dtype=torch.uint8, device=values.device)
    if values.numel():
        grid = (matrices, ceil_div(rows, TILE), ceil_div(columns, TILE))
        _transpose_kernel[grid](values, out, rows, columns, TILE=TILE, num_warps=8)
    return Quantized(out.view(STORED), w_EMN.scales.mT.contiguous())


@jit
def scale_and_inverse(largest):  # type: ignore[no-untyped-def]
    """A tile's scale, and what its values are multiplied by, from its largest magnitude."""
    largest = tl.maximum(largest, 7.888609052210118e-31)  # LEAST
    return tl.div_rn(largest, 448.0), tl.div_rn(448.0, largest)


@jit
def magnitude(wide):  # type: ignore[no-untyped-def]
    """|x|, and inf for NaN, which a maximum would not see."""
    return tl.where(wide == wide, tl.abs(wide), float("inf"))


@jit
def rows_of_tile(tile, count, tile_start_M, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows within a tile, the first one, and how many are its own with its expert's padding.

    Starts and paddings are multiples of 16, which the compiler must be told to write 16 bytes at a time.
    """
    start = tl.multiple_of(tl.load(tile_start_M + tile), 16)
    return tl.arange(0, TILE), start, (count + 15) // 16 * 16


@jit
def pairs_of_columns(BLOCK_F: tl.constexpr):  # type: ignore[no-untyped-def]
    """0, 1, …, of which the compiler is told that 2 at a time are neighbours.

    A thread then reads 2 columns of many rows instead of 8 of few: a column's largest is found and divided by in a
    quarter of the threads, and IEEE divisions are what these kernels would otherwise wait for.
    """
    return tl.max_contiguous(tl.arange(0, BLOCK_F), 2)


@jit
def _zero_tail_kernel(  # type: ignore[no-untyped-def]
    values, starts_E, counts_E, experts, rows, columns,
    ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    used = tl.load(starts_E + experts - 1) + (tl.load(counts_E + experts - 1) + ALIGN - 1) // ALIGN * ALIGN
    row = tl.multiple_of(used, ALIGN) + tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    to = values + column.to(tl.int64)[:, None] * rows + row[None, :]
    zeros = narrow(tl.zeros((BLOCK_N, BLOCK_R), tl.float32), tl.float8e4nv)
    tl.store(to, zeros, mask=(column < columns)[:, None] & (row < rows)[None, :])


@jit
def _quantize_rows_kernel(x, values, scales, rows, columns, BLOCK_M: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    wide = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_and_inverse(tl.max(magnitude(wide), 1))
    tl.store(values + offset, narrow(wide * inverse[:, None], tl.float8e4nv), mask=inside)
    tl.store(scales + tile.to(tl.int64) * rows + row, scale, mask=row < rows)


@jit
def _quantize_tiles_kernel(  # type: ignore[no-untyped-def]
    x, pair_R, tile_start_M, tile_rows_M, row_values, row_scales, column_values, column_scales, rows, columns,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, BY_ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    count = tl.load(tile_rows_M + tile)
    if count == 0:
        return
    # 64-bit offsets per tile, 32-bit ones within it: a tile spans 128 rows, or 128 columns of all rows.
    within, start, padded = rows_of_tile(tile, count, tile_start_M, TILE)
    column, first = pairs_of_columns(TILE), tl.program_id(1) * TILE
    real, there = within < count, first + column < columns
    if GATHER:
        token = (tl.load(pair_R + start + within, mask=real, other=0) // TOP_K).to(tl.int64)
        source = x + first + token[:, None] * columns + column[None, :]
    else:
        source = x + start.to(tl.int64) * columns + first + within[:, None] * columns + column[None, :]
    inside = real[:, None] & there[None, :]
    wide = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_and_inverse(tl.max(magnitude(wide), 0))
    stored = narrow(wide * inverse[None, :], tl.float8e4nv)
    to = column_values + first.to(tl.int64) * rows + start + column[:, None] * rows + within[None, :]
    tl.store(to, tl.trans(stored), mask=there[:, None] & (within < padded)[None, :])
    tl.store(column_scales + tile.to(tl.int64) * columns + first + column, scale, mask=there)
    if BY_ROWS:
        # Read again, from the cache: both halves at once would not fit the registers.
        wide = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        scale, inverse = scale_and_inverse(tl.max(magnitude(wide), 1))
        stored = narrow(wide * inverse[:, None], tl.float8e4nv)
        to = row_values + start.to(tl.int64) * columns + first
        tl.store(to + within[:, None] * columns + column[None, :], stored, mask=inside)
        tl.store(row_scales + tl.program_id(1).to(tl.int64) * rows + start + within, scale, mask=real)


@jit
def _quantize_blocks_kernel(w, values, scales, rows, columns, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    matrix = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(2) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offset = matrix * rows * columns + row.to(tl.int64)[:, None] * columns + column[None, :]
    wide = tl.load(w + offset, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_and_inverse(tl.max(tl.max(magnitude(wide), 1), 0))
    tl.store(values + offset, narrow(wide * inverse, tl.float8e4nv), mask=inside)
    block = (matrix * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(scales + block, scale)


@jit
def _transpose_kernel(values, out, rows, columns, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    matrix = tl.program_id(0).to(tl.int64) * rows * columns
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(2) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    found = tl.load(values + matrix + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside)
    to = matrix + column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out + to, tl.trans(found), mask=tl.trans(inside))
