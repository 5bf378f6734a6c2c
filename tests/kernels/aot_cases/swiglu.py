"""SwiGLU: plain, weighted, and fused with quantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ling_flow.kernels import swiglu, swiglu_quantise
from ling_flow.kernels.shapes import PUBLISHED, MoEShape, normal, route
from tests.kernels.aot_cases import Case, meta_map


def cases() -> Iterator[Case]:
    for shape in PUBLISHED:
        if shape.load == "balanced":
            yield from _of(shape)


def _of(shape: MoEShape) -> Iterator[Case]:
    row_map = meta_map(shape)
    z_R2F = normal((row_map.rows, 2 * shape.width), torch.bfloat16, "meta")
    grad_RF = normal((row_map.rows, shape.width), torch.bfloat16, "meta")
    p_TK = route(shape, "meta").weights_TK

    def case(name: str, launch: Callable[[], object]) -> Case:
        return Case(f"{name}, {shape.name}", launch)

    yield case("swiglu", lambda: swiglu.swiglu_triton(z_R2F))
    yield case("swiglu backward", lambda: swiglu.swiglu_backward_triton(z_R2F, grad_RF))
    yield case("swiglu weighted", lambda: swiglu.swiglu_triton(z_R2F, p_TK, row_map))
    yield case("swiglu weighted backward", lambda: swiglu.swiglu_backward_triton(z_R2F, grad_RF, p_TK, row_map))
    for by_columns in (False, True):
        yield case(
            f"swiglu quantize by {'columns' if by_columns else 'rows'}",
            lambda by_columns=by_columns: swiglu_quantise.swiglu_quantize_triton(z_R2F, p_TK, row_map, by_columns),
        )
    yield case(
        "swiglu quantize backward",
        lambda: swiglu_quantise.swiglu_quantize_backward_triton(z_R2F, grad_RF, p_TK, row_map),
    )
