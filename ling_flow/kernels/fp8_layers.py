"""Linear layers and routed experts in blockwise FP8, forward and backward (Ling 2.0 §5.1).

All three products of a weight (outputs, gradient of the input, gradient of the weight) take E4M3 operands with float32
scales and float32 sums; outputs and gradients of inputs are bfloat16, gradients of weights of the weights' type. What
is kept for the backward pass of a linear layer is its input in FP8, by columns: half of bfloat16.

On a CPU the same steps run by the definitions of the kernels, so the numbers of FP8 training can be had anywhere.

Limits: inputs are bfloat16; weights are the float32 masters, or bfloat16.

Shapes: T tokens, D hidden, E experts, K chosen, F expert width, R rows of a `RowMap`, A outputs, B inputs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ling_flow.kernels.fp8 import (
    Quantized,
    dequantize_blocks,
    dequantize_columns,
    dequantize_rows,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    quantize_rows_and_columns,
)
from ling_flow.kernels.grouped_gemm_fp8 import grouped_dgrad_fp8, grouped_forward_fp8, grouped_wgrad_fp8
from ling_flow.kernels.row_map import RowMap, dense_map, row_map
from ling_flow.kernels.swiglu_quantise import (
    swiglu_quantize,
    swiglu_quantize_backward,
    swiglu_weighted_backward,
    swiglu_weighted_forward,
)
from ling_flow.kernels.unpermute import gather_rows, sum_rows

Watch = Callable[[str, Tensor, Tensor], None]
"""Told of an operation: its name, the result in high precision, and the one in FP8. Both float32.

Of routed experts, weights and products are told expert by expert.
"""


_updates = 0  # steps of any optimizer, once a layer is in FP8


@functools.cache  # once
def _count_updates() -> None:
    def count(*_: Any) -> None:
        global _updates
        _updates += 1

    register_optimizer_step_post_hook(count)


class FP8Weight:
    """What an FP8 layer keeps beside its weight. A copy keeps nothing.

    Attributes:
        watch: told of every operation while it is set.
    """

    def __init__(self) -> None:
        _count_updates()
        self.watch: Watch | None = None
        self._weight: weakref.ref[Tensor] | None = None
        self._state: tuple[int, int, int] | None = None
        self._quantized: Quantized | None = None

    def __reduce__(self) -> tuple[type[FP8Weight], tuple[()]]:
        return FP8Weight, ()  # what it keeps is of its own layer's weight

    def quantized(self, weight: Tensor) -> Quantized:
        """The weight (A, B) or (E, A, B) in blocks, made again only after it may have changed: once per optimizer step.

        That is: after a step of any optimizer (torch's fused ones do not count up a tensor's version), any change in
        place, and for another tensor or other memory. What is written into the same memory past torch (`weight.data`,
        a kernel of one's own) cannot be seen.
        """
        state = (weight.data_ptr(), weight._version, _updates)
        if self._quantized is None or self._weight is None or self._weight() is not weight or state != self._state:
            self._weight, self._state = weakref.ref(weight), state
            blocks = weight.detach()
            self._quantized = quantize_blocks(blocks if blocks.dim() == 3 else blocks.unsqueeze(0))
        return self._quantized


def fp8_linear(x: Tensor, weight_AB: Tensor, fp8: FP8Weight) -> Tensor:
    """x · weightᵀ (…, A), bfloat16."""
    quantized = fp8.quantized(weight_AB)
    return _FP8Linear.apply(x.flatten(0, -2), weight_AB, quantized, fp8.watch).unflatten(0, x.shape[:-1])


def fp8_routed_experts(
    x_TD: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    counts_E: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_up: FP8Weight,
    down: FP8Weight,
) -> Tensor:
    """`experts.routed_experts` in FP8 (T, D), bfloat16."""
    quantized = (gate_up.quantized(gate_up_E2FD), down.quantized(down_EDF))
    where = row_map(indices_TK, counts_E)
    return _FP8Experts.apply(x_TD, weights_TK, gate_up_E2FD, down_EDF, quantized, where, (gate_up.watch, down.watch))


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TB: Tensor, weight_AB: Tensor, quantized: Quantized, watch: Watch | None) -> Tensor:
        where = dense_map(len(x_TB), x_TB.device)
        by_rows, by_columns = quantize_rows_and_columns(x_TB, where)
        y_TA = grouped_forward_fp8(by_rows, quantized, where)[: len(x_TB)]
        ctx.where, ctx.quantized, ctx.watch, ctx.dtype = where, quantized, watch, weight_AB.dtype
        # A watched layer needs its weight for the comparison.
        ctx.save_for_backward(*by_columns, weight_AB if watch is not None else None)
        if watch is not None:
            watch("weight", weight_AB.float(), dequantize_blocks(quantized)[0])
            watch("input", x_TB.float(), dequantize_rows(by_rows)[: len(x_TB)])
            watch("input by columns", x_TB.float(), dequantize_columns(by_columns, where)[: len(x_TB)])
            watch("forward", x_TB.float() @ weight_AB.float().T, y_TA.float())
        return y_TA

    @staticmethod
    def backward(ctx: Any, grad_TA: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, scales, weight_AB = ctx.saved_tensors
        where, watch, tokens = ctx.where, ctx.watch, len(grad_TA)
        x = Quantized(values, scales)
        by_rows, by_columns = quantize_rows_and_columns(grad_TA, where)
        grad_x_TB = grouped_dgrad_fp8(by_rows, ctx.quantized, where)[:tokens]
        grad_weight_AB = grouped_wgrad_fp8(by_columns, x, where, ctx.dtype)[0]
        if watch is not None:
            watch("gradient", grad_TA.float(), dequantize_rows(by_rows)[:tokens])
            watch("gradient by columns", grad_TA.float(), dequantize_columns(by_columns, where)[:tokens])
            watch("dgrad", grad_TA.float() @ weight_AB.float(), grad_x_TB.float())
            x_TB = dequantize_columns(x, where)[:tokens]  # the input itself is not kept
            watch("wgrad", grad_TA.float().T @ x_TB, grad_weight_AB.float())
        return grad_x_TB, grad_weight_AB, None, None


class _FP8Experts(torch.autograd.Function):
    # Kept: the tokens, the pre-activations of the experts, and the map; activations are made again from these.
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        quantized: tuple[Quantized, Quantized],
        where: RowMap,
        watches: tuple[Watch | None, Watch | None],
    ) -> Tensor:
        x_q = quantize_rows(x_TD)
        z_R2F = grouped_forward_fp8(x_q, quantized[0], where, gather=True)
        h_q = swiglu_quantize(z_R2F, weights_TK, where, by_columns=False)
        y_RD = grouped_forward_fp8(h_q, quantized[1], where)
        ctx.where, ctx.quantized, ctx.watches = where, quantized, watches
        ctx.dtypes = gate_up_E2FD.dtype, down_EDF.dtype
        # As in a linear layer, a watched weight is needed for the comparison.
        watched = (
            None if watch is None else weight for watch, weight in zip(watches, (gate_up_E2FD, down_EDF), strict=True)
        )
        ctx.save_for_backward(x_TD, z_R2F, weights_TK, *watched)
        watch_gate_up, watch_down = watches
        if watch_gate_up is not None:
            _watch_weights(watch_gate_up, gate_up_E2FD, quantized[0])
            watch_gate_up("input", x_TD.float(), dequantize_rows(x_q))
            for expert, rows in _all_experts(where):
                exact = x_TD[where.tokens(rows)].float() @ gate_up_E2FD[expert].float().T
                watch_gate_up("forward", exact, z_R2F[rows].float())
        if watch_down is not None:
            _watch_weights(watch_down, down_EDF, quantized[1])
            h_RF, real = swiglu_weighted_forward(z_R2F, weights_TK, where), where.pair_R >= 0
            watch_down("input", h_RF[real].float(), dequantize_rows(h_q)[real])
            for expert, rows in _all_experts(where):
                watch_down("forward", h_RF[rows].float() @ down_EDF[expert].float().T, y_RD[rows].float())
        return sum_rows(y_RD, where)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None, None]:
        x_TD, z_R2F, weights_TK, gate_up_E2FD, down_EDF = ctx.saved_tensors
        where, (gate_up, down) = ctx.where, ctx.quantized
        grad_q = quantize_rows(grad_TD)
        grad_h_RF = grouped_dgrad_fp8(grad_q, down, where, gather=True)
        grad_columns = quantize_columns(grad_TD, where, gather=True)
        h_columns = swiglu_quantize(z_R2F, weights_TK, where, by_columns=True)
        grad_down_EDF = grouped_wgrad_fp8(grad_columns, h_columns, where, ctx.dtypes[1])
        dz_rows, dz_columns, grad_weights_TK = swiglu_quantize_backward(z_R2F, grad_h_RF, weights_TK, where)
        assert grad_weights_TK is not None
        x_columns = quantize_columns(x_TD, where, gather=True)
        grad_gate_up_E2FD = grouped_wgrad_fp8(dz_columns, x_columns, where, ctx.dtypes[0])
        grad_x_RD = grouped_dgrad_fp8(dz_rows, gate_up, where)
        watch_gate_up, watch_down = ctx.watches
        if watch_down is not None:
            h_RF, real = swiglu_weighted_forward(z_R2F, weights_TK, where), where.pair_R >= 0
            watch_down("gradient", grad_TD.float(), dequantize_rows(grad_q))
            exact = gather_rows(grad_TD, where)[real].float()
            watch_down("gradient by columns", exact, dequantize_columns(grad_columns, where)[real])
            watch_down("input by columns", h_RF[real].float(), dequantize_columns(h_columns, where)[real])
            for expert, rows in _all_experts(where):
                grad_ND, h_NF = grad_TD[where.tokens(rows)].float(), h_RF[rows].float()
                watch_down("dgrad", grad_ND @ down_EDF[expert].float(), grad_h_RF[rows].float())
                watch_down("wgrad", grad_ND.T @ h_NF, grad_down_EDF[expert].float())
        if watch_gate_up is not None:
            dz_R2F, _ = swiglu_weighted_backward(z_R2F, grad_h_RF, weights_TK, where)
            real = where.pair_R >= 0
            exact = dz_R2F[real].float()
            watch_gate_up("gradient", exact, dequantize_rows(dz_rows)[real])
            watch_gate_up("gradient by columns", exact, dequantize_columns(dz_columns, where)[real])
            x_RD = gather_rows(x_TD, where)[real].float()
            watch_gate_up("input by columns", x_RD, dequantize_columns(x_columns, where)[real])
            for expert, rows in _all_experts(where):
                dz_N2F, x_ND = dz_R2F[rows].float(), x_TD[where.tokens(rows)].float()
                watch_gate_up("dgrad", dz_N2F @ gate_up_E2FD[expert].float(), grad_x_RD[rows].float())
                watch_gate_up("wgrad", dz_N2F.T @ x_ND, grad_gate_up_E2FD[expert].float())
        grad_x_TD = sum_rows(grad_x_RD, where)
        return grad_x_TD, grad_weights_TK.to(weights_TK.dtype), grad_gate_up_E2FD, grad_down_EDF, None, None, None


def _all_experts(where: RowMap) -> Iterator[tuple[int, slice]]:
    """Each expert and its rows; of one without rows the gradient of the weights is to be zero."""
    spans = zip(where.starts_E.tolist(), where.counts_E.tolist(), strict=True)
    return ((expert, slice(start, start + count)) for expert, (start, count) in enumerate(spans))


def _watch_weights(watch: Watch, weight_EAB: Tensor, quantized: Quantized) -> None:
    for expert, weight_AB in enumerate(weight_EAB):
        one = Quantized(*(part[expert : expert + 1] for part in quantized))
        watch("weight", weight_AB.float(), dequantize_blocks(one)[0])
