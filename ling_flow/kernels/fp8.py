"""Blockwise FP8 (Ling 2.0 §5.1; DeepSeek-V3 §3.3): E4M3 values with a float32 scale per tile.

Activations and gradients have tiles of 1×128: along the columns (`quantize_rows`) for the products that sum over
columns, along the rows (`quantize_columns`, stored transposed) for the gradients of weights, which sum over rows.
By columns every tile of rows of an expert has room for 128, with zeros where it has fewer, so that a product over rows
needs no masks and Hopper's copy engine can read it.
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

from ling_flow.kernels._triton import INTERPRETED, ceil_div, jit, narrow, tl
from ling_flow.kernels.row_map import TILE, RowMap

STORED = torch.float8_e4m3fn
LARGEST = 448.0  # of STORED
LEAST = 2.0**-100  # largest magnitudes below count as this: a tile of zeros has a scale

# Columns of a program of 128 rows by columns, rows that a thread of it holds, warps; the first is taken.
COLUMNS_TILES = ((64, 16, 4), (64, 8, 4), (32, 16, 4), (128, 16, 8))
BOTH_TILES = ((32, 64, 16, 4), (16, 64, 16, 4), (32, 32, 16, 4))  # before these, rows of a program by rows
SLAB = 256  # columns of tokens that all tiles read, from the cache, before the next ones


class Quantized(NamedTuple):
    """FP8 values and their float32 scales.

    By rows: values (M, N), scales (ceil(N/128), M). By columns, of the X tiles of rows of a `RowMap`: values
    (N, 128·X), scales (X, N), undefined in tiles past the last one. Blocks: values (E, M, N), scales
    (E, ceil(M/128), ceil(N/128)). Scales of tiles lie so that neighbouring lanes read neighbouring scales.
    """

    values: Tensor
    scales: Tensor


# The definition, in torch


def _quantize_tiles(wide: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """float32 values with one tile over `dims` → (FP8 values, scales with those dims kept)."""
    largest = wide.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(dims, keepdim=True).clamp(min=LEAST)
    limit = torch.full_like(largest, LARGEST)  # a tensor: torch multiplies by the inverse of a number, on CUDA
    return (wide * (limit / largest)).to(STORED), largest / limit


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
    return Quantized(values_MXN.flatten(0, 1).T.contiguous(), scales_M1N.squeeze(1))


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
    wide_MXN = x_NR.values.T.float().unflatten(0, (-1, TILE)) * x_NR.scales.unsqueeze(1)
    wide_RN = wide_MXN.new_zeros(row_map.rows, wide_MXN.shape[2])
    wide_RN[row_MX[real_MX]] = wide_MXN[real_MX]
    return wide_RN


def dequantize_blocks(w_EMN: Quantized) -> Tensor:
    """float32 (E, M, N), in no more memory than that."""
    wide_EMN = w_EMN.values.float()
    scales_EXN = w_EMN.scales.repeat_interleave(TILE, 2)[:, :, : wide_EMN.shape[2]]
    for tile, scales_EN in enumerate(scales_EXN.unbind(1)):
        wide_EMN[:, tile * TILE : (tile + 1) * TILE] *= scales_EN.unsqueeze(1)
    return wide_EMN


# Dispatch


def quantize_rows(x_MN: Tensor) -> Quantized:
    """Tiles of 1×128 along the columns: values (M, N), scales (ceil(N/128), M)."""
    return quantize_rows_triton(x_MN) if x_MN.is_cuda else quantize_rows_reference(x_MN)


def quantize_columns(x: Tensor, row_map: RowMap, gather: bool = False) -> Quantized:
    """Tiles of 128×1 along the rows of each expert, transposed: values (N, 128·X), scales (X, N) for X tiles of rows.

    Args:
        x: (R, N) in the rows of the map, or with `gather` the tokens (T, N), which are looked up. Padding is stored as
            zero whatever it holds.
    """
    if x.is_cuda:
        return quantize_columns_triton(x, row_map, gather)
    return quantize_columns_reference(x, row_map, gather)


def quantize_rows_and_columns(x_RN: Tensor, row_map: RowMap) -> tuple[Quantized, Quantized]:
    """Both of the above in one reading of x (R, N). By rows, the scales of padding are undefined."""
    if x_RN.is_cuda:
        return quantize_both_triton(x_RN, row_map)
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


def quantize_columns_triton(
    x: Tensor, row_map: RowMap, gather: bool, tile: tuple[int, int, int] = COLUMNS_TILES[0]
) -> Quantized:
    columns = x.shape[1]
    x = x.contiguous()
    found = room_by_columns(row_map, columns, x.device)
    if found.values.numel():
        block, held, warps = tile
        parts = ceil_div(columns, block)
        slab = min(SLAB // block, parts) if gather else parts
        grid = (len(row_map.tile_rows_M) * slab, ceil_div(parts, slab))
        _quantize_columns_kernel[grid](
            x, row_map.pair_R, row_map.tile_start_M, row_map.tile_rows_M, *found, found.values.shape[1], columns,
            TOP_K=row_map.top_k, GATHER=gather, SLAB=slab, TILE=TILE, BLOCK=block, HELD=held, num_warps=warps,
        )  # fmt: skip
    return found


def quantize_both_triton(
    x_RN: Tensor, row_map: RowMap, tile: tuple[int, int, int, int] = BOTH_TILES[0]
) -> tuple[Quantized, Quantized]:
    rows, columns = row_map.rows, x_RN.shape[1]
    x_RN = x_RN.contiguous()
    by_columns = room_by_columns(row_map, columns, x_RN.device)
    by_rows = Quantized(
        torch.empty((rows, columns), dtype=STORED, device=x_RN.device),
        torch.empty((ceil_div(columns, TILE), rows), dtype=torch.float32, device=x_RN.device),
    )
    if by_columns.values.numel():
        block_r, block, held, warps = tile
        programs = TILE // block_r + TILE // block  # of a tile
        parts = ceil_div(columns, TILE)
        _quantize_both_kernel[(len(row_map.tile_rows_M) * parts * programs,)](
            x_RN, row_map.tile_start_M, row_map.tile_rows_M, *by_rows, *by_columns, rows, by_columns.values.shape[1],
            columns, PARTS=parts, BLOCK_R=block_r, TILE=TILE, BLOCK=block, HELD=held, num_warps=warps,
        )  # fmt: skip
    return by_rows, by_columns


def room_by_columns(row_map: RowMap, columns: int, device: torch.device) -> Quantized:
    """Room for values by columns; kernels write every tile that has rows."""
    tiles = len(row_map.tile_rows_M)
    return Quantized(
        torch.empty((columns, tiles * TILE), dtype=STORED, device=device),
        torch.empty((tiles, columns), dtype=torch.float32, device=device),
    )


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
def _maximum(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def largest(wide, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest magnitude along an axis; inf where one is not finite."""
    if INTERPRETED:  # it would reduce with a function of ours element by element
        found = tl.max(magnitude(wide), axis)
    else:
        found = tl.reduce(tl.abs(wide), axis, _maximum)
        found = tl.where(found == found, found, float("inf"))
    return found


@jit
def spread(x, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x (SIZE,) itself, dealt out anew: each value to as few threads as can be.

    After a reduction many threads hold the same values, and all would do the IEEE divisions that follow.
    """
    return tl.gather(x, tl.arange(0, SIZE), 0)


@jit
def rows_of_threads(TILE: tl.constexpr, HELD: tl.constexpr):  # type: ignore[no-untyped-def]
    """0, 1, …, TILE - 1 in the order in which a program by columns reads rows.

    The rows that a thread holds are every (TILE / HELD)-th of a block. Read so, they are neighbours: what it stores by
    columns is contiguous.
    """
    at = tl.arange(0, TILE)
    return at % (TILE // HELD) * HELD + at // (TILE // HELD)


@jit
def turned(x, TILE: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x (TILE, BLOCK), its rows in that order → (BLOCK, TILE) in plain order."""
    x = tl.permute(tl.reshape(x, (HELD, TILE // HELD, BLOCK)), (2, 1, 0))
    return tl.reshape(x, (BLOCK, TILE))


@jit
def store_by_columns(  # type: ignore[no-untyped-def]
    values, scales, wide, tile, first, stride, columns, TILE: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Quantise the columns from `first` on of a tile (TILE, BLOCK) whose rows are in the order of `rows_of_threads`,
    with zeros where there is no row."""
    scale, inverse = scale_and_inverse(spread(largest(wide, 0), BLOCK))
    stored = turned(narrow(wide * inverse[None, :], tl.float8e4nv), TILE, HELD, BLOCK)
    row, column = tl.arange(0, TILE), tl.arange(0, BLOCK)
    there = first + column < columns
    to = values + first.to(tl.int64) * stride + tile * TILE + column[:, None] * stride + row[None, :]
    tl.store(to, stored, mask=there[:, None])
    tl.store(scales + tile.to(tl.int64) * columns + first + column, scale, mask=there)


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
def _quantize_columns_kernel(  # type: ignore[no-untyped-def]
    x, pair_R, tile_start_M, tile_rows_M, values, scales, stride, columns,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, SLAB: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // SLAB
    first = (tl.program_id(1) * SLAB + tl.program_id(0) % SLAB) * BLOCK
    count, start = tl.load(tile_rows_M + tile), tl.load(tile_start_M + tile)
    if count == 0:
        return
    # 64-bit offsets per tile, 32-bit ones within it: a tile spans 128 rows, or 128 columns of all rows.
    within, column = rows_of_threads(TILE, HELD), tl.arange(0, BLOCK)
    if GATHER:
        token = tl.load(pair_R + start + within, mask=within < count, other=0) // TOP_K
        source = x + first + token.to(tl.int64)[:, None] * columns + column[None, :]
    else:
        source = x + start.to(tl.int64) * columns + first + within[:, None] * columns + column[None, :]
    inside = (within < count)[:, None] & (first + column < columns)[None, :]
    wide = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    store_by_columns(values, scales, wide, tile, first, stride, columns, TILE, HELD, BLOCK)


@jit
def _quantize_both_kernel(  # type: ignore[no-untyped-def]
    x, tile_start_M, tile_rows_M, row_values, row_scales, values, scales, rows, stride, columns,
    PARTS: tl.constexpr, BLOCK_R: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    # A tile of 128×128 is read by rows and by columns, by neighbouring programs: the second reading is from the cache.
    by_rows: tl.constexpr = TILE // BLOCK_R
    programs: tl.constexpr = by_rows + TILE // BLOCK
    step, part = tl.program_id(0) % programs, tl.program_id(0) // programs % PARTS
    tile = tl.program_id(0) // programs // PARTS
    count, start = tl.load(tile_rows_M + tile), tl.load(tile_start_M + tile)
    x += start.to(tl.int64) * columns
    if step < by_rows:
        if step * BLOCK_R < count:
            within, column = step * BLOCK_R + tl.arange(0, BLOCK_R), part * TILE + tl.arange(0, TILE)
            at = within[:, None] * columns + column[None, :]
            inside = (within < count)[:, None] & (column < columns)[None, :]
            wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            scale, inverse = scale_and_inverse(largest(wide, 1))
            to = row_values + start.to(tl.int64) * columns
            tl.store(to + at, narrow(wide * inverse[:, None], tl.float8e4nv), mask=inside)
            tl.store(row_scales + part.to(tl.int64) * rows + start + within, scale, mask=within < count)
    elif count > 0:
        within, first = rows_of_threads(TILE, HELD), part * TILE + (step - by_rows) * BLOCK
        column = first + tl.arange(0, BLOCK)
        inside = (within < count)[:, None] & (column < columns)[None, :]
        wide = tl.load(x + within[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
        store_by_columns(values, scales, wide, tile, first, stride, columns, TILE, HELD, BLOCK)


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
