"""The index map of the experts' rows: kernels against the definition exactly, the definition against a loop."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from ling_flow.kernels.row_map import ALIGN, TILE, RowMap, dense_map, row_map_reference, row_map_triton
from ling_flow.kernels.shapes import SMALL, MoEShape, route

MORE = (
    MoEShape("several blocks of tokens", 300, 1, 1, 256, 8, "skewed"),
    MoEShape("512 experts", 50, 1, 1, 512, 10),
    MoEShape("3 experts", 1000, 1, 1, 3, 1, "skewed"),
    MoEShape("all experts", 70, 1, 1, 6, 6),
)


def same(found: RowMap, expected: RowMap) -> None:
    for field in fields(RowMap):
        mine, theirs = getattr(found, field.name), getattr(expected, field.name)
        assert mine.dtype == theirs.dtype == torch.int32, field.name
        assert torch.equal(mine, theirs), field.name


@pytest.mark.parametrize("shape", (*SMALL, *MORE), ids=lambda shape: shape.name)
def test_kernels_equal_the_definition(shape: MoEShape, device: torch.device) -> None:
    routing = route(shape, device)
    expected = row_map_reference(routing.indices_TK, routing.counts_E)
    same(row_map_triton(routing.indices_TK, routing.counts_E), expected)
    same(row_map_triton(routing.indices_TK.int(), routing.counts_E.int()), expected)


@pytest.mark.parametrize("shape", (*SMALL, *MORE), ids=lambda shape: shape.name)
def test_the_definition_is_a_loop_over_experts(shape: MoEShape) -> None:
    indices, _, counts = route(shape)
    found = row_map_reference(indices, counts)
    row = tile = 0
    pairs: list[int] = []
    for expert in range(shape.experts):
        assert (found.starts_E[expert], found.tiles_E[expert]) == (row, tile)
        mine = [pair for pair, chosen in enumerate(indices.flatten().tolist()) if chosen == expert]
        assert found.pair_R[row : row + len(mine)].tolist() == mine
        for first in range(0, len(mine), TILE):
            assert found.tile_expert_M[tile] == expert
            assert found.tile_start_M[tile] == row + first
            assert found.tile_rows_M[tile] == min(len(mine) - first, TILE)
            tile += 1
        padded = -(-len(mine) // ALIGN) * ALIGN
        assert (found.pair_R[row + len(mine) : row + padded] == -1).all()
        row += padded
        pairs += mine
    assert sorted(pairs) == list(range(shape.pairs))
    assert (found.pair_R[row:] == -1).all()
    assert (found.tile_expert_M[tile:] == -1).all()
    assert (found.tile_rows_M[tile:] == 0).all()
    assert torch.equal(found.pair_R[found.place_TK.flatten().long()], torch.arange(shape.pairs, dtype=torch.int32))


@pytest.mark.parametrize("tokens", [0, 1, 128, 300])
def test_a_dense_map_is_that_of_one_expert(tokens: int) -> None:
    one = row_map_reference(torch.zeros(tokens, 1, dtype=torch.int64), torch.tensor([tokens]))
    same(dense_map(tokens, "cpu"), one)
