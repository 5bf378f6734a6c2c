"""The routed experts of one layer, dropless: Σ_k weight_k · down_e(silu(gate_e x) · up_e x) over the chosen experts e
of each token.

Shapes: T tokens, D hidden, E experts, K chosen, F expert width, N = T·K rows sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ling_flow.kernels.swiglu import swiglu_backward, swiglu_forward


def routed_experts(
    x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, counts_E: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Weighted sum (T, D) of the chosen experts' outputs. `counts_E[e]` is the number of rows routed to expert e."""
    return _RoutedExperts.apply(x_TD, indices_TK, weights_TK, counts_E, gate_up_E2FD, down_EDF)


class _RoutedExperts(torch.autograd.Function):
    # Rows sorted by expert once, then plain matmuls into preallocated buffers: at small sizes the time goes to
    # launching operations, not to arithmetic. The weight is applied before `down` (Ling 2.0 §5.3.3), so the experts'
    # outputs need not be kept for the backward pass.
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        counts_E: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
    ) -> Tensor:
        top_k = indices_TK.shape[1]
        order_N = indices_TK.flatten().argsort(stable=True)
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
        token_N = order_N // top_k
        counts = counts_E.tolist()
        weights_N1 = weights_TK.flatten()[order_N].to(x_TD.dtype).unsqueeze(-1)

        x_ND = x_TD.index_select(0, token_N)
        gate_up_N2F = x_TD.new_empty(len(order_N), gate_up_E2FD.shape[1])
        y_ND = torch.empty_like(x_ND)
        for x, out, weight in zip(x_ND.split(counts), gate_up_N2F.split(counts), gate_up_E2FD, strict=True):
            torch.mm(x, weight.T, out=out)
        hidden_NF = swiglu_forward(gate_up_N2F)
        for hidden, out, weight in zip(
            (hidden_NF * weights_N1).split(counts), y_ND.split(counts), down_EDF, strict=True
        ):
            torch.mm(hidden, weight.T, out=out)
        ctx.counts, ctx.weights_dtype = counts, weights_TK.dtype
        ctx.save_for_backward(x_ND, gate_up_N2F, hidden_NF, weights_N1, token_N, place_N, gate_up_E2FD, down_EDF)
        return _sum_rows(y_ND, place_N, top_k)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, Tensor, None, Tensor, Tensor]:
        x_ND, gate_up_N2F, hidden_NF, weights_N1, token_N, place_N, gate_up_E2FD, down_EDF = ctx.saved_tensors
        counts = ctx.counts
        top_k = len(token_N) // len(grad_TD)
        grad_ND = grad_TD.index_select(0, token_N)
        grad_down_EDF = torch.empty_like(down_EDF)
        grad_hidden_NF = torch.empty_like(hidden_NF)
        for grad, hidden, weight, out, grad_weight in zip(
            grad_ND.split(counts),
            (hidden_NF * weights_N1).split(counts),
            down_EDF,
            grad_hidden_NF.split(counts),
            grad_down_EDF,
            strict=True,
        ):
            torch.mm(grad, weight, out=out)
            torch.mm(grad.T, hidden, out=grad_weight)
        grad_weights_N = torch.linalg.vecdot(grad_hidden_NF, hidden_NF)
        grad_gate_up_N2F = swiglu_backward(gate_up_N2F, grad_hidden_NF.mul_(weights_N1))
        grad_gate_up_E2FD = torch.empty_like(gate_up_E2FD)
        grad_x_ND = torch.empty_like(x_ND)
        for grad, x, weight, out, grad_weight in zip(
            grad_gate_up_N2F.split(counts),
            x_ND.split(counts),
            gate_up_E2FD,
            grad_x_ND.split(counts),
            grad_gate_up_E2FD,
            strict=True,
        ):
            torch.mm(grad, weight, out=out)
            torch.mm(grad.T, x, out=grad_weight)
        grad_x_TD = _sum_rows(grad_x_ND, place_N, top_k)
        grad_weights_TK = grad_weights_N[place_N].unflatten(0, (-1, top_k)).to(ctx.weights_dtype)
        return grad_x_TD, None, grad_weights_TK, None, grad_gate_up_E2FD, grad_down_EDF


def _sum_rows(rows_ND: Tensor, place_N: Tensor, top_k: int) -> Tensor:
    """Sum of the K rows of each token; `place_N` holds where each (token, choice) lies in the sorted rows."""
    if rows_ND.dtype == torch.float32 and rows_ND.device.type == "cpu":
        return functional.embedding_bag(place_N.unflatten(0, (-1, top_k)), rows_ND, mode="sum")  # one pass, fixed order
    return (
        rows_ND[place_N]
        .unflatten(0, (-1, top_k))
        .sum(1, dtype=torch.promote_types(rows_ND.dtype, torch.float32))
        .to(rows_ND.dtype)
    )
