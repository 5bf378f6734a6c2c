"""RMSNorm at the published widths, over heads, and with FP8."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ling_flow.kernels import rms_norm
from ling_flow.kernels.shapes import normal
from tests.kernels.aot_cases import Case

# Hidden sizes of mini, flash and 1T, a head, and the widest row.
SIZES = ((32768, 2048), (16384, 4096), (8192, 8192), (524288, 128), (4096, 16384))


def cases() -> Iterator[Case]:
    for rows, width in SIZES:
        x_ND, weight_D = normal((rows, width), torch.bfloat16, "meta"), normal((width,), torch.bfloat16, "meta")
        yield from _of(x_ND, weight_D)


def _of(x_ND: torch.Tensor, weight_D: torch.Tensor) -> Iterator[Case]:
    rows, width = x_ND.shape
    rstd_N = normal((rows,), torch.float32, "meta")
    for name, options in (
        ("rms norm", {"quantize": False}),
        ("rms norm quantize", {"quantize": True}),
        ("rms norm quantize alone", {"quantize": True, "keep": False}),
    ):
        yield Case(
            f"{name}, {rows}x{width}",
            lambda options=options: rms_norm.rms_norm_triton(x_ND, weight_D, 1e-6, **options),
        )
    if width > 8192:  # spills a little, as its file says
        return
    yield Case(
        f"rms norm backward, {rows}x{width}",
        lambda: rms_norm.rms_norm_backward_triton(x_ND, x_ND, weight_D, rstd_N),
    )
