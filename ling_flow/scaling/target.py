"""What a recommendation is for, and what a sweep must cover to carry it: asked by the plan and by the fit. No NumPy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ling_flow.errors import UserError
from ling_flow.scaling.law import Interval


@dataclass(frozen=True)
class Target:
    """What the recommendation is for."""

    model_flops_per_token: float  # M, training FLOPs per non-embedding token
    tokens: int  # D

    @property
    def compute_flops(self) -> float:
        return self.model_flops_per_token * self.tokens


def extrapolation_factor(target: Target, largest_flops: float, allowed: float) -> float:
    """The target's compute over that of the largest trial.

    Raises:
        UserError: it is more than `allowed`.
    """
    factor = target.compute_flops / largest_flops
    if factor > allowed:
        raise UserError(
            f"allow_extrapolation_factor: the target's {target.compute_flops:.3g} FLOPs are {factor:.1f} times "
            f"the largest trial's {largest_flops:.3g}, more than {allowed:g}; "
            "run larger trials, lower the target, or raise the limit"
        )
    return factor


def multiple_inside(batch: float, multiple: int, explored: Interval) -> int:
    """The multiple nearest to `batch`, in tokens, that the sweep has explored.

    Raises:
        UserError: there is none.
    """
    slack = 1e-9  # `explored` may have gone through a logarithm
    lowest, highest = math.ceil(explored.low / multiple - slack), math.floor(explored.high / multiple + slack)
    if lowest > highest:
        raise UserError(
            f"batch_multiple_tokens: no multiple of {multiple} lies between {explored.low:.0f} and "
            f"{explored.high:.0f} tokens, the batches of the sweep; choose a smaller one"
        )
    return min(max(round(batch / multiple), lowest), highest) * multiple
