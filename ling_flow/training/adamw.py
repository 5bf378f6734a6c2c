"""One step of torch's AdamW on some of an optimizer's parameters; the rest it updates in its own way."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def adamw_(parameters: list[Tensor], state: MutableMapping[Tensor, Any], group: dict[str, Any]) -> None:
    """Update the parameters, which have gradients, and their state, which is that of `torch.optim.AdamW`."""
    if not parameters:
        return
    for parameter in parameters:
        if not state[parameter]:
            state[parameter]["step"] = torch.zeros((), device=parameter.device)  # where the fused update wants it
            state[parameter]["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    states = [state[parameter] for parameter in parameters]
    beta1, beta2 = group["betas"]
    adamw(
        parameters,
        [parameter.grad for parameter in parameters if parameter.grad is not None],
        [found["exp_avg"] for found in states],
        [found["exp_avg_sq"] for found in states],
        [],
        [found["step"] for found in states],
        fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
        eps=group["eps"], maximize=False,
    )  # fmt: skip
