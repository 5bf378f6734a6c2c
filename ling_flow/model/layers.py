"""Building blocks: RMSNorm, the dense feed-forward, the router, the mixture of experts (Ling 2.0 §2; bailing_moe_v2).

Shapes: B batch, S sequence, T = B·S tokens, D hidden, E experts, K chosen, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ling_flow.kernels.embedding import embedding
from ling_flow.kernels.experts import routed_experts
from ling_flow.kernels.fp8_layers import FP8Weight, fp8_linear, fp8_routed_experts
from ling_flow.kernels.products import linear
from ling_flow.kernels.rms_norm import rms_norm
from ling_flow.kernels.router import Routed, balance_loss, route, z_loss
from ling_flow.kernels.swiglu import swiglu
from ling_flow.model.config import ModelConfig, RouterLoss
from ling_flow.model.packing import Packing


class Linear(nn.Linear):
    """Without bias, and without the default initialisation, which `init_weights` or a checkpoint would only
    overwrite. Computes in the input's type, or where `training.fp8` has set `fp8`, in FP8."""

    fp8: FP8Weight | None = None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 is not None:
            return fp8_linear(x, self.weight, self.fp8)
        return linear(x, self.weight)


class Embedding(nn.Embedding):
    """With a gradient that is summed in a fixed order on a GPU too."""

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class MLP(nn.Module):
    """`down(silu(gate x) · up x)`; gate and up are one matrix in memory and two on disk."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Forward(NamedTuple):
    """What every layer is told about the forward pass it is part of."""

    rotary: tuple[Tensor, Tensor]  # (cos, sin), with room for the heads
    packing: Packing | None = None  # documents that must not see each other; None: each row is one
    counted_BS: Tensor | None = None  # tokens that count for balancing the experts; None: all
    router_loss: RouterLoss | None = None
    of_routed: tuple[int, int] | None = None  # rows and tokens of which these are a part, by which losses are divided


class RouterReport(NamedTuple):
    """What a router did in one forward pass. An output of the layer and not a side effect: recomputing a layer changes
    nothing."""

    counts_E: Tensor  # int64: counted tokens that chose each expert
    loss: Tensor  # the router's losses times their coefficients, float32 scalar


class Gate(nn.Module):
    """The router. All of it in float32, whatever the model's type."""

    expert_bias: Tensor
    expert_counts: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.register_buffer("expert_counts", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x_TD: Tensor) -> Routed:
        """The experts of each token."""
        config = self.config
        return route(
            x_TD, self.weight, self.expert_bias,
            config.num_experts_per_tok, config.n_group, config.topk_group, config.routed_scaling_factor,
        )  # fmt: skip

    def report(self, indices_BSK: Tensor, logits_BSE: Tensor, counts_E: Tensor, shared: Forward) -> RouterReport:
        """The counts of the tokens that count (`counts_E` are those of all) and the losses that are wanted."""
        counted_BS, wanted = shared.counted_BS, shared.router_loss
        if counted_BS is not None:  # no indexing by it: on a GPU that waits for the device
            counted_BSK = counted_BS.unsqueeze(-1).expand_as(indices_BSK)
            counts_E = torch.zeros_like(counts_E).scatter_add_(
                0, indices_BSK.flatten(), counted_BSK.flatten().to(counts_E.dtype)
            )
        loss = logits_BSE.new_zeros(())
        if wanted is not None and wanted.wanted:
            if counted_BS is None:
                counted_BS = torch.ones_like(indices_BSK[..., 0], dtype=torch.bool)
            of_rows, of_tokens = shared.of_routed or (None, None)
            if wanted.balance_over == "batch":
                of_rows = None
                logits_BSE, indices_BSK, counted_BS = (
                    part.flatten(0, 1).unsqueeze(0) for part in (logits_BSE, indices_BSK, counted_BS)
                )
            balance = balance_loss(logits_BSE.sigmoid(), indices_BSK, counted_BS, of_rows)
            if wanted.balance_over == "batch" and of_tokens:  # the part's share, by its tokens
                balance = balance * (counted_BS.sum() / of_tokens)
            loss = wanted.balance * balance + wanted.z * z_loss(logits_BSE, counted_BS, of_tokens)
        return RouterReport(counts_E, loss)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if self.expert_bias.dtype != torch.float32:  # casting the model must not round the bias
            self.expert_bias = bias.to(self.expert_bias.device)
        return self


class Experts(nn.Module):
    """The routed experts' weights, stacked; on disk each expert has its own three tensors.

    Computes in the input's type, or where `training.fp8` has set `fp8` (of gate_up and of down), in FP8.
    """

    fp8: tuple[FP8Weight, FP8Weight] | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, counts_E: Tensor) -> Tensor:
        if self.fp8 is not None:
            return fp8_routed_experts(
                x_TD, indices_TK, weights_TK, counts_E, self.gate_up_proj, self.down_proj, *self.fp8
            )
        gate_up, down = self.gate_up_proj.to(x_TD.dtype), self.down_proj.to(x_TD.dtype)
        return routed_experts(x_TD, indices_TK, weights_TK, counts_E, gate_up, down)


class SparseMoE(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        if config.num_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.shared_intermediate_size)

    def forward(self, x_BSD: Tensor, shared: Forward) -> tuple[Tensor, RouterReport]:
        """Routed plus shared experts, and what the router did."""
        x_TD = x_BSD.flatten(0, 1)
        indices_TK, weights_TK, logits_TE, counts_E = self.gate(x_TD)
        y_TD = self.experts(x_TD, indices_TK, weights_TK, counts_E)
        if hasattr(self, "shared_experts"):
            y_TD = y_TD + self.shared_experts(x_TD)
        indices_BSK, logits_BSE = (part.unflatten(0, x_BSD.shape[:2]) for part in (indices_TK, logits_TE))
        return y_TD.view_as(x_BSD), self.gate.report(indices_BSK, logits_BSE, counts_E, shared)
