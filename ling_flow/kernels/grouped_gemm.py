"""Matrix products of rows grouped by expert: forward, gradient of the rows, gradient of the weights.

The rows are those of a `RowMap`, each expert's beginning at a multiple of 16. With `gather` an operand is given by
token and looked up while it is read, so that no permuted copy is made (ScatterMoE, arXiv 2403.08245; SonicMoE, arXiv
2512.14080). Programs are numbered so that those that read the same rows and the same weights run at the same time:
each weight comes from memory about once, the rest from the L2 cache.

Rows of padding: in outputs undefined, in inputs never read as values.

Limits of the kernels: contiguous operands of one type, bfloat16, float16 or float32; fast where both sides of the
weights are multiples of 16. bfloat16 and float16 run on tensor cores with float32 sums. float32 multiplies in float32,
slowly, unless `torch.set_float32_matmul_precision` allows TF32. A tile has 128 rows: an expert with few wastes the
rest. A weight's gradient sums over all rows of its expert in one program: with one expert and small weights there are
too few programs to fill a GPU. Rows that are looked up cannot be read by Hopper's copy engine (TMA); no multicast.

Shapes: T tokens, R rows of the map, E experts, A outputs, B inputs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ling_flow.kernels._triton import INTERPRETED, ceil_div, describable, described, dot, jit, narrow, tl
from ling_flow.kernels.row_map import ALIGN, TILE, RowMap

Backend = Literal["auto", "triton", "torch"]


class Tiles(NamedTuple):
    """How a kernel is cut: columns and depth of a tile, warps, stages of its pipeline."""

    columns: int
    depth: int
    warps: int
    stages: int


# By bytes per value. The first is used; the others are for a sweep (figures in docs/log.md). 128×256 sums take 128
# registers of each of 256 threads, and their operands 48 KB a stage; a quarter less goes through L2 than with 128×128.
# Where rows are looked up within the loop, the look-up takes half of the stages. With few rows an expert a gradient of
# weights is mostly its own writing: two blocks of 4 warps share a multiprocessor, and one reads while the other writes.
# Where neither side of a gradient of weights is looked up, all its stages hold operands: seven of 48 KB do not fit.
ROWS_TILES = {
    2: (Tiles(256, 64, 8, 4), Tiles(256, 64, 8, 3), Tiles(128, 64, 4, 3)),
    4: (Tiles(128, 32, 8, 3),),
}
WEIGHTS_TILES = {2: (Tiles(256, 64, 8, 7), Tiles(256, 64, 8, 5)), 4: (Tiles(128, 32, 8, 3),)}
PLAIN_WEIGHTS_TILES = {2: (Tiles(256, 64, 8, 4), Tiles(256, 64, 8, 3)), 4: (Tiles(128, 32, 8, 3),)}
FEW_ROWS = 1024  # or fewer an expert, on average
FEW_ROWS_TILES = {2: (Tiles(128, 64, 4, 5), Tiles(128, 64, 4, 4)), 4: (Tiles(128, 32, 8, 3),)}
ADDED_TILES = {2: (Tiles(128, 32, 4, 5), Tiles(128, 64, 8, 7), Tiles(256, 64, 8, 4)), 4: (Tiles(128, 32, 8, 3),)}
GROUP = 8  # tiles of rows whose programs are numbered together


# The definition, in torch


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """What sums are held in."""
    return torch.promote_types(dtype, torch.float32)


def grouped_forward_reference(x: Tensor, w_EAB: Tensor, row_map: RowMap, gather: bool) -> Tensor:
    wide = wide_type(x.dtype)
    y_RA = x.new_zeros(row_map.rows, w_EAB.shape[1])
    for expert, rows in row_map.filled():
        found = x[row_map.tokens(rows)] if gather else x[rows]
        y_RA[rows] = (found.to(wide) @ w_EAB[expert].to(wide).T).to(x.dtype)
    return y_RA


def grouped_dgrad_reference(grad: Tensor, w_EAB: Tensor, row_map: RowMap, gather: bool) -> Tensor:
    return grouped_forward_reference(grad, w_EAB.mT, row_map, gather)


def grouped_wgrad_reference(
    grad: Tensor,
    x: Tensor,
    row_map: RowMap,
    gather_grad: bool,
    gather_x: bool,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    wide = wide_type(x.dtype)
    if out is None:
        out = x.new_zeros(len(row_map.counts_E), grad.shape[1], x.shape[1])
    elif not add:
        out.zero_()
    for expert, rows in row_map.filled():
        grad_NA = grad[row_map.tokens(rows)] if gather_grad else grad[rows]
        x_NB = x[row_map.tokens(rows)] if gather_x else x[rows]
        out[expert] += grad_NA.to(wide).T @ x_NB.to(wide)
    return out


# Dispatch


def grouped_forward(x: Tensor, w_EAB: Tensor, row_map: RowMap, gather: bool, backend: Backend = "auto") -> Tensor:
    """y (R, A): each row times its expert's weights.

    Args:
        x: (R, B), or with `gather` the tokens (T, B).
        backend: "torch" is `torch.nn.functional.grouped_mm`, which looks up into a copy and needs sides of multiples
            of 16 bytes; "auto" is Triton on CUDA and the definition elsewhere.
    """
    if backend == "torch":
        return _grouped_forward_torch(x, w_EAB.mT, row_map, gather)
    if backend == "triton" or x.is_cuda:
        return grouped_forward_triton(x, w_EAB, row_map, gather)
    return grouped_forward_reference(x, w_EAB, row_map, gather)


def grouped_dgrad(grad: Tensor, w_EAB: Tensor, row_map: RowMap, gather: bool, backend: Backend = "auto") -> Tensor:
    """(R, B): each row's gradient times its expert's weights transposed. Arguments as of `grouped_forward`."""
    if backend == "torch":
        return _grouped_forward_torch(grad, w_EAB, row_map, gather)
    if backend == "triton" or grad.is_cuda:
        return grouped_dgrad_triton(grad, w_EAB, row_map, gather)
    return grouped_dgrad_reference(grad, w_EAB, row_map, gather)


def grouped_wgrad(
    grad: Tensor,
    x: Tensor,
    row_map: RowMap,
    gather_grad: bool,
    gather_x: bool,
    out: Tensor | None = None,
    add: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """(E, A, B): gradient of each expert's weights, gradᵀ·x over its rows, zero where there are none.

    Args:
        grad: (R, A), or with `gather_grad` by token (T, A).
        x: (R, B), or with `gather_x` by token (T, B).
        out: written to and returned, float32 or the type of x; None makes one of the type of x.
        add: add to `out` instead of overwriting it.
    """
    if add and out is None:
        raise ValueError("add=True needs out=, the tensor to add to")
    if backend == "torch":
        found_EAB = _grouped_wgrad_torch(grad, x, row_map, gather_grad, gather_x)
        if out is None:
            return found_EAB
        return out.add_(found_EAB) if add else out.copy_(found_EAB)
    if backend == "triton" or x.is_cuda:
        return grouped_wgrad_triton(grad, x, row_map, gather_grad, gather_x, out, add)
    return grouped_wgrad_reference(grad, x, row_map, gather_grad, gather_x, out, add)


# torch's own


def _ends_E(row_map: RowMap) -> Tensor:
    """The row past each expert's last, padding included."""
    return row_map.starts_E + (row_map.counts_E + ALIGN - 1) // ALIGN * ALIGN


def grouped_mm(left: Tensor, right: Tensor, row_map: RowMap) -> Tensor:
    """The product alone: rows (R, …) that lie as the map has them, and for a gradient of weights zeros in padding."""
    function = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    return function(left, right, offs=_ends_E(row_map))


def looked_up(x: Tensor, row_map: RowMap) -> Tensor:
    """(R, B): the token of each row; in padding some token."""
    if not len(x):
        return x.new_zeros(row_map.rows, x.shape[1])
    return x.index_select(0, row_map.pair_R.clamp(min=0) // row_map.top_k)


def _grouped_forward_torch(x: Tensor, w_EBA: Tensor, row_map: RowMap, gather: bool) -> Tensor:
    return grouped_mm(looked_up(x, row_map) if gather else x, w_EBA, row_map)


def _grouped_wgrad_torch(grad: Tensor, x: Tensor, row_map: RowMap, gather_grad: bool, gather_x: bool) -> Tensor:
    # It sums over padding too, which must therefore be zero on both sides: 0 · NaN is NaN.
    padding_R1 = (row_map.pair_R < 0).unsqueeze(1)
    grad_RA = (looked_up(grad, row_map) if gather_grad else grad).masked_fill(padding_R1, 0)
    x_RB = (looked_up(x, row_map) if gather_x else x).masked_fill(padding_R1, 0)
    found_EAB = grouped_mm(grad_RA.T, x_RB, row_map)
    return found_EAB.masked_fill_((row_map.counts_E == 0).view(-1, 1, 1), 0)


# Triton


def grouped_forward_triton(
    x: Tensor, w_EAB: Tensor, row_map: RowMap, gather: bool, tiles: Tiles | None = None
) -> Tensor:
    return _rows_triton(x, w_EAB, row_map, gather, False, tiles)


def grouped_dgrad_triton(
    grad: Tensor, w_EAB: Tensor, row_map: RowMap, gather: bool, tiles: Tiles | None = None
) -> Tensor:
    return _rows_triton(grad, w_EAB, row_map, gather, True, tiles)


def _rows_triton(
    x: Tensor, w_EAB: Tensor, row_map: RowMap, gather: bool, transposed: bool, tiles: Tiles | None
) -> Tensor:
    x, w_EAB = x.contiguous(), w_EAB.contiguous()
    columns, depth = w_EAB.shape[1:] if not transposed else w_EAB.mT.shape[1:]
    tiles = tiles or ROWS_TILES[x.element_size()][0]
    y = torch.empty((row_map.rows, columns), dtype=x.dtype, device=x.device)
    row_tiles = len(row_map.tile_rows_M)
    if row_tiles and columns:
        weights = w_EAB.flatten(0, 1)
        described_x = not gather and x.element_size() == 2 and describable(x)
        # Transposed weights pay only together with rows. Beyond their depth lies the next expert, not nothing.
        described_w = described_x and depth % tiles.depth == 0
        if not transposed:
            described_w = x.element_size() == 2 and describable(weights)
        block = (tiles.depth, tiles.columns) if transposed else (tiles.columns, tiles.depth)
        grid = (row_tiles * ceil_div(columns, tiles.columns),)
        _rows_kernel[grid](
            described(x, TILE, tiles.depth) if described_x else x,
            described(weights, *block) if described_w else weights, y,
            row_map.pair_R, row_map.tile_expert_M, row_map.tile_start_M, row_map.tile_rows_M,
            row_tiles, columns, depth, TOP_K=row_map.top_k, GATHER=gather, TRANSPOSED=transposed,
            DESCRIBED_X=described_x, DESCRIBED_W=described_w, EVEN_COLUMNS=columns % tiles.columns == 0,
            EVEN_DEPTH=depth % tiles.depth == 0, PRECISION=_precision(), GROUP=GROUP, TILE=TILE, BLOCK_N=tiles.columns,
            BLOCK_K=tiles.depth, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return y


def grouped_wgrad_triton(
    grad: Tensor,
    x: Tensor,
    row_map: RowMap,
    gather_grad: bool,
    gather_x: bool,
    out: Tensor | None = None,
    add: bool = False,
    tiles: Tiles | None = None,
) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    experts, outputs, inputs = len(row_map.counts_E), grad.shape[1], x.shape[1]
    if out is None:
        out = torch.empty((experts, outputs, inputs), dtype=x.dtype, device=x.device)
    assert out.is_contiguous(), "the gradient is written in place"
    few = row_map.place_TK.numel() <= FEW_ROWS * experts
    if add:
        fitting = ADDED_TILES
    elif few:
        fitting = FEW_ROWS_TILES
    else:
        fitting = WEIGHTS_TILES if gather_grad or gather_x else PLAIN_WEIGHTS_TILES
    tiles = tiles or fitting[x.element_size()][0]
    if out.numel():
        grid = (experts * ceil_div(outputs, TILE) * ceil_div(inputs, tiles.columns),)
        _weights_kernel[grid](
            grad, x, out, row_map.pair_R, row_map.counts_E, row_map.starts_E, outputs, inputs,
            TOP_K=row_map.top_k, GATHER_GRAD=gather_grad, GATHER_X=gather_x, EVEN_A=outputs % TILE == 0,
            EVEN_B=inputs % tiles.columns == 0, ADD=add, PRECISION=_precision(), GROUP=GROUP, BLOCK_A=TILE,
            BLOCK_B=tiles.columns, BLOCK_R=tiles.depth, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out


def _precision() -> str:
    """Of float32 products on a GPU."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@jit
def ordered(program, rows, columns, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The program's tile of rows and of columns: GROUP tiles of rows go through all columns together."""
    in_group = GROUP * columns
    first = program // in_group * GROUP
    size = tl.minimum(rows - first, GROUP)
    within = program % in_group
    return first + within % size, within // size


@jit
def _product(a, b, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    if a.dtype == tl.float32 and not INTERPRETED:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    return dot(a, b, acc)


@jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    x, w, y, pair_R, tile_expert_M, tile_start_M, tile_rows_M, row_tiles, columns, depth,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIBED_X: tl.constexpr,
    DESCRIBED_W: tl.constexpr, EVEN_COLUMNS: tl.constexpr, EVEN_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, block = ordered(tl.program_id(0), row_tiles, tl.cdiv(columns, BLOCK_N), GROUP)
    count = tl.load(tile_rows_M + tile)
    if count == 0:
        return
    within = tl.arange(0, TILE)
    real = within < count
    first, expert = tl.load(tile_start_M + tile), tl.load(tile_expert_M + tile)
    start = first.to(tl.int64)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (column < columns)[None, :]
    k = tl.arange(0, BLOCK_K)
    if not DESCRIBED_X:
        # Where there is no row, the tile's first is read and its product not stored: a mask would cost more.
        row = start + tl.where(real, within, 0)
        source = (tl.load(pair_R + row) // TOP_K).to(tl.int64) if GATHER else row
        x_at = x + source[:, None] * depth + k[None, :]
    if not DESCRIBED_W:
        weights = w + expert.to(tl.int64) * columns * depth
        if TRANSPOSED:
            w_at = weights + k[:, None] * columns + column[None, :]
        else:
            w_at = weights + column[None, :] * depth + k[:, None]
    acc = tl.zeros((TILE, BLOCK_N), dtype=tl.float32)
    for done in range(0, depth, BLOCK_K):
        if DESCRIBED_X:
            left = x.load([first, done])
        else:
            left = tl.load(x_at) if EVEN_DEPTH else tl.load(x_at, mask=(k < depth - done)[None, :], other=0.0)
            x_at += BLOCK_K
        if DESCRIBED_W:
            if TRANSPOSED:
                right = w.load([expert * depth + done, block * BLOCK_N])
            else:
                right = tl.trans(w.load([expert * columns + block * BLOCK_N, done]))
        else:
            if not EVEN_DEPTH:
                right = tl.load(w_at, mask=(k < depth - done)[:, None] & there, other=0.0)
            else:
                right = tl.load(w_at) if EVEN_COLUMNS else tl.load(w_at, mask=there, other=0.0)
            w_at += BLOCK_K * columns if TRANSPOSED else BLOCK_K
        acc = _product(left, right, acc, PRECISION)
    to = y + start * columns + within[:, None] * columns + column[None, :]
    tl.store(to, narrow(acc, y.dtype.element_ty), mask=real[:, None] & there)


@jit
def _weights_kernel(  # type: ignore[no-untyped-def]
    grad, x, out, pair_R, counts_E, starts_E, outputs, inputs,
    TOP_K: tl.constexpr, GATHER_GRAD: tl.constexpr, GATHER_X: tl.constexpr, EVEN_A: tl.constexpr, EVEN_B: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    blocks_a, blocks_b = tl.cdiv(outputs, BLOCK_A), tl.cdiv(inputs, BLOCK_B)
    expert = tl.program_id(0) // (blocks_a * blocks_b)
    block_a, block_b = ordered(tl.program_id(0) % (blocks_a * blocks_b), blocks_a, blocks_b, GROUP)
    count, start = tl.load(counts_E + expert), tl.load(starts_E + expert).to(tl.int64)
    a = block_a * BLOCK_A + tl.arange(0, BLOCK_A)
    b = block_b * BLOCK_B + tl.arange(0, BLOCK_B)
    there_a, there_b = (a < outputs)[None, :], (b < inputs)[None, :]
    row = start + tl.arange(0, BLOCK_R)
    grad_at = grad + a[None, :] if GATHER_GRAD else grad + row[:, None] * outputs + a[None, :]
    x_at = x + b[None, :] if GATHER_X else x + row[:, None] * inputs + b[None, :]
    to = out + (expert.to(tl.int64) * outputs + block_a * BLOCK_A) * inputs + block_b * BLOCK_B
    to += tl.arange(0, BLOCK_A)[:, None] * inputs + tl.arange(0, BLOCK_B)[None, :]
    inside = tl.trans(there_a) & there_b
    acc = tl.zeros((BLOCK_A, BLOCK_B), dtype=tl.float32)
    if ADD:  # at the start: at the end it would take as many registers again
        acc = tl.load(to, mask=inside, other=0.0).to(tl.float32)
    # Whole steps without masks, which would cost a quarter of the time; then the rest.
    whole = count // BLOCK_R * BLOCK_R
    for done in range(0, whole, BLOCK_R):
        if GATHER_GRAD or GATHER_X:
            token = (tl.load(pair_R + row + done) // TOP_K).to(tl.int64)[:, None]
        left_at = grad_at + token * outputs if GATHER_GRAD else grad_at
        right_at = x_at + token * inputs if GATHER_X else x_at
        left = tl.load(left_at) if EVEN_A else tl.load(left_at, mask=there_a, other=0.0)
        right = tl.load(right_at) if EVEN_B else tl.load(right_at, mask=there_b, other=0.0)
        acc = _product(tl.trans(left), right, acc, PRECISION)
        if not GATHER_GRAD:
            grad_at += BLOCK_R * outputs
        if not GATHER_X:
            x_at += BLOCK_R * inputs
    for done in tl.range(whole, count, BLOCK_R, num_stages=1):
        real = done + tl.arange(0, BLOCK_R) < count
        if GATHER_GRAD or GATHER_X:
            token = (tl.load(pair_R + row + done, mask=real, other=0) // TOP_K).to(tl.int64)[:, None]
        left_at = grad_at + token * outputs if GATHER_GRAD else grad_at
        right_at = x_at + token * inputs if GATHER_X else x_at
        left = tl.load(left_at, mask=real[:, None] & there_a, other=0.0)
        right = tl.load(right_at, mask=real[:, None] & there_b, other=0.0)
        acc = _product(tl.trans(left), right, acc, PRECISION)
    tl.store(to, narrow(acc, out.dtype.element_ty), mask=inside)
