"""Building blocks: RMSNorm, the dense feed-forward, the router, the mixture of experts (Ling 2.0 §2; bailing_moe_v2).

Shapes: B batch, S sequence, T = B·S tokens, D hidden, E experts, K chosen, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ling_flow.kernels.experts import routed_experts
from ling_flow.kernels.rms_norm import rms_norm
from ling_flow.kernels.router import choose_experts, expert_weights
from ling_flow.kernels.swiglu import swiglu
from ling_flow.model.config import ModelConfig


class Linear(nn.Linear):
    """Without bias, and without the default initialisation, which `init_weights` or a checkpoint would only
    overwrite."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """`down(silu(gate x) · up x)`; gate and up are one matrix in memory and two on disk."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


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

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(indices, weights) of the chosen experts, both (T, K)."""
        config = self.config
        scores_TE = functional.linear(x_TD.float(), self.weight.float()).sigmoid()
        indices_TK = choose_experts(
            scores_TE, self.expert_bias, config.num_experts_per_tok, config.n_group, config.topk_group
        )
        return indices_TK, expert_weights(scores_TE, indices_TK, config.routed_scaling_factor)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if self.expert_bias.dtype != torch.float32:  # casting the model must not round the bias
            self.expert_bias = bias.to(self.expert_bias.device)
        return self


class Experts(nn.Module):
    """The routed experts' weights, stacked; on disk each expert has its own three tensors."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, counts_E: Tensor) -> Tensor:
        return routed_experts(x_TD, indices_TK, weights_TK, counts_E, self.gate_up_proj, self.down_proj)


class SparseMoE(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        if config.num_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.shared_intermediate_size)

    def forward(self, x_BSD: Tensor, counted_BS: Tensor | None) -> Tensor:
        """Routed plus shared experts. In training, adds to the router's counts, of the tokens in `counted_BS` (None:
        all)."""
        x_TD = x_BSD.flatten(0, -2)
        indices_TK, weights_TK = self.gate(x_TD)
        experts = self.gate.expert_bias.numel()
        counts_E = torch.bincount(indices_TK.flatten(), minlength=experts)
        if self.training and torch.is_grad_enabled():
            if counted_BS is None:
                self.gate.expert_counts += counts_E
            else:
                self.gate.expert_counts += torch.bincount(indices_TK[counted_BS.flatten()].flatten(), minlength=experts)
        y_TD = self.experts(x_TD, indices_TK, weights_TK, counts_E)
        if hasattr(self, "shared_experts"):
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD.view_as(x_BSD)
