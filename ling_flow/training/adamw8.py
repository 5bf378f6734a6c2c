"""AdamW with the moments of matrices in 8 bits (`kernels/adamw8.py`); a quarter of the optimizer's memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ling_flow.kernels.adamw8 import Moments, Rates, adamw8_, new_moments
from ling_flow.training.adamw import EagerOptimizer, adamw_

LEAST_ELEMENTS = 4096  # smaller parameters, and vectors, keep float32 moments: they cost nothing and matter most
MOMENTS = Moments._fields


class AdamW8bit(EagerOptimizer):
    """Decoupled weight decay, for float32 parameters. The state of a parameter is that of `torch.optim.AdamW`; where
    it has 8 bits, `exp_avg` and `exp_avg_sq` are codes in uint8 with the parameter's shape, and `exp_avg_scale` and
    `exp_avg_sq_scale` their blocks' float32 scales."""

    @staticmethod
    def in_8_bits(parameter: Tensor) -> bool:
        """Whether the moments of a parameter have 8 bits."""
        return parameter.dim() > 1 and parameter.numel() >= LEAST_ELEMENTS

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        adamw_([parameter for parameter in parameters if not self.in_8_bits(parameter)], self.state, group)
        for parameter in filter(self.in_8_bits, parameters):
            state, grad = self.state[parameter], parameter.grad
            assert grad is not None
            if not state:
                state["step"] = torch.zeros(())  # on the CPU: reading it waits for nothing
                state.update(new_moments(parameter)._asdict())
            state["step"] += 1
            rates = Rates(int(state["step"]), group["lr"], group["betas"], group["eps"], group["weight_decay"])
            adamw8_(parameter, grad, Moments(*(state[name] for name in MOMENTS)), rates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; the codes come back as the bytes they were."""
        super().load_state_dict(state_dict)  # casts what is of a float parameter to float32: 0 … 255 survive that
        for state in self.state.values():
            if "exp_avg_scale" in state:
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = state[name].to(torch.uint8)
