"""Comparisons to the bit that several test files make."""

from __future__ import annotations

import torch
from torch import Tensor

from ling_flow.kernels.fp8 import Quantized
from ling_flow.kernels.row_map import TILE, RowMap


def same_by_columns(found: Quantized, expected: Quantized, row_map: RowMap) -> None:
    """Values and scales of the tiles that have rows; what lies in the others is undefined."""
    used_X = row_map.tile_rows_M > 0

    def bytes_of(part: Quantized) -> Tensor:
        return part.values.view(torch.uint8).unflatten(1, (-1, TILE))[:, used_X]

    assert found.values.shape == expected.values.shape
    assert torch.equal(bytes_of(found), bytes_of(expected))
    assert torch.equal(found.scales[used_X], expected.scales[used_X])
