"""Partial rotary position embedding, half-split form (Ling 2.0 §2.1): the first R elements of a head turn, the rest
pass.

Shapes: B batch, S sequence, H heads, C head width, R rotated elements.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def rotary_frequencies(rotary_dim: int, theta: float) -> Tensor:
    """`theta^(-2i/R)`, radians per position, float32 (R/2)."""
    return torch.pow(theta, -torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def yarn_frequencies(
    rotary_dim: int, theta: float, factor: float, original_length: int, beta_fast: float = 32, beta_slow: float = 1
) -> Tensor:
    """The frequencies stretched to a context `factor` times as long (YaRN §3.2, arXiv 2309.00071), float32 (R/2).

    Elements that turn more than `beta_fast` times in the original context stay; those that turn less than `beta_slow`
    times are slowed by `factor`; between the two, a ramp over the element's index.
    """

    def index_of(turns: float) -> float:
        return rotary_dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(index_of(beta_fast)), 0), min(math.ceil(index_of(beta_slow)), rotary_dim - 1)
    width = max(last - first, 1e-3)  # never a division by zero
    slowed = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    frequencies = rotary_frequencies(rotary_dim, theta)
    return frequencies * (1 - slowed) + frequencies / factor * slowed


def yarn_scale(factor: float) -> float:
    """What YaRN multiplies cos and sin by, so that attention stays as sharp over a longer context (YaRN §3.4)."""
    return 0.1 * math.log(factor) + 1.0


def rotary_tables(positions: Tensor, frequencies: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """scale·(cos, sin) of shape `positions.shape + (R/2,)`, float32."""
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies.to(positions.device)
    return angles.cos() * scale, angles.sin() * scale


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
