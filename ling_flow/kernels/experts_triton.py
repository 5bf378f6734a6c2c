"""The routed experts of one layer on a GPU: Σ_k weight_k · down_e(silu(gate_e x) · up_e x), by kernels alone.

Tokens are looked up while the first product reads them, and gradients of the output while the backward pass reads
them: no permuted copy is made of either. Kept for the backward pass are the tokens, z = gate_up x and the index map:
what a layer keeps does not grow with the number of experts at equal F·K (SonicMoE, arXiv 2512.14080). The rest, the
weighted SwiGLU of z, is made again from z in the backward pass. The sum over a token's K rows is in fixed order, every
sum is float32 and rounded once, nothing is atomic: the same bits in every run.

Limits: those of the kernels used; tokens and weights of one type.

Shapes: T tokens, D hidden, E experts, K chosen, F expert width, R rows of a `RowMap`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ling_flow.kernels.grouped_gemm import Backend, grouped_dgrad, grouped_forward, grouped_wgrad
from ling_flow.kernels.row_map import row_map
from ling_flow.kernels.swiglu_quantise import swiglu_weighted_backward, swiglu_weighted_forward
from ling_flow.kernels.unpermute import sum_rows


def routed_experts_triton(
    x_TD: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    counts_E: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """Weighted sum (T, D) of the chosen experts' outputs; `backend` is that of the matrix products."""
    return _RoutedExperts.apply(x_TD, indices_TK, weights_TK, counts_E, gate_up_E2FD, down_EDF, backend)


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        counts_E: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        backend: Backend,
    ) -> Tensor:
        ctx.row_map, ctx.backend = row_map(indices_TK, counts_E), backend
        z_R2F = grouped_forward(x_TD, gate_up_E2FD, ctx.row_map, True, backend)
        h_RF = swiglu_weighted_forward(z_R2F, weights_TK, ctx.row_map)
        y_RD = grouped_forward(h_RF, down_EDF, ctx.row_map, False, backend)
        ctx.save_for_backward(x_TD, z_R2F, weights_TK, gate_up_E2FD, down_EDF)
        return sum_rows(y_RD, ctx.row_map)

    @staticmethod
    def backward(
        ctx: Any, grad_TD: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None, None, Tensor | None, Tensor | None, None]:
        x_TD, z_R2F, weights_TK, gate_up_E2FD, down_EDF = ctx.saved_tensors
        rows, backend, needed = ctx.row_map, ctx.backend, ctx.needs_input_grad
        grad_TD = grad_TD.contiguous()
        grad_down_EDF = grad_x_TD = grad_gate_up_E2FD = None
        if needed[5]:
            h_RF = swiglu_weighted_forward(z_R2F, weights_TK, rows)
            grad_down_EDF = grouped_wgrad(grad_TD, h_RF, rows, True, False, backend=backend)
            del h_RF
        grad_h_RF = grouped_dgrad(grad_TD, down_EDF, rows, True, backend)
        grad_z_R2F, grad_weights_TK = swiglu_weighted_backward(z_R2F, grad_h_RF, weights_TK, rows)
        del grad_h_RF
        if needed[4]:
            grad_gate_up_E2FD = grouped_wgrad(grad_z_R2F, x_TD, rows, False, True, backend=backend)
        if needed[0]:
            grad_x_TD = sum_rows(grouped_dgrad(grad_z_R2F, gate_up_E2FD, rows, False, backend), rows)
        assert grad_weights_TK is not None
        return grad_x_TD, None, grad_weights_TK.to(weights_TK.dtype), None, grad_gate_up_E2FD, grad_down_EDF, None
