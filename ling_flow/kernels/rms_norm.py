"""RMSNorm: mean square and scaling in float32, cast back, then the weight (Ling 2.0 remote code).

On CUDA a row stays in registers. The weight's gradient is summed without atomics: each program adds up a fixed span of
rows in order, then a second kernel adds the spans.

Limits of the kernels: float32, bfloat16 or float16 (float64 is left to torch); rows of at most 16,384 (wider ones are
left to torch; above 8,192 the backward kernel spills some 50 bytes a thread).

Shapes: N rows (any leading dimensions), D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ling_flow.kernels import fp8
from ling_flow.kernels._triton import ceil_div, jit, narrow, next_power_of_2, tl
from ling_flow.kernels.fp8 import STORED, Quantized, magnitude, scale_and_inverse
from ling_flow.kernels.row_map import TILE

WIDEST = 16384  # rows that the kernels take
# (elements of a program at least, of a thread), the first of which is taken.
FORWARD_TILES = ((2048, 16), (4096, 16), (8192, 32))
FP8_TILES = ((8192, 32), (2048, 16))  # of what writes FP8 alone: more rows a program, or scales are written one by one
# The same, tiles on the way, spans of rows at most.
BACKWARD_TILES = ((2048, 16, 3, 396), (2048, 16, 3, 528), (4096, 16, 3, 264))


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension."""
    return _RMSNorm.apply(x_ND, weight_D, eps)


def rms_norm_quantize(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Quantized]:
    """`rms_norm` (with its gradient), and the same in FP8 by rows (1×128; without one).

    Leading dimensions of x count as rows: values (N, D), scales (ceil(D/128), N).
    """
    y_ND, values, scales = _RMSNormQuantize.apply(x_ND, weight_D, eps)
    return y_ND, Quantized(values, scales)


def _on_triton(x_ND: Tensor) -> bool:
    return x_ND.is_cuda and x_ND.dtype != torch.float64 and x_ND.shape[-1] <= WIDEST


class _RMSNorm(torch.autograd.Function):
    # Saves the input and one number per row.
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        if _on_triton(x_ND):
            y_ND, rstd_N, _ = rms_norm_triton(x_ND, weight_D, eps, quantize=False)
            ctx.save_for_backward(x_ND, weight_D, rstd_N)
            return y_ND
        wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        rstd_N1 = torch.linalg.vecdot(wide_ND, wide_ND).div_(x_ND.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x_ND, weight_D, rstd_N1)
        return (wide_ND * rstd_N1).to(x_ND.dtype).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_D, rstd_N1 = ctx.saved_tensors
        if _on_triton(x_ND):
            return *rms_norm_backward_triton(grad_ND, x_ND, weight_D, rstd_N1), None
        wide_ND, grad_ND, weight_D = x_ND.to(rstd_N1.dtype), grad_ND.to(rstd_N1.dtype), weight_D.to(rstd_N1.dtype)
        # LayerNorm's fused backward with mean 0 is this one but for the term -rstd·mean(grad·weight), which is put
        # back: a third of the time of the plain formula on a CPU.
        width = [x_ND.shape[-1]]
        grad_x_ND, grad_weight_D, _ = torch.ops.aten.native_layer_norm_backward(
            grad_ND, wide_ND, width, torch.zeros_like(rstd_N1), rstd_N1, weight_D, None, [True, True, False]
        )
        grad_x_ND.addcmul_(rstd_N1, (grad_ND @ weight_D).div_(x_ND.shape[-1]).unsqueeze(-1))
        return grad_x_ND.to(x_ND.dtype), grad_weight_D.to(x_ND.dtype), None


class _RMSNormQuantize(_RMSNorm):
    # The gradient of the FP8 values counts for nothing: they have none.
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if _on_triton(x_ND):
            y_ND, rstd_N, quantized = rms_norm_triton(x_ND, weight_D, eps, quantize=True)
            assert quantized is not None
            ctx.save_for_backward(x_ND, weight_D, rstd_N)
        else:
            y_ND = _RMSNorm.forward(ctx, x_ND, weight_D, eps)
            quantized = fp8.quantize_rows(y_ND.reshape(-1, y_ND.shape[-1]))
        ctx.mark_non_differentiable(*quantized)
        return y_ND, *quantized

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
        return _RMSNorm.backward(ctx, grad_ND)


# Triton


def rms_norm_triton(
    x_ND: Tensor,
    weight_D: Tensor,
    eps: float,
    quantize: bool,
    tile: tuple[int, int] | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Quantized | None]:
    """The normalised rows, 1 / root mean square of each (N,), and the rows in FP8.

    Without `keep` only FP8 is written, for linear layers that read nothing else: the rows are then empty.
    """
    width = x_ND.shape[-1]
    x_ND, weight_D = x_ND.contiguous(), weight_D.contiguous()
    rows = x_ND.numel() // max(width, 1)
    y_ND, device = torch.empty_like(x_ND) if keep else x_ND.new_empty(0), x_ND.device
    rstd_N = torch.empty(rows, dtype=torch.float32, device=device)
    quantized = None
    if quantize:
        quantized = Quantized(
            torch.empty((rows, width), dtype=STORED, device=device),
            torch.empty((ceil_div(width, TILE), rows), dtype=torch.float32, device=device),
        )
    if x_ND.numel():
        tile = tile or (FORWARD_TILES if keep else FP8_TILES)[0]
        block_n, block_d, warps = _block(tile, width, TILE if quantize else 16)
        values, scales = quantized or (y_ND, rstd_N)  # not touched without `quantize`
        _forward_kernel[(ceil_div(rows, block_n),)](
            x_ND, weight_D, y_ND, rstd_N, values, scales, rows, width, eps, KEEP=keep, QUANTIZE=quantize,
            BLOCK_N=block_n, BLOCK_D=block_d, TILE=TILE, num_warps=warps,
        )  # fmt: skip
    return y_ND, rstd_N, quantized


def rms_norm_backward_triton(
    grad_ND: Tensor,
    x_ND: Tensor,
    weight_D: Tensor,
    rstd_N: Tensor,
    tile: tuple[int, int, int, int] = BACKWARD_TILES[0],
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight."""
    width, rows = x_ND.shape[-1], len(rstd_N)
    grad_ND, x_ND, weight_D = grad_ND.contiguous(), x_ND.contiguous(), weight_D.contiguous()
    grad_x_ND = torch.empty_like(x_ND)
    if not x_ND.numel():
        return grad_x_ND, torch.zeros_like(weight_D)
    _, _, stages, most = tile
    block_n, block_d, warps = _block(tile[:2], width, 16)
    span = ceil_div(ceil_div(rows, block_n), most) * block_n
    spans = ceil_div(rows, span)
    partial_SD = torch.empty((spans, width), dtype=torch.float32, device=x_ND.device)
    _backward_kernel[(spans,)](
        grad_ND, x_ND, weight_D, rstd_N, grad_x_ND, partial_SD, rows, width, span,
        STAGES=stages if width <= 8192 else 1, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip
    return grad_x_ND, sum_rows(partial_SD, spans, weight_D.dtype)[0]


def sum_rows(x_ND: Tensor, first: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Σ of the first so many rows and Σ of the rest (undefined where there is none), rounded once, at the end.

    For partial sums of programs, in one launch: torch's sums and casts would each cost another.
    """
    rows, width = x_ND.shape
    sums_2D = torch.empty((2, width), dtype=dtype, device=x_ND.device)
    _sum_rows_kernel[(ceil_div(width, 16), 2 if first < rows else 1)](
        x_ND, sums_2D, first, rows, width, BLOCK_N=256, BLOCK_D=16, num_warps=8
    )
    return sums_2D[0], sums_2D[1]


def _block(tile: tuple[int, int], width: int, least: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program that holds whole rows."""
    elements, per_thread = tile
    columns = max(next_power_of_2(width), least)
    rows = max(elements // columns, 1)
    return rows, columns, min(max(rows * columns // (32 * per_thread), 1), 16)


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, weight, y, rstds, values, scales, rows, width, eps,
    KEEP: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scaling = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 1) / width + eps)
    tl.store(rstds + row, rstd, mask=row < rows)
    normal = narrow(wide * rstd[:, None], y.dtype.element_ty).to(tl.float32)
    found = narrow(normal * scaling[None, :], y.dtype.element_ty)
    if KEEP:
        tl.store(y + at, found, mask=inside)
    if QUANTIZE:
        wide = tl.reshape(found.to(tl.float32), (BLOCK_N, BLOCK_D // TILE, TILE))
        scale, inverse = scale_and_inverse(tl.max(magnitude(wide), 2))
        stored = narrow(tl.reshape(wide * inverse[:, :, None], (BLOCK_N, BLOCK_D)), tl.float8e4nv)
        tl.store(values + at, stored, mask=inside)
        tile = tl.arange(0, BLOCK_D // TILE)[None, :]
        to = scales + tile.to(tl.int64) * rows + row[:, None]
        tl.store(to, scale, mask=(row < rows)[:, None] & (tile * TILE < width))


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad, x, weight, rstds, grad_x, partial_SD, rows, width, span,
    STAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * span
    column = tl.arange(0, BLOCK_D)
    there = column < width
    scaling = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in tl.range(first, min(first + span, rows), BLOCK_N, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_N)
        inside = (row < rows)[:, None] & there[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        rstd = tl.load(rstds + row, mask=row < rows, other=0.0)[:, None]
        normal = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * rstd
        slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        total += slope * normal
        slope = slope * scaling[None, :]
        mean = tl.sum(slope * normal, 1)[:, None] / width
        tl.store(grad_x + at, narrow((slope - normal * mean) * rstd, grad_x.dtype.element_ty), mask=inside)
    tl.store(partial_SD + tl.program_id(0).to(tl.int64) * width + column, tl.sum(total, 0), mask=there)


@jit
def _sum_rows_kernel(  # type: ignore[no-untyped-def]
    x, sums, first, rows, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    part = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    there = column < width
    end = tl.where(part == 0, first, rows)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(part * first, end, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        inside = (row < end)[:, None] & there[None, :]
        total += tl.load(x + row.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0)
    tl.store(sums + part * width + column, narrow(tl.sum(total, 0), sums.dtype.element_ty), mask=there)
