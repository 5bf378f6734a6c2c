"""The routed experts of one layer, dropless: Σ_k weight_k · down_e(silu(gate_e x) · up_e x) over the chosen experts e
of each token.

Shapes: T tokens, D hidden, E experts, K chosen, F expert width, R rows: the T·K (token, choice) pairs by expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ling_flow.kernels.experts_triton import routed_experts_triton
from ling_flow.kernels.products import matmul, slow
from ling_flow.kernels.swiglu import swiglu_backward, swiglu_forward

# bfloat16 products are compiled per shape by the CPU library, which costs milliseconds and is remembered for some
# thousand shapes: rows of an expert come in multiples of this.
BFLOAT16_STEP = 32


def routed_experts(
    x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, counts_E: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Weighted sum (T, D) of the chosen experts' outputs. `counts_E[e]` is the number of rows routed to expert e."""
    if x_TD.is_cuda and x_TD.dtype != torch.float64:
        return routed_experts_triton(x_TD, indices_TK, weights_TK, counts_E, gate_up_E2FD, down_EDF)
    return _RoutedExperts.apply(x_TD, indices_TK, weights_TK, counts_E, gate_up_E2FD, down_EDF)


@dataclass(frozen=True)
class Rows:
    """Where each (token, choice) pair lies among the rows, sorted by expert.

    A row of padding reads token 0 and has weight 0, which makes it add nothing to the output and nothing to any
    gradient.
    """

    sizes: list[int]  # rows of each expert, padding included
    top_k: int
    batched: bool  # all sizes are equal, and each product is one batched call; else a call per expert
    place_N: Tensor  # of each pair, its row; N = T·K
    token_R: Tensor  # of each row, its token

    @staticmethod
    def of(indices_TK: Tensor, counts_E: Tensor, dtype: torch.dtype) -> Rows:
        """The rows of what the router chose."""
        counts, top_k = counts_E.tolist(), indices_TK.shape[1]
        batched = _pads(counts, dtype)
        if batched:
            sizes = [max(counts)] * len(counts)
        elif dtype == torch.bfloat16:
            sizes = [-(-count // BFLOAT16_STEP) * BFLOAT16_STEP for count in counts]
        else:
            sizes = counts
        order_N = indices_TK.flatten().argsort(stable=True)
        row_N = torch.arange(order_N.numel(), device=order_N.device)
        if sizes == counts:
            place_N = torch.empty_like(order_N).index_copy_(0, order_N, row_N)
            return Rows(sizes, top_k, batched, place_N, order_N // top_k)
        sizes_E = torch.tensor(sizes, device=order_N.device)
        shift_E = (sizes_E - counts_E).cumsum(0) - (sizes_E - counts_E)
        row_N = row_N + shift_E.repeat_interleave(counts_E, output_size=order_N.numel())
        place_N = torch.empty_like(order_N).index_copy_(0, order_N, row_N)
        token_R = order_N.new_zeros(sum(sizes)).index_copy_(0, row_N, order_N // top_k)
        return Rows(sizes, top_k, batched, place_N, token_R)

    def spread(self, values_N: Tensor) -> Tensor:
        """Values of the pairs → of the rows (R, 1), 0 in padding."""
        return values_N.new_zeros(len(self.token_R)).index_copy_(0, self.place_N, values_N).unsqueeze(-1)

    def gather(self, x_TD: Tensor) -> Tensor:
        """The token of each row (R, D)."""
        return x_TD.index_select(0, self.token_R)

    def sum(self, rows_RD: Tensor) -> Tensor:
        """Sum of the K rows of each token (T, D)."""
        place_TK = self.place_N.unflatten(0, (-1, self.top_k))
        if rows_RD.device.type == "cpu" and rows_RD.dtype in (torch.float32, torch.bfloat16):
            return functional.embedding_bag(place_TK, rows_RD, mode="sum")  # one pass, fixed order, float32 sums
        wide = torch.promote_types(rows_RD.dtype, torch.float32)
        return rows_RD[place_TK].sum(1, dtype=wide).to(rows_RD.dtype)

    def matmul(self, left_RA: Tensor, right_EAB: Tensor) -> Tensor:
        """Each expert's rows times its matrix (R, B)."""
        if self.batched:
            return matmul(self._by_expert(left_RA), right_EAB).flatten(0, 1)
        out_RB = left_RA.new_empty(len(self.token_R), right_EAB.shape[-1])
        for expert, rows in self._filled():
            _mm(left_RA[rows], right_EAB[expert], out_RB[rows])
        return out_RB

    def outer(self, left_RA: Tensor, right_RB: Tensor) -> Tensor:
        """leftᵀ·right over each expert's rows (E, A, B): the gradient of its matrix."""
        if self.batched:
            return matmul(self._by_expert(left_RA).transpose(1, 2), self._by_expert(right_RB))
        out_EAB = left_RA.new_zeros(len(self.sizes), left_RA.shape[-1], right_RB.shape[-1])
        for expert, rows in self._filled():
            _mm(left_RA[rows].T, right_RB[rows], out_EAB[expert])
        return out_EAB

    def _by_expert(self, rows_RA: Tensor) -> Tensor:
        return rows_RA.view(len(self.sizes), -1, rows_RA.shape[-1])

    def _filled(self) -> list[tuple[int, slice]]:
        found, end = [], 0
        for expert, size in enumerate(self.sizes):
            if size:
                found.append((expert, slice(end, end + size)))
            end += size
        return found


def _mm(left_AB: Tensor, right_BC: Tensor, out_AC: Tensor) -> None:
    if slow(left_AB):
        out_AC.copy_(left_AB.float() @ right_BC.float())
    else:
        torch.mm(left_AB, right_BC, out=out_AC)


def _pads(counts: list[int], dtype: torch.dtype) -> bool:
    """Whether one padded batch is faster than a call per expert, as measured on a CPU (docs/log.md, 2026-11-23).

    A call costs about as much as 32 rows of arithmetic, in bfloat16 128; padding pays where it adds fewer rows.
    """
    rows, experts = sum(counts), len(counts)
    if 2 * counts.count(0) > experts:  # the weights of most are not needed at all
        return False
    added = max(counts) * experts - rows
    return added <= min((128 if dtype == torch.bfloat16 else 32) * experts, 7 * rows)


class _RoutedExperts(torch.autograd.Function):
    # The weight is applied before `down` (Ling 2.0 §5.3.3), so the experts' outputs need not be kept for the backward
    # pass.
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
        rows = Rows.of(indices_TK, counts_E, x_TD.dtype)
        weights_R1 = rows.spread(weights_TK.flatten().to(x_TD.dtype))
        x_RD = rows.gather(x_TD)
        gate_up_R2F = rows.matmul(x_RD, gate_up_E2FD.transpose(1, 2))
        hidden_RF = swiglu_forward(gate_up_R2F)
        y_RD = rows.matmul(hidden_RF * weights_R1, down_EDF.transpose(1, 2))
        ctx.layout, ctx.weights_dtype = (rows.sizes, rows.top_k, rows.batched), weights_TK.dtype
        indices = (rows.place_N, rows.token_R)
        ctx.save_for_backward(x_RD, gate_up_R2F, hidden_RF, weights_R1, gate_up_E2FD, down_EDF, *indices)
        return rows.sum(y_RD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, Tensor, None, Tensor, Tensor]:
        x_RD, gate_up_R2F, hidden_RF, weights_R1, gate_up_E2FD, down_EDF, *indices = ctx.saved_tensors
        rows = Rows(*ctx.layout, *indices)
        grad_RD = rows.gather(grad_TD)
        grad_hidden_RF = rows.matmul(grad_RD, down_EDF)
        grad_down_EDF = rows.outer(grad_RD, hidden_RF * weights_R1)
        grad_weights_R = torch.linalg.vecdot(grad_hidden_RF, hidden_RF)
        grad_gate_up_R2F = swiglu_backward(gate_up_R2F, grad_hidden_RF.mul_(weights_R1))
        grad_gate_up_E2FD = rows.outer(grad_gate_up_R2F, x_RD)
        grad_x_TD = rows.sum(rows.matmul(grad_gate_up_R2F, gate_up_E2FD))
        grad_weights_TK = grad_weights_R[rows.place_N].unflatten(0, (-1, rows.top_k)).to(ctx.weights_dtype)
        return grad_x_TD, None, grad_weights_TK, None, grad_gate_up_E2FD, grad_down_EDF
