"""AdamW with decoupled weight decay on matrices only, and the constant-rate schedule (Ling 2.0 §3.2; WSM §3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ling_flow.training.adamw8 import AdamW8bit
from ling_flow.training.settings import OptimizerSettings


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW | AdamW8bit:
    """AdamW over all parameters of `model`; vectors (norm weights, biases) are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.dim() > 1],
            "weight_decay": settings.weight_decay,
        },
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    kind = AdamW8bit if settings.optimizer == "adamw8bit" else torch.optim.AdamW
    return kind(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)


def warmup_then_constant(learning_rate: float, warmup_steps: int) -> Callable[[int], float]:
    """Step (0, 1, …, counted over all stages) → learning rate: linear warm-up, then constant for ever (WSM §3.2)."""
    return lambda step: learning_rate * min(1.0, (step + 1) / max(1, warmup_steps))
