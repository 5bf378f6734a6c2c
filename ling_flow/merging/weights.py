"""Merge weights that stand in for a learning-rate decay (WSM §3.1). No torch here.

Take checkpoints θ_n…θ_{n+k} of a constant-rate run. Their weighted mean Σ c_j θ_{n+j} equals θ_n minus the run's own
updates, the i-th scaled by w_i = Σ_{j≥i} c_j: as if the rate had been decayed along w. Theorem 3.1 inverts this: for
1 ≥ w_1 ≥ … ≥ w_k ≥ 0 the merge weights are c_k = w_k, c_j = w_j − w_{j+1}, c_0 = 1 − w_1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from ling_flow.errors import UserError

CurveName = Literal["mean", "linear", "1-sqrt", "cosine", "ema"]

CURVES: dict[str, Callable[[float], float]] = {
    "mean": lambda t: 1 - t,
    "linear": lambda t: 1 - t,
    "1-sqrt": lambda t: 1 - math.sqrt(t),
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "ema": lambda t: 1 - 0.1 ** (1 - t),
}
"""Decay curves w(t), t from 0 to 1 over the merge window (WSM §3.1); `mean` and `linear` are one curve."""


def weights_from_decay(decay: Sequence[float]) -> list[float]:
    """Theorem 3.1: decay factors w_1…w_k of the updates → merge weights c_0…c_k, oldest first; they sum to 1.

    Raises:
        UserError: the factors leave [0, 1] or rise; no merge with weights ≥ 0 stands in for such a schedule.
    """
    steps = [1.0, *decay, 0.0]
    if any(later > earlier for earlier, later in pairwise(steps)):
        raise UserError(f"decay factors must fall from at most 1 to at least 0, got {list(decay)}")
    return [earlier - later for earlier, later in pairwise(steps)]


def merge_weights(curve: str, checkpoints: int) -> list[float]:
    """Weights of `checkpoints` checkpoints, oldest first, for the named decay curve taken at t_i = i / checkpoints.

    Raises:
        UserError: unknown curve, or fewer than one checkpoint.
    """
    if curve not in CURVES:
        raise UserError(f"curve: must be one of {', '.join(CURVES)}, got {curve!r}")
    if checkpoints < 1:
        raise UserError(f"checkpoints to merge: must be at least 1, got {checkpoints}")
    return weights_from_decay([CURVES[curve](i / checkpoints) for i in range(1, checkpoints)])
