"""The loss surface a sweep is fitted with, and its gradient (numpy only).

    log L(M, D, η, B) = log floor(M, D) + δ_cell + ½·(κη·u² + κB·v² + 2ρ·√(κη·κB)·u·v)
    u = ln η - ln η*(C),  v = ln B - ln B*(C),  η*(C) = a·C^b,  B*(C) = c·C^d,  C = M·D

One valley whose floor follows two power laws, with curvatures and tilt shared by all computes. With a few dozen noisy
trials this is far better determined than an arg-min per compute followed by a line through the arg-mins: every trial,
near or off the optimum, bears on every parameter, and no grid quantises the optimum. Two forms of the floor: `compute`
and `size_and_tokens` (see law.py).

A cell is one model size at one compute. Its deviation δ from the floor is near 0 (standard deviation 2 %). Without it,
any error in the form of the floor leaks into b and d, whose squares bend the surface along C just as the floor does.

Legend: N readings, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ling_flow.scaling.law import LING_2_LAW, ComputeForm, PowerLaw, SizeAndTokensForm

Array = NDArray[np.float64]

FORMS = ("size_and_tokens", "compute")
# Shared parameters, in this order, before those of the floor. Optima are taken at the centre of the explored computes.
LR, LR_EXPONENT, BATCH, BATCH_EXPONENT, LR_CURVATURE, BATCH_CURVATURE, TILT, FLOOR = range(8)
FLOOR_SIZE = {"compute": 2, "size_and_tokens": 5}
CELL_DEVIATION = 0.02


@dataclass(frozen=True)
class Readings:
    """Loss readings as arrays of N; several readings may come from one trial (`trial_N` is its index)."""

    log_flops_N: Array  # ln of M, training FLOPs per token
    log_tokens_N: Array  # ln of D, tokens
    log_lr_N: Array
    log_batch_N: Array
    log_loss_N: Array
    trial_N: NDArray[np.int64]
    cell_N: NDArray[np.int64]  # -1: of no cell, so on the floor

    def __len__(self) -> int:
        return len(self.log_loss_N)

    @property
    def log_compute_N(self) -> Array:
        return self.log_flops_N + self.log_tokens_N

    def where(self, keep_N: NDArray[np.bool_]) -> Readings:
        return Readings(*(getattr(self, name)[keep_N] for name in self.__dataclass_fields__))

    @property
    def weight_N(self) -> Array:
        """Readings of one trial share its luck (same seed, same data), so each trial weighs 1 in all."""
        count = np.bincount(self.trial_N)
        return 1.0 / count[self.trial_N]


@dataclass(frozen=True)
class Surface:
    """A surface of one `form`, parametrised around the centre of the data, so that its levels and slopes hardly mix."""

    form: str
    log_flops: float  # centre of ln M
    log_tokens: float  # centre of ln D
    cells: int

    @classmethod
    def around(cls, form: str, readings: Readings) -> Surface:
        return cls(
            form,
            float(readings.log_flops_N.mean()),
            float(readings.log_tokens_N.mean()),
            int(readings.cell_N.max()) + 1,
        )

    @property
    def free(self) -> int:
        """Parameters but for the cells' deviations, which are held close to 0."""
        return self._floor_slice.stop

    @property
    def _floor_slice(self) -> slice:
        return slice(FLOOR, FLOOR + FLOOR_SIZE[self.form])

    def prior(self, readings: Readings) -> tuple[Array, Array]:
        """Mean_P and standard deviation_P of the Gaussian prior.

        Weak, except where a tiny sweep says little: the exponents of the hyper-parameters are drawn to the published
        ones (other studies lie within 0.25 of them), the optima to the explored range, the loss exponents to 0.3 ± 0.2
        (Hoffmann et al.: 0.34, 0.28), the irreducible loss to a third of the best loss within a factor 2.
        """
        mean, sd = np.zeros(FLOOR), np.ones(FLOOR)  # the parameters before the floor's
        for at, exponent, values in (
            (LR, LING_2_LAW.learning_rate.exponent, readings.log_lr_N),
            (BATCH, LING_2_LAW.batch_tokens.exponent, readings.log_batch_N),
        ):
            mean[at] = (values.min() + values.max()) / 2
            sd[at] = max((values.max() - values.min()) / 2, math.log(2))
            mean[at + 1], sd[at + 1] = exponent, 0.15
        mean[[LR_CURVATURE, BATCH_CURVATURE]] = math.log(0.03)  # 0.7 % of loss for a factor 2
        sd[TILT] = 0.5
        typical, best = float(np.median(readings.log_loss_N)), float(readings.log_loss_N.min())
        if self.form == "compute":
            floor_mean, floor_sd = [typical, 0.1], [1.0, 0.1]
        else:
            third = typical - math.log(3)
            floor_mean, floor_sd = [best - math.log(3), third, 0.3, third, 0.3], [math.log(2), 1.0, 0.2, 1.0, 0.2]
        cells = [0.0] * self.cells
        return np.array([*mean, *floor_mean, *cells]), np.array([*sd, *floor_sd, *(CELL_DEVIATION for _ in cells)])

    def predict(self, theta_P: Array, readings: Readings) -> tuple[Array, Array]:
        """log loss_N and its Jacobian_NP."""
        z = readings.log_compute_N - self.log_flops - self.log_tokens
        u = readings.log_lr_N - theta_P[LR] - theta_P[LR_EXPONENT] * z
        v = readings.log_batch_N - theta_P[BATCH] - theta_P[BATCH_EXPONENT] * z
        k_lr, k_batch = np.exp(np.clip(theta_P[[LR_CURVATURE, BATCH_CURVATURE]], -20, 5))
        tilt = np.tanh(theta_P[TILT])
        cross = math.sqrt(k_lr * k_batch)
        by_u, by_v = k_lr * u + tilt * cross * v, k_batch * v + tilt * cross * u
        floor_N, floor_jacobian = self._floor(theta_P, readings)
        penalty_N = 0.5 * (u * by_u + v * by_v)
        shared = [
            -by_u,
            -by_u * z,
            -by_v,
            -by_v * z,
            0.5 * (k_lr * u * u + tilt * cross * u * v),
            0.5 * (k_batch * v * v + tilt * cross * u * v),
            cross * u * v * (1 - tilt**2),
        ]
        # A last column of zeros takes the readings of no cell (index -1).
        deviation_P = np.append(theta_P[self._floor_slice.stop :], 0.0)
        jacobian_NP = np.concatenate(
            [np.stack([*shared, *floor_jacobian], axis=1), np.eye(self.cells + 1)[readings.cell_N, :-1]], axis=1
        )
        return floor_N + deviation_P[readings.cell_N] + penalty_N, jacobian_NP

    def _floor(self, theta_P: Array, readings: Readings) -> tuple[Array, list[Array]]:
        m, d = readings.log_flops_N - self.log_flops, readings.log_tokens_N - self.log_tokens
        if self.form == "compute":
            level, exponent = theta_P[self._floor_slice]
            return level - exponent * (m + d), [np.ones_like(m), -(m + d)]
        irreducible, size, size_exponent, data, data_exponent = theta_P[self._floor_slice]
        terms = np.stack([np.full_like(m, irreducible), size - size_exponent * m, data - data_exponent * d])
        top = terms.max(axis=0)
        log_sum = top + np.log(np.exp(terms - top).sum(axis=0))
        share = np.exp(terms - log_sum)
        return log_sum, [share[0], share[1], -share[1] * m, share[2], -share[2] * d]

    def learning_rate(self, theta_P: Array) -> PowerLaw:
        return self._optimum(theta_P, LR)

    def batch_tokens(self, theta_P: Array) -> PowerLaw:
        return self._optimum(theta_P, BATCH)

    def _optimum(self, theta_P: Array, at: int) -> PowerLaw:
        level, exponent = float(theta_P[at]), float(theta_P[at + 1])
        return PowerLaw(coefficient=math.exp(level - exponent * (self.log_flops + self.log_tokens)), exponent=exponent)

    def floor_form(self, theta_P: Array) -> ComputeForm | SizeAndTokensForm:
        """The floor as a law in plain M, D and C."""
        floor = [float(value) for value in theta_P[self._floor_slice]]
        if self.form == "compute":
            return ComputeForm(
                coefficient=math.exp(floor[0] + floor[1] * (self.log_flops + self.log_tokens)), exponent=floor[1]
            )
        return SizeAndTokensForm(
            irreducible=math.exp(floor[0]),
            size_coefficient=math.exp(floor[1] + floor[2] * self.log_flops),
            size_exponent=floor[2],
            tokens_coefficient=math.exp(floor[3] + floor[4] * self.log_tokens),
            tokens_exponent=floor[4],
        )

    def loss_exponent(self, theta_P: Array, readings: Readings) -> float:
        """-d log L / d log C of the floor at the last of `readings`, M and D each growing as the square root of C."""
        if self.form == "compute":
            return float(theta_P[FLOOR + 1])
        _, jacobian = self._floor(theta_P, readings)
        return float(0.5 * (theta_P[FLOOR + 2] * jacobian[1][-1] + theta_P[FLOOR + 4] * jacobian[3][-1]))
