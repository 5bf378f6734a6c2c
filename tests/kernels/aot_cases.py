"""What is compiled ahead of time: one case per operation and published shape, launched on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ling_flow.kernels import fp8
from ling_flow.kernels.row_map import RowMap, rows_bound, tiles_bound
from ling_flow.kernels.shapes import PUBLISHED, MoEShape, normal

CASES: dict[str, Callable[[], object]] = {}


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


def _fp8_cases(shape: MoEShape) -> None:
    def x(rows: int, columns: int) -> torch.Tensor:
        return normal((rows, columns), torch.bfloat16, "meta")

    row_map = meta_map(shape)
    tokens, hidden, rows = shape.tokens, shape.hidden, row_map.rows
    weight = normal((shape.experts, 2 * shape.width, hidden), torch.bfloat16, "meta")
    CASES[f"quantize rows, {shape.name}"] = lambda: fp8.quantize_rows_triton(x(tokens, hidden))
    CASES[f"quantize columns, {shape.name}"] = lambda: fp8.quantize_tiles_triton(
        x(tokens, hidden), row_map, gather=True, by_rows=False
    )
    CASES[f"quantize both, {shape.name}"] = lambda: fp8.quantize_tiles_triton(
        x(rows, 2 * shape.width), row_map, gather=False, by_rows=True
    )
    CASES[f"quantize blocks, {shape.name}"] = lambda: fp8.quantize_blocks_triton(weight)
    CASES[f"transpose blocks, {shape.name}"] = lambda: fp8.transpose_blocks_triton(
        fp8.Quantized(
            weight.to(fp8.STORED), normal((shape.experts, 2 * shape.width // 128, hidden // 128), torch.float32, "meta")
        )
    )


for _shape in PUBLISHED:
    if _shape.load == "balanced":
        _fp8_cases(_shape)
