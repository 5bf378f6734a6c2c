"""The optimizers, with decoupled weight decay on matrices only, and the constant-rate schedule (Ling 2.0 §3.2; WSM
§3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ling_flow.model.attention import Attention
from ling_flow.model.layers import MLP, Experts
from ling_flow.model.transformer import MTPLayer
from ling_flow.training.adamw import AdamW
from ling_flow.training.adamw8 import MOMENTS, AdamW8bit
from ling_flow.training.muon import Muon
from ling_flow.training.settings import OptimizerSettings

AnyOptimizer = AdamW | AdamW8bit | Muon


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> AnyOptimizer:
    """The optimizer of all parameters of `model`; vectors (norm weights, biases) are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = hidden_matrices(model) if settings.optimizer == "muon" else {}
    groups: list[dict[str, Any]] = [
        {
            "params": [parameter for parameter in parameters if parameter.dim() > 1 and parameter not in rows],
            "weight_decay": settings.weight_decay,
        },
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    for each in sorted(set(rows.values())):
        stacked = [parameter for parameter in parameters if rows.get(parameter) == each]
        groups.append({"params": stacked, "weight_decay": settings.weight_decay, "rows": each})
    given: dict[str, Any] = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
    if settings.optimizer == "adamw":
        return AdamW(groups, **given)
    if settings.optimizer == "adamw8bit":
        return AdamW8bit(groups, **given)
    return Muon(groups, **given)


def hidden_matrices(model: nn.Module) -> dict[torch.Tensor, tuple[int, ...]]:
    """The parameters that Muon takes, and the rows of each matrix in them: query, key and value apart, gate and up
    apart. Embedding, output head and router are not hidden: what they map from or to are tokens or experts."""
    rows: dict[torch.Tensor, tuple[int, ...]] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            query, key = module.heads * module.head_dim, module.kv_heads * module.head_dim
            rows[module.query_key_value.weight] = (query, key, key)
            rows[module.dense.weight] = (len(module.dense.weight),)
        elif isinstance(module, MLP):
            rows[module.gate_up_proj.weight] = (module.down_proj.in_features,) * 2
            rows[module.down_proj.weight] = (module.down_proj.out_features,)
        elif isinstance(module, Experts):
            _, hidden, width = module.down_proj.shape
            rows[module.gate_up_proj], rows[module.down_proj] = (width, width), (hidden,)
        elif isinstance(module, MTPLayer):
            rows[module.eh_proj.weight] = (module.eh_proj.out_features,)
    return rows


def state_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> set[str]:
    """What `optimizer` keeps of a parameter that it has updated."""
    if isinstance(optimizer, Muon):
        group = next(group for group in optimizer.param_groups if any(parameter is p for p in group["params"]))
        if group["rows"] is not None:
            return {"momentum_buffer"}
    if isinstance(optimizer, AdamW8bit) and optimizer.in_8_bits(parameter):
        return {"step", *MOMENTS}
    return {"step", "exp_avg", "exp_avg_sq"}


def warmup_then_constant(learning_rate: float, warmup_steps: int) -> Callable[[int], float]:
    """Step (0, 1, …, counted over all stages) → learning rate: linear warm-up, then constant for ever (WSM §3.2)."""
    return lambda step: learning_rate * min(1.0, (step + 1) / max(1, warmup_steps))
