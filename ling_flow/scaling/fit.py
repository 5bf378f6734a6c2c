"""Fit the scaling law of a wind-tunnel sweep and recommend hyper-parameters for a target.

Loss: Huber on log residuals (δ = 1e-3, so almost the absolute error: robust to a bad trial), minimised by L-BFGS from
a grid of starts; practice of Hoffmann et al. 2022, which the Ling scaling laws follow. A Gaussian prior (surface.py)
keeps ill-determined exponents sane.

Intervals: bootstrap by *trial*. Each trial receives the residuals of a trial drawn at random, all its readings
together, on top of the fitted loss, and the prior's mean is redrawn. The design stays whole (resampling the trials of a
fractional design leaves samples that determine nothing, and an absolute-error fit sticks to the points it passes
through), and where the data say nothing the interval is the prior's, not zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ling_flow.errors import UserError
from ling_flow.scaling.design import TrialResult
from ling_flow.scaling.law import HyperParameterLaw, Interval, LossFit, Recommendation, ScalingLaw
from ling_flow.scaling.surface import (
    BATCH,
    BATCH_CURVATURE,
    BATCH_EXPONENT,
    FORMS,
    LR,
    LR_CURVATURE,
    LR_EXPONENT,
    Array,
    Readings,
    Surface,
)
from ling_flow.scaling.target import Target, extrapolation_factor, multiple_inside

CONFIDENCE = 0.9
MINIMUM_TRIALS = 6
WORSE_DESCRIPTION = 1.5


def usable_readings(trials: Sequence[TrialResult], near_optimal: float) -> Readings:
    """Readings of `trials` fit for the surface, ordered by compute.

    A valley is a parabola only near its floor, so readings above (1 + near_optimal) × the best of the same model at the
    same compute are left out, as are diverged ones.

    Raises:
        UserError: too few are left to fit anything.
    """
    rows = []
    for index, trial in enumerate(trials):
        fixed = (math.log(trial.learning_rate), math.log(trial.batch_tokens), index)
        for position, reading in enumerate(trial.readings):
            if reading.loss is not None:
                point = (math.log(trial.model_flops_per_token), math.log(reading.tokens), math.log(reading.loss))
                rows.append((*point, *fixed, position))
    rows.sort(key=lambda row: (row[0] + row[1], row))
    flops, tokens, loss, lr, batch, trial_of, place = np.array(rows, dtype=np.float64).reshape(-1, 7).T
    # Trials of one size have the same budget, and so the same position along the run is the same compute.
    cell_N = _numbered(flops + 1e6 * place)
    best_N = np.array([loss[cell_N == cell].min() for cell in range(len(set(cell_N)))])[cell_N]
    near_N = loss <= best_N + math.log1p(near_optimal)
    left = len(set(trial_of[near_N]))
    if left < MINIMUM_TRIALS:
        raise UserError(
            f"trials: {left} of {len(trials)} trials have a usable loss, at least {MINIMUM_TRIALS} are needed"
        )
    for values, name in ((lr, "learning rates"), (batch, "batch sizes")):
        if len(set(values[near_N])) < 2:
            raise UserError(f"trials: all usable trials have the same {name}, at least two are needed")
    near = Readings(flops, tokens, lr, batch, loss, trial_N=_numbered(trial_of), cell_N=cell_N).where(near_N)
    return replace(near, trial_N=_numbered(near.trial_N), cell_N=_numbered(near.cell_N))


def _numbered(labels: NDArray[Any]) -> NDArray[np.int64]:
    """0, 1, … for the distinct `labels`."""
    return np.unique(labels, return_inverse=True)[1]


def objective(
    surface: Surface, readings: Readings, weight_N: Array, mean_P: Array, sd_P: Array, delta: float, noise: float
) -> Callable[[Array], tuple[float, Array]]:
    """Negative log posterior and its gradient: Huber of log residuals in units of `noise`, and the prior."""

    def value(theta_P: Array) -> tuple[float, Array]:
        predicted_N, jacobian_NP = surface.predict(theta_P, readings)
        residual_N = predicted_N - readings.log_loss_N
        clipped_N = np.clip(residual_N, -delta, delta)
        huber_N = clipped_N * (residual_N - 0.5 * clipped_N)
        scaled_P = (theta_P - mean_P) / sd_P
        total = float(weight_N @ huber_N) / (delta * noise) + 0.5 * float(scaled_P @ scaled_P)
        return total, jacobian_NP.T @ (weight_N * clipped_N) / (delta * noise) + scaled_P / sd_P

    return value


def _minimise(value: Callable[[Array], tuple[float, Array]], start_P: Array) -> tuple[Array, float]:
    from scipy.optimize import minimize

    done = minimize(value, start_P, jac=True, method="L-BFGS-B", options={"maxiter": 300, "maxcor": 20})
    return done.x, float(done.fun)


def fit_surface(surface: Surface, readings: Readings, delta: float) -> tuple[Array, float]:
    """Best parameters_P over a grid of starts, and the mean absolute noise of log loss.

    The noise weighs data against prior, so it is estimated from a first fit and the fit repeated.
    """
    mean_P, sd_P = surface.prior(readings)
    starts = []
    for lr, batch, curvature in itertools.product((-0.5, 0.5), (-0.5, 0.5), (-1.0, 1.0)):
        start_P = mean_P.copy()
        start_P[LR] += lr * sd_P[LR]
        start_P[BATCH] += batch * sd_P[BATCH]
        start_P[[LR_CURVATURE, BATCH_CURVATURE]] += curvature
        starts.append(start_P)
    noise = 0.01
    for _ in range(2):
        value = objective(surface, readings, readings.weight_N, mean_P, sd_P, delta, noise)
        theta_P, _ = min((_minimise(value, start_P) for start_P in starts), key=lambda found: found[1])
        residual_N = surface.predict(theta_P, readings)[0] - readings.log_loss_N
        mean_residual = float(np.average(np.abs(residual_N), weights=readings.weight_N))
        noise = max(mean_residual * _widening(len(readings), surface.free), 1e-4)
        starts = [theta_P]
    return theta_P, noise


def _choose_form(readings: Readings, delta: float) -> tuple[str, dict[str, float], str]:
    """The form of the floor that best foretells the largest computes when fitted without them, which is its purpose.

    A handful of held-out readings can flatter a form by luck, so one that describes the whole sweep far worse is out.
    """
    sizes = len(np.unique(readings.log_flops_N.round(6)))
    if sizes < 2:
        return "compute", {}, "all trials have one model size, so size and tokens cannot be told apart"
    held_N = readings.log_compute_N > readings.log_compute_N.max() - math.log(1.7)
    train = readings.where(~held_N)
    if len(set(train.trial_N)) < MINIMUM_TRIALS:
        return "compute", {}, "too few computes to hold out the largest, so the form with fewest parameters is used"
    train = replace(train, trial_N=_numbered(train.trial_N), cell_N=_numbered(train.cell_N))
    held = readings.where(held_N)
    held = replace(held, cell_N=np.full(len(held), -1))
    noise, errors = {}, {}
    for form in FORMS:
        _, noise[form] = fit_surface(Surface.around(form, readings), readings, delta)
        surface = Surface.around(form, train)
        theta_P, _ = fit_surface(surface, train, delta)
        errors[form] = float(np.abs(surface.predict(theta_P, held)[0] - held.log_loss_N).mean())
    best, other = sorted(FORMS, key=lambda form: errors[form])
    if noise[best] > WORSE_DESCRIPTION * noise[other]:
        best, other = other, best
        reason = f"{best} describes the sweep to {noise[best]:.2%}, {other} only to {noise[other]:.2%}"
    else:
        reason = f"{best} foretells the held-out largest computes to {errors[best]:.2%}, {other} to {errors[other]:.2%}"
    return best, errors, reason


def fit_scaling_law(
    trials: Sequence[TrialResult],
    target: Target,
    *,
    huber_delta: float = 1e-3,
    bootstrap_samples: int = 100,
    seed: int = 0,
    near_optimal: float = 0.15,
    batch_multiple_tokens: int = 128,
    allow_extrapolation_factor: float = 100.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ScalingLaw:
    """Fit the surface, its intervals and the recommendation for `target`.

    Args:
        near_optimal: fraction above the best loss of its cell up to which a reading is used.
        batch_multiple_tokens: the recommended batch is a multiple of this many tokens.
        allow_extrapolation_factor: largest target compute, in units of the largest trial's.
        progress: called with bootstrap samples done and wanted.

    Raises:
        UserError: the trials cannot carry a fit, or the target is further off than allowed.
    """
    readings = usable_readings(trials, near_optimal)
    largest = float(np.exp(readings.log_compute_N.max()))
    factor = extrapolation_factor(target, largest, allow_extrapolation_factor)
    form, held_out, reason = _choose_form(readings, huber_delta)
    surface = Surface.around(form, readings)
    theta_P, noise = fit_surface(surface, readings, huber_delta)
    residual_N = surface.predict(theta_P, readings)[0] - readings.log_loss_N

    mean_P, sd_P = surface.prior(readings)
    generator = np.random.default_rng(seed)
    samples = []
    for sample in range(bootstrap_samples):
        resampled = _resample(readings, residual_N, surface.free, generator)
        drawn_P = generator.normal(mean_P, sd_P)
        value = objective(surface, resampled, readings.weight_N, drawn_P, sd_P, huber_delta, noise)
        samples.append(_minimise(value, theta_P)[0])
        progress(sample + 1, bootstrap_samples)

    def interval(of: Callable[[Array], float]) -> Interval:
        low, high = np.quantile([of(sample_P) for sample_P in samples], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Interval(low=float(low), high=float(high))

    compute = target.compute_flops
    lr_range, batch_range = _range(readings.log_lr_N), _range(readings.log_batch_N)
    learning_rate, batch = surface.learning_rate(theta_P), surface.batch_tokens(theta_P)
    chosen_lr = min(max(learning_rate.at(compute), lr_range.low), lr_range.high)
    chosen_batch = min(max(batch.at(compute), batch_range.low), batch_range.high)
    clamped = [
        name
        for name, chosen, law in (("learning_rate", chosen_lr, learning_rate), ("batch_tokens", chosen_batch, batch))
        if not math.isclose(chosen, law.at(compute), rel_tol=1e-9)
    ]
    batch_tokens = multiple_inside(chosen_batch, batch_multiple_tokens, batch_range)
    at_target = _at(target, chosen_lr, batch_tokens)

    # Compute alone may hide that a form of size and tokens is asked far outside of either.
    apart = form == "size_and_tokens"
    size_range, tokens_range = (
        _range(values_N) if apart else None for values_N in (readings.log_flops_N, readings.log_tokens_N)
    )

    def predicted_loss(parameters_P: Array) -> float:
        return float(np.exp(surface.predict(parameters_P, at_target)[0][0]))

    return ScalingLaw(
        loss=LossFit(
            form=surface.floor_form(theta_P),
            exponent=surface.loss_exponent(theta_P, readings),
            exponent_interval=interval(lambda sample_P: surface.loss_exponent(sample_P, readings)),
            held_out_error=held_out,
            reason=reason,
        ),
        hyper_parameters=HyperParameterLaw(
            learning_rate=learning_rate.model_copy(
                update={"exponent_interval": interval(lambda p: float(p[LR_EXPONENT]))}
            ),
            batch_tokens=batch.model_copy(update={"exponent_interval": interval(lambda p: float(p[BATCH_EXPONENT]))}),
        ),
        learning_rate_curvature=float(np.exp(theta_P[LR_CURVATURE])),
        batch_curvature=float(np.exp(theta_P[BATCH_CURVATURE])),
        residual=float(np.abs(residual_N).mean()),
        trials=int(readings.trial_N.max()) + 1,
        readings=len(readings),
        dropped_trials=len(trials) - int(readings.trial_N.max()) - 1,
        confidence=CONFIDENCE,
        compute_range=_range(readings.log_compute_N),
        size_range=size_range,
        tokens_range=tokens_range,
        learning_rate_range=lr_range,
        batch_tokens_range=batch_range,
        recommendation=Recommendation(
            target_compute_flops=compute,
            target_tokens=target.tokens,
            learning_rate=chosen_lr,
            learning_rate_interval=interval(lambda p: surface.learning_rate(p).at(compute)),
            batch_tokens=batch_tokens,
            batch_tokens_interval=interval(lambda p: surface.batch_tokens(p).at(compute)),
            predicted_loss=predicted_loss(theta_P),
            predicted_loss_interval=interval(predicted_loss),
            extrapolation_factor=factor,
            size_factor=target.model_flops_per_token / size_range.high if size_range else None,
            tokens_factor=target.tokens / tokens_range.high if tokens_range else None,
            clamped=tuple(clamped),
        ),
    )


def _resample(readings: Readings, residual_N: Array, parameters: int, generator: np.random.Generator) -> Readings:
    """`readings` with the fitted loss plus, for each trial, the residuals of a random trial with a random sign.

    Residuals are widened for the degrees of freedom that the fit has used up.
    """
    widened_N = residual_N * _widening(len(readings), parameters)
    rows = [np.flatnonzero(readings.trial_N == trial) for trial in range(int(readings.trial_N.max()) + 1)]
    noise_N = np.empty_like(residual_N)
    for own in rows:
        donor = rows[generator.integers(len(rows))]
        noise_N[own] = generator.choice((-1.0, 1.0)) * np.resize(widened_N[donor], len(own))
    return replace(readings, log_loss_N=readings.log_loss_N + residual_N + noise_N)


def _widening(readings: int, parameters: int) -> float:
    return readings / max(readings - parameters, 1)


def _range(log_values_N: Array) -> Interval:
    return Interval(low=float(np.exp(log_values_N.min())), high=float(np.exp(log_values_N.max())))


def _at(target: Target, learning_rate: float, batch_tokens: int) -> Readings:
    """One reading of the target, of no cell and with no loss yet."""
    values = (target.model_flops_per_token, target.tokens, learning_rate, batch_tokens)
    flops, tokens, lr, batch = (np.array([math.log(value)]) for value in values)
    return Readings(flops, tokens, lr, batch, np.zeros(1), trial_N=np.zeros(1, dtype=np.int64), cell_N=np.full(1, -1))
