"""The optimizers beside each other: preset `tiny` on the same bytes with each, at several learning rates.

    python benchmarks/optimizers.py [--json out.json]

Trains on Python's standard library as bytes, every run on the same batches from the same weights (seed 0 unless more
are asked for). Told is the mean loss of the last 50 steps, and what one optimizer step takes; the losses do not depend
on what else the machine does, the times do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from fp8_loss_gap import SourceCode

from ling_flow.model.presets import tiny
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.loop import StepReport, train
from ling_flow.training.optimizer import build_optimizer, warmup_then_constant
from ling_flow.training.settings import OptimizerKind, OptimizerSettings

WARMUP = 50
LAST = 50  # steps whose losses are averaged


class Run(NamedTuple):
    """Losses per step in nats per byte; `update_ms` is the median time of an optimizer step, `step_ms` of all of it."""

    losses: list[float]
    update_ms: float
    step_ms: float


def run(kind: OptimizerKind, learning_rate: float, seed: int, steps: int) -> Run:
    """One training run on one thread."""
    torch.set_num_threads(1)
    model = BailingMoeV2ForCausalLM(tiny())
    model.init_weights(seed)
    optimizer = build_optimizer(model, OptimizerSettings(learning_rate=learning_rate, optimizer=kind))
    losses: list[float] = []
    updates: list[float] = []
    seconds: list[float] = []
    started = [0.0]
    optimizer.register_step_pre_hook(lambda *_: started.__setitem__(0, time.perf_counter()))
    optimizer.register_step_post_hook(lambda *_: updates.append(time.perf_counter() - started[0]))

    def on_step(report: StepReport) -> None:
        assert not report.skipped
        losses.append(report.cross_entropy)
        seconds.append(report.seconds)

    train(
        model, optimizer, SourceCode(), steps=steps, schedule=warmup_then_constant(learning_rate, WARMUP),
        expert_bias_update_rate=1e-2, on_step=on_step,
    )  # fmt: skip
    found = Run(losses, 1e3 * statistics.median(updates), 1e3 * statistics.median(seconds))
    print(
        f"{kind:10} {learning_rate:7.1e} seed {seed}: {statistics.mean(losses[-LAST:]):.4f} nats, "
        f"step {found.step_ms:.0f} ms, of it update {found.update_ms:.1f} ms",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"], choices=["adamw", "adamw8bit", "muon"])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--json", type=Path, help="write the losses to this file")
    options = parser.parse_args()
    runs = [
        (kind, rate, seed, options.steps)
        for rate in options.learning_rates
        for kind in options.optimizers
        for seed in options.seeds
    ]
    with ProcessPoolExecutor(options.workers) as pool:
        found = list(pool.map(run, *zip(*runs, strict=True)))
    if options.json is not None:
        table = [
            {"optimizer": kind, "learning_rate": rate, "seed": seed, **one._asdict()}
            for (kind, rate, seed, _), one in zip(runs, found, strict=True)
        ]
        options.json.write_text(json.dumps(table) + "\n")


if __name__ == "__main__":
    main()
