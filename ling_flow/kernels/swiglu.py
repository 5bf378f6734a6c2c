"""SwiGLU: `silu(gate) · up` on a fused projection [gate | up].

Shapes: N rows (any leading dimensions), F width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """(…, 2F) → (…, F)."""
    return _SwiGLU.apply(gate_up_N2F)


def swiglu_forward(gate_up_N2F: Tensor) -> Tensor:
    """`swiglu` without a record for the backward pass."""
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    return functional.silu(gate_NF).mul_(up_NF)


def swiglu_backward(gate_up_N2F: Tensor, grad_NF: Tensor) -> Tensor:
    """Gradient of `swiglu` with respect to its input."""
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    grad_N2F = torch.empty_like(gate_up_N2F)
    grad_gate_NF, grad_up_NF = grad_N2F.chunk(2, dim=-1)
    torch.mul(grad_NF, functional.silu(gate_NF), out=grad_up_NF)
    torch.ops.aten.silu_backward.grad_input(grad_NF * up_NF, gate_NF, grad_input=grad_gate_NF)
    return grad_N2F


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_N2F: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_N2F)
        return swiglu_forward(gate_up_N2F)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> Tensor:
        return swiglu_backward(ctx.saved_tensors[0], grad_NF)
