"""AdamW with the moments of matrices in 8 bits (`kernels/adamw8.py`); a quarter of the optimizer's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ling_flow.kernels.adamw8 import Moments, Rates, adamw8_, new_moments
from ling_flow.training.adamw import adamw_

LEAST_ELEMENTS = 4096  # smaller parameters, and vectors, keep float32 moments: they cost nothing and matter most
MOMENTS = Moments._fields


class AdamW8bit(torch.optim.Optimizer):
    """Decoupled weight decay, for float32 parameters. The state of a parameter is that of `torch.optim.AdamW`; where
    it has 8 bits, `exp_avg` and `exp_avg_sq` are codes in uint8 with the parameter's shape, and `exp_avg_scale` and
    `exp_avg_sq_scale` their blocks' float32 scales."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @staticmethod
    def in_8_bits(parameter: Tensor) -> bool:
        """Whether the moments of a parameter have 8 bits."""
        return parameter.dim() > 1 and parameter.numel() >= LEAST_ELEMENTS

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            wide = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.in_8_bits(parameter):
                    wide.append(parameter)
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())  # on the CPU: reading it waits for nothing
                    state.update(new_moments(parameter)._asdict())
                state["step"] += 1
                rates = Rates(int(state["step"]), group["lr"], group["betas"], group["eps"], group["weight_decay"])
                adamw8_(parameter, parameter.grad, Moments(*(state[name] for name in MOMENTS)), rates)
            adamw_(wide, self.state, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; the codes come back as the bytes they were."""
        super().load_state_dict(state_dict)  # casts what is of a float parameter to float32: 0 … 255 survive that
        for state in self.state.values():
            if "exp_avg_scale" in state:
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = state[name].to(torch.uint8)
