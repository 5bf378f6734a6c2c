"""torch's AdamW in its fused form, by itself and for the parameters that another optimizer leaves to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class EagerOptimizer(torch.optim.Optimizer):
    """An optimizer that `torch.compile` never sees. torch hides two methods of its own from that compiler, and AdamW's
    step talks to it: the first call imports all of it, 1.6 s in every process that trains (torch 2.13).

    Args:
        defaults: of a group: at least `lr`, `betas`, `eps` and `weight_decay`.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **defaults: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` as torch's optimizers take it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update([parameter for parameter in group["params"] if parameter.grad is not None], group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError


class AdamW(EagerOptimizer):
    """`torch.optim.AdamW(fused=True)`: every tensor is read and written once."""

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        adamw_(parameters, self.state, group)


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
