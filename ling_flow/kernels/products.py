"""Products of bfloat16 matrices on a CPU that has no bfloat16 arithmetic, where torch takes them element by element.

There the operands are widened: float32 holds the same numbers, a product of two of them is exact in it, and sums are
held in float32 either way, so that only the order of the sums differs. What is kept for a backward pass stays bfloat16.

Shapes: T tokens, A outputs, B inputs; those of `matmul` are torch's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@cache
def cpu_has_bfloat16() -> bool:
    """Whether torch's library of products has code for bfloat16 on this processor (it needs AVX-512 or its like)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def slow(tensor: Tensor) -> bool:
    """Whether products of such tensors are better taken in float32."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not cpu_has_bfloat16()


def linear(x: Tensor, weight_AB: Tensor) -> Tensor:
    """x · weightᵀ (…, A) in the type of x."""
    weight_AB = weight_AB.to(x.dtype)
    if slow(x):
        y: Tensor = _WideLinear.apply(x.flatten(0, -2), weight_AB)
        return y.unflatten(0, x.shape[:-1])
    return functional.linear(x, weight_AB)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """`torch.matmul`; on a processor as above without a gradient."""
    if slow(left):
        return (left.float() @ right.float()).to(left.dtype)
    return left @ right


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TB: Tensor, weight_AB: Tensor) -> Tensor:
        ctx.save_for_backward(x_TB, weight_AB)
        return matmul(x_TB, weight_AB.T)

    @staticmethod
    def backward(ctx: Any, grad_TA: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TB, weight_AB = ctx.saved_tensors
        grad_x_TB = matmul(grad_TA, weight_AB) if ctx.needs_input_grad[0] else None
        return grad_x_TB, matmul(grad_TA.T, x_TB) if ctx.needs_input_grad[1] else None
