"""Blockwise FP8 quantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ling_flow.kernels import fp8
from ling_flow.kernels.shapes import PUBLISHED, MoEShape, normal
from tests.kernels.aot_cases import Case, meta_map


def cases() -> Iterator[Case]:
    for shape in PUBLISHED:
        if shape.load == "balanced":
            yield from _of(shape)


def _of(shape: MoEShape) -> Iterator[Case]:
    def x(rows: int, columns: int) -> torch.Tensor:
        return normal((rows, columns), torch.bfloat16, "meta")

    row_map = meta_map(shape)
    tokens, hidden, rows = shape.tokens, shape.hidden, row_map.rows
    weight = normal((shape.experts, 2 * shape.width, hidden), torch.bfloat16, "meta")
    scales = normal((shape.experts, 2 * shape.width // 128, hidden // 128), torch.float32, "meta")

    def case(name: str, launch: Callable[[], object]) -> Case:
        return Case(f"{name}, {shape.name}", launch)

    yield case("quantize rows", lambda: fp8.quantize_rows_triton(x(tokens, hidden)))
    yield case("quantize columns", lambda: fp8.quantize_columns_triton(x(tokens, hidden), row_map, True))
    yield case("quantize both", lambda: fp8.quantize_both_triton(x(rows, 2 * shape.width), row_map))
    yield case("quantize blocks", lambda: fp8.quantize_blocks_triton(weight))
    yield case(
        "transpose blocks",
        lambda: fp8.transpose_blocks_triton(fp8.Quantized(weight.to(fp8.STORED), scales)),
    )
