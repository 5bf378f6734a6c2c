"""Where each (token, choice) pair lies among the rows that the experts work on: an index map, not a padded copy.

The rows of an expert are contiguous and begin at a multiple of 16, as torch's `grouped_mm` needs them where it sums
over rows (Ling 2.0 §5.2 pads the routing map to 16 as well). A row of padding belongs to no token.

On CUDA it is a counting sort without a sort: blocks of tokens count their pairs per expert, then each pair's place is
its expert's start + those of earlier blocks + those of earlier tokens of its own. Two kernels, deterministic, and the
host waits for nothing.

Limits of the kernels: at most 2^31 pairs; they compare every pair with every expert, which is nothing beside the
experts' products up to about 1,000 experts. A token's experts must be distinct, and `counts_E` theirs.

Shapes: T tokens, K chosen, E experts, R rows (padding included), M tiles of at most 128 rows of one expert, N pairs,
B blocks of tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ling_flow.kernels._triton import ceil_div, jit, next_power_of_2, tl

ALIGN = 16  # rows of an expert begin at a multiple of this
TILE = 128  # rows of a tile: of the matrix products, and of FP8 scales along the rows
MASK = 8192  # (token, expert) pairs that a program of the map's kernels holds at a time: 16 a thread
BLOCKS = 128  # of tokens, at most: each adds up what those before it counted


@dataclass(frozen=True)
class RowMap:
    """All on the device of the indices, int32, made without waiting for the device: R and M are upper bounds."""

    counts_E: Tensor  # rows of each expert, padding aside
    starts_E: Tensor  # its first row
    tiles_E: Tensor  # its first tile
    place_TK: Tensor  # row of each pair
    pair_R: Tensor  # pair t·K + k of each row, -1 in padding
    tile_expert_M: Tensor  # expert of each tile; -1 past the last one
    tile_start_M: Tensor  # first row of each tile; of a tile past the last one, 0
    tile_rows_M: Tensor  # rows of each tile, padding aside: 128, less in the last of an expert, 0 past the last one

    @property
    def top_k(self) -> int:
        return self.place_TK.shape[1]

    @property
    def rows(self) -> int:
        """R."""
        return len(self.pair_R)

    def filled(self) -> list[tuple[int, slice]]:
        """The experts that have rows, and those rows. Waits for the device: for definitions, not for kernels."""
        spans = zip(self.starts_E.tolist(), self.counts_E.tolist(), strict=True)
        return [(expert, slice(start, start + count)) for expert, (start, count) in enumerate(spans) if count]

    def tokens(self, rows: slice) -> Tensor:
        """The token of each of these rows, none of them padding."""
        return self.pair_R[rows].long() // self.top_k


def rows_bound(pairs: int, experts: int) -> int:
    """R: room for `pairs` rows whatever the routing, a multiple of 16."""
    return -(-(pairs + experts * (ALIGN - 1)) // ALIGN) * ALIGN


def tiles_bound(pairs: int, experts: int) -> int:
    """M: room for the tiles of `pairs` rows whatever the routing."""
    return pairs // TILE + min(experts, pairs)


def row_map_reference(indices_TK: Tensor, counts_E: Tensor) -> RowMap:
    """The definition: pairs in order of (expert, token).

    Args:
        indices_TK: the chosen experts; a token's are distinct.
        counts_E: how many pairs chose each expert, int32 or int64.
    """
    device, experts = indices_TK.device, len(counts_E)
    counts_E = counts_E.to(torch.int32)
    padded_E = (counts_E + ALIGN - 1) // ALIGN * ALIGN
    starts_E = padded_E.cumsum(0, dtype=torch.int32) - padded_E
    expert_N = indices_TK.flatten().long()
    order_N = expert_N.argsort(stable=True)
    dense_E = (counts_E.cumsum(0) - counts_E).to(torch.int32)
    row_N = torch.arange(len(order_N), dtype=torch.int32, device=device) + (starts_E - dense_E)[expert_N[order_N]]
    place_N = torch.empty_like(row_N).index_copy_(0, order_N, row_N)
    pair_R = torch.full((rows_bound(len(order_N), experts),), -1, dtype=torch.int32, device=device)
    pair_R.index_copy_(0, row_N.long(), order_N.to(torch.int32))
    return _with_tiles(counts_E, starts_E, place_N.view_as(indices_TK), pair_R)


def _with_tiles(counts_E: Tensor, starts_E: Tensor, place_TK: Tensor, pair_R: Tensor) -> RowMap:
    of_expert_E = (counts_E + TILE - 1) // TILE
    ends_E = of_expert_E.cumsum(0, dtype=torch.int32)
    tiles_E = ends_E - of_expert_E
    tile_M = torch.arange(tiles_bound(place_TK.numel(), len(counts_E)), dtype=torch.int32, device=counts_E.device)
    expert_M = torch.searchsorted(ends_E, tile_M, right=True, out_int32=True)
    used_M = expert_M < len(counts_E)
    expert_M = expert_M.clamp(max=len(counts_E) - 1)
    before_M = (tile_M - tiles_E[expert_M]) * TILE
    return RowMap(
        counts_E=counts_E,
        starts_E=starts_E,
        tiles_E=tiles_E,
        place_TK=place_TK,
        pair_R=pair_R,
        tile_expert_M=torch.where(used_M, expert_M, -1),
        tile_start_M=torch.where(used_M, starts_E[expert_M] + before_M, 0),
        tile_rows_M=torch.where(used_M, (counts_E[expert_M] - before_M).clamp(max=TILE), 0),
    )


@functools.lru_cache(maxsize=16)
def dense_map(tokens: int, device: torch.device | str) -> RowMap:
    """All tokens in one group, in order: a plain matrix product is a grouped one with this map."""
    counts_E = torch.full((1,), tokens, dtype=torch.int32, device=device)
    row_N = torch.arange(tokens, dtype=torch.int32, device=device)
    pair_R = torch.full((rows_bound(tokens, 1),), -1, dtype=torch.int32, device=device)
    pair_R[:tokens] = row_N
    return _with_tiles(counts_E, torch.zeros_like(counts_E), row_N.view(-1, 1), pair_R)


# Dispatch


def row_map(indices_TK: Tensor, counts_E: Tensor) -> RowMap:
    """The index map of what a router chose: `counts_E[e]` pairs chose expert e, a token's experts are distinct."""
    if indices_TK.is_cuda:
        return row_map_triton(indices_TK, counts_E)
    return row_map_reference(indices_TK, counts_E)


# Triton


def row_map_triton(indices_TK: Tensor, counts_E: Tensor) -> RowMap:
    (tokens, top_k), experts, device = indices_TK.shape, len(counts_E), indices_TK.device
    indices_TK, counts_E = indices_TK.contiguous(), counts_E.contiguous()

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    rows, tiles = rows_bound(tokens * top_k, experts), tiles_bound(tokens * top_k, experts)
    found = RowMap(
        counts_E=ints(experts),
        starts_E=ints(experts),
        tiles_E=ints(experts),
        place_TK=ints(tokens, top_k),
        pair_R=ints(rows),
        tile_expert_M=ints(tiles),
        tile_start_M=ints(tiles),
        tile_rows_M=ints(tiles),
    )
    width = next_power_of_2(max(experts, 16))
    step = max(MASK // width, 1)
    steps = max(ceil_div(tokens, step * BLOCKS), 1)
    blocks = ceil_div(tokens, step * steps)
    counts_BE = ints(blocks, experts)
    layout = max(ceil_div(tiles, step), 1)
    _count_kernel[(blocks + layout + ceil_div(rows, MASK),)](
        indices_TK, counts_BE, counts_E, found.counts_E, found.starts_E, found.tiles_E, found.tile_expert_M,
        found.tile_start_M, found.tile_rows_M, found.pair_R, tokens, experts, tiles, rows, blocks, layout, steps,
        K=top_k, E=width, BLOCK=step, ALIGN=ALIGN, TILE=TILE, MASK=MASK, num_warps=16,
    )  # fmt: skip
    if tokens:
        _place_kernel[(blocks,)](
            indices_TK, counts_BE, found.starts_E, found.place_TK, found.pair_R, tokens, experts, steps,
            K=top_k, E=width, BLOCK=step, num_warps=16,
        )  # fmt: skip
    return found


@jit
def _count_kernel(  # type: ignore[no-untyped-def]
    indices, counts_BE, given_E, counts_E, starts_E, tiles_E, tile_expert_M, tile_start_M, tile_rows_M, pair_R,
    tokens, experts, tiles, rows, blocks, layout, steps,
    K: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    # The first programs count; others, meanwhile, lay out the experts, and fill pair_R with -1.
    block = tl.program_id(0)
    if block < blocks:
        e = tl.arange(0, E)
        count = tl.zeros((E,), tl.int32)
        for step in range(steps):
            token = (block * steps + step) * BLOCK + tl.arange(0, BLOCK)
            count += tl.sum(_chosen(indices, token, tokens, K, E, BLOCK), 0)
        tl.store(counts_BE + block * experts + e, count, mask=e < experts)
    elif block < blocks + layout:
        _layout(
            given_E, counts_E, starts_E, tiles_E, tile_expert_M, tile_start_M, tile_rows_M, block - blocks, experts,
            tiles, E, BLOCK, ALIGN, TILE,
        )  # fmt: skip
    else:
        row = (block - blocks - layout) * MASK + tl.arange(0, MASK)
        tl.store(pair_R + row, tl.full((MASK,), -1, tl.int32), mask=row < rows)


@jit
def _layout(  # type: ignore[no-untyped-def]
    given_E, counts_E, starts_E, tiles_E, tile_expert_M, tile_start_M, tile_rows_M, block, experts, tiles,
    E: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Starts and tiles of the experts, and `BLOCK` of the tiles."""
    e = tl.arange(0, E)
    count = tl.load(given_E + e, mask=e < experts, other=0).to(tl.int32)
    padded, of_expert = (count + ALIGN - 1) // ALIGN * ALIGN, (count + TILE - 1) // TILE
    ends = tl.cumsum(of_expert, 0)
    if block == 0:
        tl.store(counts_E + e, count, mask=e < experts)
        tl.store(starts_E + e, tl.cumsum(padded, 0) - padded, mask=e < experts)
        tl.store(tiles_E + e, ends - of_expert, mask=e < experts)
    tile = block * BLOCK + tl.arange(0, BLOCK)
    before = (ends[None, :] <= tile[:, None]) & (e < experts)[None, :]  # experts whose tiles are all before this one
    expert = tl.sum(before.to(tl.int32), 1)
    used = expert < experts
    rows_before = (tile - tl.sum(tl.where(before, of_expert[None, :], 0), 1)) * TILE
    start = tl.sum(tl.where(before, padded[None, :], 0), 1) + rows_before
    left = tl.load(given_E + expert, mask=used, other=0).to(tl.int32) - rows_before
    tl.store(tile_expert_M + tile, tl.where(used, expert, -1), mask=tile < tiles)
    tl.store(tile_start_M + tile, tl.where(used, start, 0), mask=tile < tiles)
    tl.store(tile_rows_M + tile, tl.where(used, tl.minimum(left, TILE), 0), mask=tile < tiles)


@jit
def _chosen(indices, token, tokens, K: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 where a token chose an expert, int32 (BLOCK, E)."""
    chosen = tl.zeros((BLOCK, E), dtype=tl.int32)
    for k in tl.static_range(K):
        index = tl.load(indices + token * K + k, mask=token < tokens, other=-1).to(tl.int32)
        chosen += (index[:, None] == tl.arange(0, E)[None, :]).to(tl.int32)
    return chosen


@jit
def _place_kernel(  # type: ignore[no-untyped-def]
    indices, counts_BE, starts_E, place, pair_R, tokens, experts, steps,
    K: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, e = tl.program_id(0), tl.arange(0, E)
    first = tl.load(starts_E + e, mask=e < experts, other=0)
    for start in range(0, block, 16):
        earlier = start + tl.arange(0, 16)
        inside = (earlier < block)[:, None] & (e < experts)[None, :]
        first += tl.sum(tl.load(counts_BE + earlier[:, None] * experts + e[None, :], mask=inside, other=0), 0)
    for step in range(steps):
        token = (block * steps + step) * BLOCK + tl.arange(0, BLOCK)
        chosen = _chosen(indices, token, tokens, K, E, BLOCK)
        row = first[None, :] + tl.cumsum(chosen, 0) - chosen
        for k in tl.static_range(K):
            index = tl.load(indices + token * K + k, mask=token < tokens, other=-1).to(tl.int32)
            at = tl.sum(tl.where(index[:, None] == e[None, :], row, 0), 1)
            tl.store(place + token * K + k, at, mask=token < tokens)
            tl.store(pair_R + at, token * K + k, mask=token < tokens)
        first += tl.sum(chosen, 0)
