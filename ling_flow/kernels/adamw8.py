"""AdamW whose two moments take 8 bits each, with a float32 scale per block of 256 elements (8-bit optimizers, arXiv
2110.02861; what Ling's open recipe trains with).

The first moment is stored as sign, 4 bits of exponent and 3 of fraction (E4M3 without subnormal numbers); the square
root of the second as 4 bits of exponent and 4 of fraction. Both are relative to the block's largest magnitude, which
is the scale, and reach 16 binades below it: a smaller first moment counts as 0, a smaller root as the least one, so
that no step divides by a lost root. The step itself uses the moments before they are rounded.

Rounding is stochastic, from a hash of element and step: the same numbers everywhere, in every run. To nearest, a
second moment stays where it is while a step changes it by less than half the grid's spacing (`1 - beta2` of it against
6%), and the learning rate is wrong by as much: with beta2 = 0.999 the regression of the tests ends 1.6% from float32's
loss after 300 steps, and 0.04% from it as it is here. With beta2 = 0.95 either way is within 0.1%.

Limits: contiguous float32 parameters; gradients of float32 or bfloat16, finite; at most 2^31 blocks. Blocks run over
the flattened parameter.

Shapes: N elements, M blocks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ling_flow.kernels._triton import ceil_div, jit, narrow, next_power_of_2, tl

BLOCK = 256  # elements that share a scale
LEAST = 2.0**-100  # a block whose largest magnitude is below counts as zeros
FRACTION, FRACTION_SQ = 3, 4  # bits of fraction of the two codes
ROWS, WARPS = 4, 4  # of the kernel: blocks of a program, and warps


class Moments(NamedTuple):
    """Codes in the parameter's shape, uint8, and their blocks' scales (M), float32."""

    exp_avg: Tensor
    exp_avg_scale: Tensor
    exp_avg_sq: Tensor
    exp_avg_sq_scale: Tensor


class Rates(NamedTuple):
    """What a step is told. `step` counts from 1."""

    step: int
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @property
    def seed(self) -> int:
        """Of the rounding, 31 bits: far apart from step to step, or the noise of one would be that of the next, shifted
        by an element. Odd, so that Triton does not compile for multiples of 16 too."""
        mixed = self.step * 0x85EBCA6B & 0xFFFFFFFF
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return ((mixed ^ mixed >> 16) & 0x7FFFFFFF) | 1

    @property
    def factors(self) -> tuple[float, ...]:
        """(beta1, 1 - beta1, beta2, 1 - beta2, step of m / root, factor on the root, eps, what is left of p)."""
        beta1, beta2 = self.betas
        size = self.learning_rate / (1 - beta1**self.step)
        root = 1 / math.sqrt(1 - beta2**self.step)
        left = 1 - self.learning_rate * self.weight_decay
        return beta1, 1 - beta1, beta2, 1 - beta2, size, root, self.eps, left


def new_moments(parameter: Tensor) -> Moments:
    """Of a parameter that has seen no step."""
    blocks, device = ceil_div(parameter.numel(), BLOCK), parameter.device
    return Moments(
        torch.zeros(parameter.shape, dtype=torch.uint8, device=device),
        torch.zeros(blocks, device=device),
        torch.zeros(parameter.shape, dtype=torch.uint8, device=device),
        torch.zeros(blocks, device=device),
    )


@torch.no_grad()
def adamw8_(parameter: Tensor, grad: Tensor, moments: Moments, rates: Rates, copy: Tensor | None = None) -> None:
    """One step, in place: p ← p·(1 - lr·decay) - lr·m̂ / (√v̂ + eps).

    Args:
        copy: bfloat16 in the parameter's shape, becomes the new parameter rounded.
    """
    (adamw8_triton_ if parameter.is_cuda else adamw8_reference_)(parameter, grad, moments, rates, copy)


# The definition, in torch


def adamw8_reference_(
    parameter: Tensor, grad: Tensor, moments: Moments, rates: Rates, copy: Tensor | None = None
) -> None:
    beta1, rest1, beta2, rest2, size, root, eps, left = rates.factors
    wide_MN, average_MN, root_MN = _blocks(grad.float()), exp_avg(moments), exp_avg_sq_root(moments)
    average_MN = average_MN * beta1 + wide_MN * rest1
    square_MN = root_MN * root_MN * beta2 + wide_MN * wide_MN * rest2
    root_MN = square_MN.double().sqrt().float()  # torch's float32 root may be off by a bit on a CPU
    change_MN = average_MN / (root_MN * root + eps) * size
    parameter.copy_((_blocks(parameter) * left - change_MN).flatten()[: parameter.numel()].view_as(parameter))
    noise_MN = _noise(average_MN, rates.seed)
    magnitude_MN, scale_M = _encode(average_MN.abs(), (noise_MN & 0xFFFF) << 4, FRACTION)
    signed_MN = torch.where(average_MN < 0, magnitude_MN + 128, magnitude_MN)
    root_code_MN, root_scale_M = _encode(root_MN, noise_MN >> 16 << 3, FRACTION_SQ)
    for stored, new in zip(moments, (signed_MN, scale_M, root_code_MN, root_scale_M), strict=True):
        stored.copy_(new.flatten()[: stored.numel()].view_as(stored))
    if copy is not None:
        copy.copy_(parameter)


def exp_avg(moments: Moments) -> Tensor:
    """The first moment, float32 (M, 256), zero past the parameter's end."""
    code_MN = _blocks(moments.exp_avg).int()
    return _decode(code_MN, FRACTION, 7) * moments.exp_avg_scale.unsqueeze(1)


def exp_avg_sq_root(moments: Moments) -> Tensor:
    """The root of the second moment, float32 (M, 256), undefined past the parameter's end."""
    code_MN = _blocks(moments.exp_avg_sq).int()
    return _decode(code_MN, FRACTION_SQ, 8) * moments.exp_avg_sq_scale.unsqueeze(1)


def _blocks(x: Tensor) -> Tensor:
    """(M, 256), zero past the end."""
    return functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def _decode(code: Tensor, fraction: int, bits: int) -> Tensor:
    """The float32 number, at most 1, of codes of `bits` bits. With 7 bits the eighth is the sign, and code 0 is 0."""
    low = code & (1 << bits) - 1
    value = (low + ((127 << fraction) - (1 << bits) + 1) << 23 - fraction).view(torch.float32)
    if bits == 8:
        return value
    value = torch.where(low == 0, 0.0, value)
    return torch.where(code >= 128, -value, value)


def _encode(magnitude_MN: Tensor, noise_MN: Tensor, fraction: int) -> tuple[Tensor, Tensor]:
    """Codes (int64) of `fraction` + 4 bits and the blocks' scales. `noise` has as many bits as are cut off."""
    largest_M1 = magnitude_MN.amax(1, keepdim=True)
    largest_M1 = torch.where(largest_M1 < LEAST, 0.0, largest_M1)
    ratio_MN = torch.where(largest_M1 > 0, magnitude_MN / largest_M1, 0.0)
    top = (1 << fraction + 4) - 1
    code_MN = (ratio_MN.view(torch.int32) + noise_MN >> 23 - fraction) - (127 << fraction) + top
    return code_MN.clamp(0, top), largest_M1.squeeze(1)


def _noise(x_MN: Tensor, seed: int) -> Tensor:
    """32 bits for each element, int64: the finaliser of MurmurHash3 over the element's number and the seed."""
    mixed = torch.arange(x_MN.numel(), device=x_MN.device) * 0x9E3779B1 + seed & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return (mixed ^ mixed >> 16).view_as(x_MN)


# Triton


def adamw8_triton_(parameter: Tensor, grad: Tensor, moments: Moments, rates: Rates, copy: Tensor | None = None) -> None:
    elements = parameter.numel()
    if not parameter.is_contiguous() or not all(x.is_contiguous() for x in moments):
        raise ValueError("the parameter and its moments must be contiguous")
    if elements:
        blocks = ceil_div(elements, BLOCK)
        rows = min(ROWS, next_power_of_2(blocks))
        _adamw8_kernel[(ceil_div(blocks, rows),)](
            parameter, grad.contiguous(), *moments, parameter if copy is None else copy, elements, *rates.factors,
            rates.seed, COPY=copy is not None, ROWS=rows, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


@jit
def _encode_kernel(magnitude, noise, FRACTION: tl.constexpr):  # type: ignore[no-untyped-def]
    """`_encode`."""
    largest = tl.max(magnitude, 1)
    largest = tl.where(largest < 7.888609052210118e-31, 0.0, largest)  # LEAST
    ratio = tl.where(largest > 0, 1.0, 0.0)[:, None] * tl.div_rn(
        magnitude, tl.where(largest > 0, largest, 1.0)[:, None]
    )
    top: tl.constexpr = (1 << (FRACTION + 4)) - 1
    code = ((ratio.to(tl.int32, bitcast=True) + noise) >> (23 - FRACTION)) - (127 << FRACTION) + top
    return tl.minimum(tl.maximum(code, 0), top), largest


@jit
def _decode_kernel(low, FRACTION: tl.constexpr):  # type: ignore[no-untyped-def]
    """`_decode` of codes without sign, none of them 0."""
    least: tl.constexpr = (127 << FRACTION) - (1 << (FRACTION + 4)) + 1
    return ((low + least) << (23 - FRACTION)).to(tl.float32, bitcast=True)


@jit
def _adamw8_kernel(  # type: ignore[no-untyped-def]
    parameter, grad, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, copy, elements,
    beta1, rest1, beta2, rest2, size, root_factor, eps, left, seed,
    COPY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    within = row[:, None] * BLOCK + column[None, :]
    base = first * BLOCK
    inside = within < elements - base
    there = first + row < tl.cdiv(elements, BLOCK)

    wide = tl.load(grad + base + within, mask=inside, other=0.0).to(tl.float32)
    code = tl.load(exp_avg + base + within, mask=inside, other=0).to(tl.int32)
    scale = tl.load(exp_avg_scale + first + row, mask=there, other=0.0)
    low = code & 127
    average = tl.where(low == 0, 0.0, _decode_kernel(low, 3))
    average = tl.where(code >= 128, -average, average) * scale[:, None]
    average = average * beta1 + wide * rest1
    code = tl.load(exp_avg_sq + base + within, mask=inside, other=0).to(tl.int32)
    scale = tl.load(exp_avg_sq_scale + first + row, mask=there, other=0.0)
    root = _decode_kernel(code, 4) * scale[:, None]
    root = tl.sqrt_rn(root * root * beta2 + wide * wide * rest2)
    root = tl.where(inside, root, 0.0)

    old = tl.load(parameter + base + within, mask=inside, other=0.0)
    new = old * left - tl.div_rn(average, root * root_factor + eps) * size
    tl.store(parameter + base + within, new, mask=inside)
    if COPY:
        tl.store(copy + base + within, narrow(new, tl.bfloat16), mask=inside)

    mixed = (base + within).to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32)
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35
    mixed = mixed ^ (mixed >> 16)
    code, largest = _encode_kernel(tl.abs(average), ((mixed & 0xFFFF) << 4).to(tl.int32), 3)
    code = tl.where(average < 0, code + 128, code)
    tl.store(exp_avg + base + within, code.to(tl.uint8), mask=inside)
    tl.store(exp_avg_scale + first + row, largest, mask=there)
    code, largest = _encode_kernel(root, ((mixed >> 16) << 3).to(tl.int32), 4)
    tl.store(exp_avg_sq + base + within, code.to(tl.uint8), mask=inside)
    tl.store(exp_avg_sq_scale + first + row, largest, mask=there)
