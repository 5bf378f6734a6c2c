"""Sweeps drawn from a known law."""

import math

import numpy as np

from ling_flow.scaling.design import Reading, TrialResult
from ling_flow.scaling.law import HyperParameterLaw


def sweep(
    law: HyperParameterLaw,
    flops_per_token: tuple[float, ...],
    tokens: tuple[float, ...],
    learning_rates: tuple[float, ...],
    batches: tuple[int, ...],
    *,
    loss=lambda m, d: 1.2 + 90 * m**-0.3 + 50 * d**-0.25,
    curvature: float = 0.05,
    noise: float = 0.0,
    seed: int = 0,
    checkerboard: bool = True,
) -> list[TrialResult]:
    """One rung per pair of `flops_per_token` and `tokens`; three readings per trial that share half of their noise."""
    generator = np.random.default_rng(seed)
    trials = []
    for index, (m, final) in enumerate(zip(flops_per_token, tokens, strict=True)):
        for row, learning_rate in enumerate(learning_rates):
            for column, batch in enumerate(batches):
                if checkerboard and (row + column + index) % 2:
                    continue
                luck = generator.normal(0, noise)
                readings = []
                for fraction in (0.25, 0.5, 1.0):
                    d = final * fraction
                    u = math.log(learning_rate / law.learning_rate.at(m * d))
                    v = math.log(batch / law.batch_tokens.at(m * d))
                    log_loss = (
                        math.log(loss(m, d))
                        + curvature / 2 * (u * u + v * v)
                        + (luck + generator.normal(0, noise)) / math.sqrt(2)
                    )
                    readings.append(
                        Reading(step=int(d / batch), tokens=round(d), compute_flops=m * d, loss=math.exp(log_loss))
                    )
                name = f"{index}-{row}-{column}"
                trials.append(
                    TrialResult(
                        name=name,
                        fingerprint=name,
                        hidden_size=64,
                        active_parameters=round(m / 6),
                        model_flops_per_token=m,
                        learning_rate=learning_rate,
                        batch_tokens=batch,
                        readings=tuple(readings),
                        seconds=1.0,
                    )
                )
    return trials
