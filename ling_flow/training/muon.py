"""Muon for the hidden matrices, AdamW for all else (Jordan 2024; with the scale of Moonlight, arXiv 2502.16982 §2.2).

`torch.optim.Muon` takes one 2-D matrix per parameter. Ours stack them: experts along the first dimension, fused
projections along the rows. Each matrix is orthogonalised by itself, those of equal shape in one batched product (an
optimizer that goes through 256 experts one by one spends its time starting kernels). The update of a matrix is that of
`torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, to which tests hold it.

Shapes: N matrices, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ling_flow.training.adamw import EagerOptimizer, adamw_

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration: steepest at 0
ITERATIONS = 5
LEAST_NORM = 1e-7
UPDATE_RMS = 0.2  # of an orthogonal update, to be near AdamW's: so both take the same learning rate and weight decay


class Muon(EagerOptimizer):
    """In groups that have `rows`, every parameter is (…, sum of rows, C) and holds matrices of so many rows one below
    the other; their state is `momentum_buffer`. Groups without are AdamW's, with its state."""

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, **settings: Any) -> None:
        super().__init__(params, lr, **settings, rows=None)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        if group["rows"] is None:
            adamw_(parameters, self.state, group)
            return
        for parameter in parameters:
            self._step_matrices(parameter, group)

    def _step_matrices(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, grad, rate = self.state[parameter], parameter.grad, group["lr"]
        assert grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - MOMENTUM)
        update = grad.lerp(momentum, MOMENTUM)  # Nesterov's
        parameter.mul_(1 - rate * group["weight_decay"])
        for matrices, part in zip(parameter.split(group["rows"], -2), update.split(group["rows"], -2), strict=True):
            # A CPU gains nothing by bfloat16, and one that does not know it is twenty times as slow.
            part = part.bfloat16() if part.is_cuda else part
            step = orthogonalised(part.reshape(-1, *part.shape[-2:])).view_as(part)
            matrices.add_(step, alpha=-rate * UPDATE_RMS * math.sqrt(max(part.shape[-2:])))


def orthogonalised(matrices_NRC: Tensor) -> Tensor:
    """Near U·Vᵀ of each matrix U·S·Vᵀ: its singular values move to 0.7 … 1.2. Computed in the type given."""
    a, b, c = COEFFICIENTS
    tall = matrices_NRC.shape[-2] > matrices_NRC.shape[-1]
    x = matrices_NRC.mT if tall else matrices_NRC
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=LEAST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x
