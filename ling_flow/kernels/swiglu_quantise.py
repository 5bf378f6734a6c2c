"""SwiGLU of the experts with the routing weight applied: silu(gate) · up · p, and the same quantised for FP8 products.

The weight of a row is applied before the down projection (Ling 2.0 §5.3.3), so the experts' outputs need not be kept.
All arithmetic is float32, narrowed once to the dtype of z. What is quantised is that narrowed value, so the fused
kernels give what `swiglu_weighted` followed by `fp8.quantize_rows` or `quantize_columns` would, and h is not written.

Limits of the kernels: contiguous inputs of float32, bfloat16 or float16, any shape, fast where F is a multiple of 16.
`swiglu_quantize_backward` is one kernel only where F is a multiple of 128: elsewhere a tile of 128 columns of
[gate | up] holds some of both, and the gradient is written once before it is quantised.

Shapes: T tokens, K chosen, F expert width, R rows of a `RowMap`, M its tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ling_flow.kernels import fp8
from ling_flow.kernels.fp8 import Quantized
from ling_flow.kernels.row_map import RowMap

# The definition, in torch


def _wide(z_R2F: Tensor, weights_TK: Tensor | None, row_map: RowMap) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows that are no padding, their gate, up and weight, in float32 or wider."""
    row_N = (row_map.pair_R >= 0).nonzero()[:, 0]
    gate_NF, up_NF = z_R2F[row_N].to(torch.promote_types(z_R2F.dtype, torch.float32)).chunk(2, 1)
    if weights_TK is None:
        return row_N, gate_NF, up_NF, gate_NF.new_ones(len(row_N), 1)
    return row_N, gate_NF, up_NF, weights_TK.flatten()[row_map.pair_R[row_N].long(), None].to(gate_NF.dtype)


def swiglu_weighted_reference(z_R2F: Tensor, weights_TK: Tensor | None, row_map: RowMap) -> Tensor:
    row_N, gate_NF, up_NF, p_N1 = _wide(z_R2F, weights_TK, row_map)
    h_RF = z_R2F.new_zeros(row_map.rows, z_R2F.shape[1] // 2)
    h_RF[row_N] = (functional.silu(gate_NF) * up_NF * p_N1).to(z_R2F.dtype)
    return h_RF


def swiglu_weighted_backward_reference(
    z_R2F: Tensor, grad_h_RF: Tensor, weights_TK: Tensor | None, row_map: RowMap
) -> tuple[Tensor, Tensor]:
    row_N, gate_NF, up_NF, p_N1 = _wide(z_R2F, weights_TK, row_map)
    grad_NF, sigmoid_NF = grad_h_RF[row_N].to(gate_NF.dtype), gate_NF.sigmoid()
    silu_NF, grad_p_NF = gate_NF * sigmoid_NF, grad_NF * p_N1
    grad_gate_NF = grad_p_NF * up_NF * (sigmoid_NF * (1 + gate_NF * (1 - sigmoid_NF)))
    grad_z_R2F = z_R2F.new_zeros(row_map.rows, z_R2F.shape[1])
    grad_z_R2F[row_N] = torch.cat([grad_gate_NF, grad_p_NF * silu_NF], 1).to(z_R2F.dtype)
    grad_weights_TK = gate_NF.new_zeros(row_map.place_TK.shape)
    grad_weights_TK.view(-1)[row_map.pair_R[row_N].long()] = (grad_NF * (silu_NF * up_NF)).sum(1)
    return grad_z_R2F, grad_weights_TK


def swiglu_quantize_reference(z_R2F: Tensor, weights_TK: Tensor | None, row_map: RowMap, by_columns: bool) -> Quantized:
    h_RF = swiglu_weighted_reference(z_R2F, weights_TK, row_map)
    return fp8.quantize_columns_reference(h_RF, row_map, False) if by_columns else fp8.quantize_rows_reference(h_RF)


def swiglu_quantize_backward_reference(
    z_R2F: Tensor, grad_h_RF: Tensor, weights_TK: Tensor | None, row_map: RowMap
) -> tuple[Quantized, Quantized, Tensor]:
    grad_z_R2F, grad_weights_TK = swiglu_weighted_backward_reference(z_R2F, grad_h_RF, weights_TK, row_map)
    by_rows = fp8.quantize_rows_reference(grad_z_R2F)
    return by_rows, fp8.quantize_columns_reference(grad_z_R2F, row_map, False), grad_weights_TK


# Dispatch


def swiglu_weighted(z_R2F: Tensor, weights_TK: Tensor | None, row_map: RowMap) -> Tensor:
    """silu(gate) · up · weight of each row (R, F), zero in padding; with a gradient.

    Args:
        z_R2F: [gate | up]; rows of padding are not read, so a dense layer may pass its T rows with a `dense_map`.
        weights_TK: of the pairs; None for ones.
    """
    return _SwiGLUWeighted.apply(z_R2F, weights_TK, row_map)


def swiglu_weighted_forward(z_R2F: Tensor, weights_TK: Tensor | None, row_map: RowMap) -> Tensor:
    """`swiglu_weighted` without a record for the backward pass."""
    return swiglu_weighted_reference(z_R2F, weights_TK, row_map)


def swiglu_weighted_backward(
    z_R2F: Tensor, grad_h_RF: Tensor, weights_TK: Tensor | None, row_map: RowMap
) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu_weighted`: of z (R, 2F), zero in padding, and of the weights (T, K), float32."""
    return swiglu_weighted_backward_reference(z_R2F, grad_h_RF, weights_TK, row_map)


def swiglu_quantize(z_R2F: Tensor, weights_TK: Tensor | None, row_map: RowMap, by_columns: bool) -> Quantized:
    """`swiglu_weighted` in FP8: 1×128 by rows for the product with `down`, 128×1 by columns for its gradient."""
    return swiglu_quantize_reference(z_R2F, weights_TK, row_map, by_columns)


def swiglu_quantize_backward(
    z_R2F: Tensor, grad_h_RF: Tensor, weights_TK: Tensor | None, row_map: RowMap
) -> tuple[Quantized, Quantized, Tensor]:
    """The gradient of z in FP8, by rows and by columns, and that of the weights (T, K), float32.

    By rows, padding is undefined.
    """
    return swiglu_quantize_backward_reference(z_R2F, grad_h_RF, weights_TK, row_map)


class _SwiGLUWeighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_R2F: Tensor, weights_TK: Tensor | None, row_map: RowMap) -> Tensor:
        ctx.row_map = row_map
        ctx.save_for_backward(z_R2F, weights_TK)
        return swiglu_weighted_forward(z_R2F, weights_TK, row_map)

    @staticmethod
    def backward(ctx: Any, grad_h_RF: Tensor) -> tuple[Tensor, Tensor | None, None]:
        z_R2F, weights_TK = ctx.saved_tensors
        grad_z_R2F, grad_weights_TK = swiglu_weighted_backward(z_R2F, grad_h_RF, weights_TK, ctx.row_map)
        return grad_z_R2F[: len(z_R2F)], None if weights_TK is None else grad_weights_TK.to(weights_TK.dtype), None
