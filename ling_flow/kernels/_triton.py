"""What the Triton kernels share: the import, and arithmetic that is right under Triton's interpreter too.

Triton is imported only where a kernel can run or be compiled: with a CUDA device, under its interpreter
(TRITON_INTERPRET=1, tests on a CPU), or for compilation alone (LING_FLOW_TRITON=compile). Elsewhere the kernels are
names that say so when they are launched.

The interpreter holds bfloat16 as bare 16-bit integers and rounds wrongly to it and to FP8 (triton#11584, #8322).
Kernels therefore widen to float32 straight after a load, multiply matrices with `dot`, and narrow with `narrow`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "AVAILABLE",
    "INTERPRETED",
    "ceil_div",
    "describable",
    "described",
    "dot",
    "jit",
    "narrow",
    "next_power_of_2",
    "tl",
]

INSTALLED = importlib.util.find_spec("triton") is not None
AVAILABLE = INSTALLED and (
    torch.cuda.is_available()
    or os.environ.get("TRITON_INTERPRET") == "1"
    or os.environ.get("LING_FLOW_TRITON") == "compile"
)

if AVAILABLE:
    import triton
    import triton.language as tl

    def jit(function: Callable[..., Any]) -> Any:
        """A kernel whose every launch fuses multiplication and addition, as the files' figures hold: from Triton 3.10
        on that is no longer the default."""
        kernel = triton.jit(function)

        def run(*args: Any, **options: Any) -> Any:
            return type(kernel).run(kernel, *args, **options, enable_fp_fusion=True)

        kernel.run = run
        return kernel

else:

    class _Missing:
        """Stands for triton.language in the bodies of kernels that cannot run."""

        def constexpr(self, value: Any) -> Any:
            return value

    class _Kernel:
        def __init__(self, function: Callable[..., Any]) -> None:
            self.name = function.__name__

        def __getitem__(self, grid: Any) -> Any:
            wanted = "a CUDA device, or TRITON_INTERPRET=1" if INSTALLED else "Triton, which is not installed"
            raise RuntimeError(f"{self.name} is a Triton kernel: it needs {wanted}")

    tl: Any = _Missing()  # type: ignore[no-redef]
    jit = _Kernel

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def ceil_div(value: int, by: int) -> int:
    """Rounded up."""
    return -(-value // by)


def next_power_of_2(value: int) -> int:
    """The least power of two that is not below `value`, at least 1."""
    return 1 << max(value - 1, 0).bit_length()


def describable(matrix: torch.Tensor) -> bool:
    """Whether the copy engine (TMA) can read blocks of this matrix: rows begin at multiples of 16 bytes."""
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
    return matrix.numel() > 0 and matrix.stride(1) == 1 and aligned


def described(matrix: torch.Tensor, rows: int, columns: int) -> Any:
    """The matrix as a kernel's argument of which blocks of this size are read with `load([row, column])`: by the copy
    engine on Hopper and later. What lies outside the matrix reads as zero."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


@jit
def narrow(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 → `dtype` (bfloat16, float8e4nv, float16, float32), to nearest, ties to even. FP8 saturates."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
        elif dtype == tl.float8e4nv:
            # The grid has 3 bits of fraction, and a spacing of 2^-9 below 2^-6.
            bits = x.to(tl.int32, bitcast=True)
            rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
            small = ((tl.abs(x) + 24576.0) - 24576.0).to(tl.int32, bitcast=True) | (bits & -0x80000000)
            small = small.to(tl.float32, bitcast=True)
            x = tl.where(x == x, tl.where(tl.abs(x) < 0.015625, small, rounded), x)
            x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    return x.to(dtype)


@jit
def dot(a, b, acc):  # type: ignore[no-untyped-def]
    """acc + a·b, float32 accumulation."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        return acc + tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b, acc)
