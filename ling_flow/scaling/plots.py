"""The report of a scaling law: one self-contained HTML page with its plots as SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ling_flow.scaling.design import TrialResult
from ling_flow.scaling.law import Interval, ScalingLaw

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"""


def report_html(law: ScalingLaw, trials: Sequence[TrialResult]) -> str:
    """The page: recommendation, plots of loss, learning rate and batch against compute, and all trials."""
    chosen, powers = law.recommendation, law.hyper_parameters
    clamped = f"; moved into the explored range: {', '.join(chosen.clamped)}" if chosen.clamped else ""
    apart = ""
    if chosen.size_factor is not None and chosen.tokens_factor is not None:
        apart = f" ({chosen.size_factor:.2g} times the largest model, {chosen.tokens_factor:.2g} times the most tokens)"
    rows = [
        (
            "learning rate",
            f"{chosen.learning_rate:.3g}",
            _span(chosen.learning_rate_interval),
            _power(law, "learning_rate"),
        ),
        ("batch, tokens", f"{chosen.batch_tokens:,}", _span(chosen.batch_tokens_interval), _power(law, "batch_tokens")),
        ("loss, nats per token", f"{chosen.predicted_loss:.3f}", _span(chosen.predicted_loss_interval), _form(law)),
    ]
    recommendation = _table(("", "for the target", f"{law.confidence:.0%} interval", "law"), rows)
    trial_rows = [
        (
            trial.name,
            f"{trial.compute_flops:.3g}",
            f"{trial.readings[-1].tokens:,}",
            f"{trial.loss:.4f}" if trial.loss is not None else "diverged",
            f"{trial.seconds:.0f}",
        )
        for trial in trials
    ]
    plots = [
        _loss_plot(law, trials),
        _optimum_plot(law, trials, "learning rate", powers.learning_rate.at, lambda trial: trial.learning_rate,
                      chosen.learning_rate, chosen.learning_rate_interval),
        _optimum_plot(law, trials, "batch, tokens", powers.batch_tokens.at, lambda trial: trial.batch_tokens,
                      chosen.batch_tokens, chosen.batch_tokens_interval),
    ]  # fmt: skip
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Scaling law</title>'
            f"<style>{_STYLE}</style></head><body><h1>Scaling law</h1>",
            f"<p>Target: {chosen.target_compute_flops:.3g} training FLOPs, {chosen.target_tokens:,} tokens, "
            f"{chosen.extrapolation_factor:.1f} times the largest trial{apart}{html.escape(clamped)}.</p>",
            recommendation,
            f"<p>{law.trials} trials with {law.readings} readings, {law.dropped_trials} trials left out; mean residual "
            f"{law.residual:.2%} of loss. {html.escape(law.loss.reason)}.</p>",
            *plots,
            "<h2>Trials</h2>",
            _table(("trial", "FLOPs", "tokens", "loss", "seconds"), trial_rows),
            "</body></html>",
        ]
    )


def _power(law: ScalingLaw, name: str) -> str:
    power = getattr(law.hyper_parameters, name)
    spread = f" ({_span(power.exponent_interval)})" if power.exponent_interval else ""
    return f"{power.coefficient:.3g} · C^{power.exponent:.3f}{spread}"


def _form(law: ScalingLaw) -> str:
    form = law.loss.form
    if form.kind == "compute":
        return f"{form.coefficient:.3g} · C^-{form.exponent:.3f}"
    size, tokens = f"{form.size_coefficient:.3g} · M^-{form.size_exponent:.3f}", f"{form.tokens_coefficient:.3g}"
    return f"{form.irreducible:.3g} + {size} + {tokens} · D^-{form.tokens_exponent:.3f}"


def _span(interval: Interval) -> str:
    return f"{interval.low:.3g} to {interval.high:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>" + "".join(lines) + "</table>"


def _axes() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("training compute C = M·D, FLOPs")
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": title}):  # ids of elements: the same at each run, others in each plot of a page
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return f"<h2>{html.escape(title)}</h2>" + svg[svg.index("<svg") :]


def _loss_plot(law: ScalingLaw, trials: Sequence[TrialResult]) -> str:
    """Loss along each trial; the fitted floor of each size over its computes, and of the target's to the target."""
    figure, axes = _axes()
    chosen = law.recommendation
    sizes = sorted({(trial.model_flops_per_token, trial.hidden_size) for trial in trials})
    for index, (flops, hidden_size) in enumerate(sizes):
        color = f"C{index}"
        mine = [trial for trial in trials if trial.model_flops_per_token == flops]
        for trial in mine:
            points = [(reading.compute_flops, reading.loss) for reading in trial.readings if reading.loss is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=color, alpha=0.35, markersize=3, linewidth=0.8)
        computes = [reading.compute_flops for trial in mine for reading in trial.readings]
        grid = np.geomspace(min(computes), max(computes))
        axes.plot(grid, [law.loss.form.at(flops, c / flops) for c in grid], color=color, label=f"width {hidden_size}")
    target_flops = chosen.target_compute_flops / chosen.target_tokens
    grid = np.geomspace(law.compute_range.low, chosen.target_compute_flops)
    axes.plot(grid, [law.loss.form.at(target_flops, c / target_flops) for c in grid], "k--", label="target's model")
    _mark_target(axes, law, chosen.predicted_loss, chosen.predicted_loss_interval)
    axes.set_ylabel("validation loss, nats per token")
    axes.legend()
    return _svg(figure, "Loss")


def _optimum_plot(
    law: ScalingLaw,
    trials: Sequence[TrialResult],
    name: str,
    optimum: Callable[[float], float],
    value: Callable[[TrialResult], float],
    chosen: float,
    interval: Interval,
) -> str:
    """The fitted optimum over compute, and the trials coloured by how far they end above the best of their size."""
    figure, axes = _axes()
    ends = [(trial, trial.loss) for trial in trials if trial.loss is not None]
    best = {
        flops: min(loss for trial, loss in ends if trial.model_flops_per_token == flops)
        for flops in {trial.model_flops_per_token for trial, _ in ends}
    }
    above = [100 * (loss / best[trial.model_flops_per_token] - 1) for trial, loss in ends]
    dots = axes.scatter(
        [trial.compute_flops for trial, _ in ends], [value(trial) for trial, _ in ends], c=above, cmap="viridis_r", s=45
    )
    figure.colorbar(dots, label="% above the best of its size")
    grid = np.geomspace(law.compute_range.low, law.recommendation.target_compute_flops)
    axes.plot(grid, [optimum(compute) for compute in grid], "k--", label="fitted optimum")
    _mark_target(axes, law, chosen, interval)
    axes.set_ylabel(name)
    axes.legend()
    return _svg(figure, name[0].upper() + name[1:])


def _mark_target(axes: Any, law: ScalingLaw, chosen: float, interval: Interval) -> None:
    compute = law.recommendation.target_compute_flops
    axes.vlines(compute, interval.low, interval.high, color="crimson", linewidth=2)
    axes.plot([compute], [chosen], "*", color="crimson", markersize=13, label="recommended for the target")
