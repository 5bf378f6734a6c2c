"""Partial rotary position embedding, half-split form (Ling 2.0 §2.1): the first R elements of a head turn, the rest
pass.

Shapes: B batch, S sequence, H heads, C head width, R rotated elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin) of shape `positions.shape + (R/2,)`, float32; wavelengths from `theta^(-2i/R)`."""
    exponents = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim
    angles = positions.to(torch.float32).unsqueeze(-1) * torch.pow(theta, -exponents)
    return angles.cos(), angles.sin()


def rotate_(x_BSHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + R/2) of each head, in place; `cos`, `sin` broadcast to (B, S, H, R/2)."""
    return _Rotate.apply(x_BSHC, cos.to(x_BSHC.dtype), sin.to(x_BSHC.dtype))


class _Rotate(torch.autograd.Function):
    # A rotation is its own inverse with the angle reversed: nothing of the input is kept, and no copy is made.
    @staticmethod
    def forward(ctx: Any, x_BSHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.mark_dirty(x_BSHC)
        ctx.save_for_backward(cos, sin)
        return _turn(x_BSHC, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad_BSHC: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad_BSHC.clone(), cos, -sin), None, None


def _turn(x_BSHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x_BSHC[..., :half], x_BSHC[..., half : 2 * half]
    old_first = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(old_first, sin)
    return x_BSHC
