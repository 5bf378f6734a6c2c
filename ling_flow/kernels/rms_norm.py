"""RMSNorm: mean square and scaling in float32, cast back, then the weight (Ling 2.0 remote code).

Shapes: N rows (any leading dimensions), D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ling_flow.kernels import fp8
from ling_flow.kernels.fp8 import Quantized


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension."""
    return _RMSNorm.apply(x_ND, weight_D, eps)


def rms_norm_quantize(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Quantized]:
    """`rms_norm` (with its gradient), and the same in FP8 by rows (1×128; without one).

    Leading dimensions of x count as rows: values (N, D), scales (ceil(D/128), N).
    """
    y_ND = rms_norm(x_ND, weight_D, eps)
    return y_ND, fp8.quantize_rows(y_ND.detach().reshape(-1, y_ND.shape[-1]))


class _RMSNorm(torch.autograd.Function):
    # Saves the input and one number per row.
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        rstd_N1 = torch.linalg.vecdot(wide_ND, wide_ND).div_(x_ND.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x_ND, weight_D, rstd_N1)
        return (wide_ND * rstd_N1).to(x_ND.dtype).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_D, rstd_N1 = ctx.saved_tensors
        wide_ND, grad_ND, weight_D = x_ND.to(rstd_N1.dtype), grad_ND.to(rstd_N1.dtype), weight_D.to(rstd_N1.dtype)
        # LayerNorm's fused backward with mean 0 is this one but for the term -rstd·mean(grad·weight), which is put
        # back: a third of the time of the plain formula on a CPU.
        width = [x_ND.shape[-1]]
        grad_x_ND, grad_weight_D, _ = torch.ops.aten.native_layer_norm_backward(
            grad_ND, wide_ND, width, torch.zeros_like(rstd_N1), rstd_N1, weight_D, None, [True, True, False]
        )
        grad_x_ND.addcmul_(rstd_N1, (grad_ND @ weight_D).div_(x_ND.shape[-1]).unsqueeze(-1))
        return grad_x_ND.to(x_ND.dtype), grad_weight_D.to(x_ND.dtype), None
