"""Tokens to the rows of their experts and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ling_flow.kernels import unpermute
from ling_flow.kernels.shapes import PUBLISHED, MoEShape, normal, route
from tests.kernels.aot_cases import Case, meta_map


def cases() -> Iterator[Case]:
    for shape in PUBLISHED:
        if shape.load == "balanced":
            yield from _of(shape)


def _of(shape: MoEShape) -> Iterator[Case]:
    row_map = meta_map(shape)
    x_TD = normal((shape.tokens, shape.hidden), torch.bfloat16, "meta")
    y_RD = normal((row_map.rows, shape.hidden), torch.bfloat16, "meta")
    weights_TK = route(shape, "meta").weights_TK

    def case(name: str, launch: Callable[[], object]) -> Case:
        return Case(f"{name}, {shape.name}", launch)

    yield case("gather rows", lambda: unpermute.gather_rows_triton(x_TD, row_map))
    yield case("sum rows", lambda: unpermute.sum_rows_triton(y_RD, row_map))
    yield case("weighted sum rows", lambda: unpermute.sum_rows_triton(y_RD, row_map, weights_TK))
    yield case(
        "weighted sum rows backward",
        lambda: unpermute.weighted_sum_rows_backward_triton(x_TD, y_RD, weights_TK, row_map),
    )
