"""What is compiled ahead of time, a file per group of operations: launchers at published shapes, on meta tensors."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ling_flow.kernels.row_map import RowMap, rows_bound, tiles_bound
from ling_flow.kernels.shapes import MoEShape

SHARED_LIMIT = 227 * 1024  # bytes of shared memory a block may have on sm_90


@dataclass(frozen=True)
class Case:
    """`launch` calls one Triton launcher. `wgmma`: its kernels multiply matrices, and must use
    Hopper's warp-group matrix instructions for it."""

    name: str
    launch: Callable[[], object]
    wgmma: bool = False


def all_cases() -> Iterator[Case]:
    """Those of every module here."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        yield from importlib.import_module(module.name).cases()


def meta_map(shape: MoEShape) -> RowMap:
    """The index map of a shape: types and sizes."""

    def ints(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.int32, device="meta")

    tiles = tiles_bound(shape.pairs, shape.experts)
    return RowMap(
        *(ints(shape.experts) for _ in range(3)),
        place_TK=ints(shape.tokens, shape.top_k),
        pair_R=ints(rows_bound(shape.pairs, shape.experts)),
        tile_expert_M=ints(tiles),
        tile_start_M=ints(tiles),
        tile_rows_M=ints(tiles),
    )
