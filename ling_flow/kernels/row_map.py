"""Where each (token, choice) pair lies among the rows that the experts work on: an index map, not a padded copy.

The rows of an expert are contiguous and begin at a multiple of 16, so that a transposed FP8 operand can be read 16
bytes at a time (Ling 2.0 §5.2 pads the routing map to 16 for the same reason). A row of padding belongs to no token.

Shapes: T tokens, K chosen, E experts, R rows (padding included), M tiles of at most 128 rows of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN = 16  # rows of an expert begin at a multiple of this
TILE = 128  # rows of a tile: of the matrix products, and of FP8 scales along the rows


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


def dense_map(tokens: int, device: torch.device | str) -> RowMap:
    """All tokens in one group, in order: a plain matrix product is a grouped one with this map."""
    counts_E = torch.full((1,), tokens, dtype=torch.int32, device=device)
    row_N = torch.arange(tokens, dtype=torch.int32, device=device)
    pair_R = torch.full((rows_bound(tokens, 1),), -1, dtype=torch.int32, device=device)
    pair_R[:tokens] = row_N
    return _with_tiles(counts_E, torch.zeros_like(counts_E), row_N.view(-1, 1), pair_R)
