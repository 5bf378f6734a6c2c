"""How far training in blockwise FP8 drifts from bfloat16: preset `tiny`, emulated on a CPU by the kernels' definitions.

    python benchmarks/fp8_loss_gap.py                      # 3 seeds, 1,000 steps each: about 30 minutes on two cores
    python benchmarks/fp8_loss_gap.py --json gap.json --plot gap.svg
    python benchmarks/fp8_loss_gap.py --keep runs          # a study that is interrupted goes on with what `runs` has
    python benchmarks/fp8_loss_gap.py --device cuda --workers 9   # the kernels themselves

Every run sees the same batches: bytes of Python's standard library. A seed is that of the initial weights. The gap of a
pair of runs is the mean of |a - b| / b over the last half of the steps, each loss smoothed by a mean over 50 steps. The
published bound for FP8 against bfloat16 is 0.25 % (Ling 2.0 §5.1). Beside it stand two gaps without FP8: between two
seeds, and between a run and itself with initial weights changed by a millionth (`nudged`): what chaos alone does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ling_flow.data.batches import Batch
from ling_flow.model.presets import tiny
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.fp8 import set_precision
from ling_flow.training.loop import StepReport, train
from ling_flow.training.optimizer import build_optimizer, warmup_then_constant
from ling_flow.training.settings import FP8Settings, OptimizerSettings, Precision

SEQUENCES, LENGTH = 12, 128
WARMUP = 50
NUDGE = 1e-6
SMOOTH = 50  # steps of the moving mean
BOUND = 0.0025
KINDS = ("fp8", "bfloat16", "nudged")


class SourceCode:
    """Python's standard library, a byte a token."""

    def __init__(self) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        self.bytes = np.frombuffer(b"".join(path.read_bytes() for path in files)[:4_000_000], dtype=np.uint8)

    def batch(self, step: int) -> Batch:
        starts = np.random.default_rng((0, step)).integers(len(self.bytes) - LENGTH - 1, size=SEQUENCES)
        rows = np.stack([self.bytes[s : s + LENGTH + 1] for s in starts])
        return Batch(torch.from_numpy(rows.astype(np.int64)))


def losses(
    kind: str, seed: int, steps: int, learning_rate: float, bfloat16_layers: tuple[int, ...] = (), device: str = "cpu"
) -> list[float]:
    """Next-token loss of each step, nats."""
    torch.set_num_threads(1)
    model = BailingMoeV2ForCausalLM(tiny())
    model.init_weights(seed)
    if kind == "nudged":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + NUDGE)
    model.to(device)
    precision: Precision = "fp8" if kind == "fp8" else "bfloat16"
    set_precision(model, precision, FP8Settings(bfloat16_layers=bfloat16_layers))
    found: list[float] = []

    def on_step(report: StepReport) -> None:
        assert not report.skipped
        found.append(report.cross_entropy)
        if report.step % 100 == 0:
            print(f"{kind} seed {seed}: step {report.step}, {report.tokens_per_second:,.0f} tokens/s", flush=True)

    train(
        model,
        build_optimizer(model, OptimizerSettings(learning_rate=learning_rate)),
        SourceCode(),
        steps=steps,
        schedule=warmup_then_constant(learning_rate, WARMUP),
        expert_bias_update_rate=1e-2,
        on_step=on_step,
    )
    return found


def kept_losses(keep: Path | None, *run: Any) -> list[float]:
    """`losses(*run)`, from the directory `keep` if they are there."""
    if keep is None:
        return losses(*run)
    file = keep / f"{'_'.join(str(part).replace(' ', '') for part in run)}.json"
    if not file.exists():
        found = losses(*run)
        keep.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    kept: list[float] = json.loads(file.read_text())
    return kept


def smoothed(losses: list[float]) -> np.ndarray:
    """The moving mean."""
    return np.convolve(losses, np.ones(SMOOTH) / SMOOTH, mode="valid")


def gap(run: list[float], reference: list[float]) -> float:
    """Mean relative distance of the smoothed losses over the last half of the steps."""
    a, b = smoothed(run), smoothed(reference)
    last = slice(-(len(run) // 2), None)
    return float((np.abs(a - b) / b)[last].mean())


def lag(run: list[float], reference: list[float]) -> float:
    """How many more steps `run` needs to the same loss, relative: the mean signed gap over the last half of the steps,
    by the slope of log loss over log step that `reference` has there."""
    a, b = np.log(smoothed(run)), np.log(smoothed(reference))
    last = slice(-(len(run) // 2), None)
    log_steps = np.log(np.arange(len(b)) + (SMOOTH + 1) / 2)[last]
    slope = np.polyfit(log_steps, b[last], 1)[0]
    return float(np.expm1((a - b)[last].mean() / -slope))


def plot(curves: dict[str, list[float]], seeds: list[int], path: Path) -> None:
    """Smoothed losses above, relative gaps of each seed below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    smooth = {name: smoothed(values) for name, values in curves.items()}
    steps = np.arange(SMOOTH, SMOOTH + len(next(iter(smooth.values()))))
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True)
    for index, seed in enumerate(seeds):
        color = f"C{index}"
        above.plot(steps, smooth[f"bfloat16/{seed}"], color=color, label=f"bfloat16, seed {seed}", linewidth=1)
        above.plot(steps, smooth[f"fp8/{seed}"], color=color, label=f"FP8, seed {seed}", linewidth=1, linestyle="--")
        difference = smooth[f"fp8/{seed}"] / smooth[f"bfloat16/{seed}"] - 1
        below.plot(steps, 100 * difference, color=color, label=f"FP8, seed {seed}", linewidth=1)
        difference = smooth[f"nudged/{seed}"] / smooth[f"bfloat16/{seed}"] - 1
        below.plot(steps, 100 * difference, color=color, label=f"nudged, seed {seed}", linewidth=1, linestyle=":")
    for one, other in itertools.combinations(seeds, 2):
        difference = smooth[f"bfloat16/{other}"] / smooth[f"bfloat16/{one}"] - 1
        below.plot(steps, 100 * difference, color="0.7", label=f"bfloat16, seeds {one} and {other}", linewidth=1)
    below.axhspan(-100 * BOUND, 100 * BOUND, color="0.93")
    below.axvline(steps[-1] / 2, color="0.5", linewidth=0.5)
    above.set_ylabel("loss, nats per byte")
    below.set_ylabel("against bfloat16, %")
    below.set_ylim(-2, 2)
    below.set_xlabel("step")
    for axis in (above, below):
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument(
        "--bfloat16-layers", type=int, nargs="*", default=[], help="layers that FP8 leaves out, such as -2 -1"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--device", default="cpu", help="cpu (the kernels' definitions) or cuda (the kernels)")
    parser.add_argument("--keep", type=Path, help="directory for the losses of each finished run")
    parser.add_argument("--json", type=Path, help="write losses and gaps to this file")
    parser.add_argument("--plot", type=Path, help="write the figure to this file")
    options = parser.parse_args()
    layers = tuple(options.bfloat16_layers)
    runs = [
        (kind, seed, options.steps, options.learning_rate, layers if kind == "fp8" else (), options.device)
        for kind in KINDS
        for seed in options.seeds
    ]
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(partial(kept_losses, options.keep), *zip(*runs, strict=True)))
    curves = {f"{kind}/{seed}": curve for (kind, seed, *_), curve in zip(runs, found, strict=True)}
    gaps = {
        f"{kind}, seed {seed}": gap(curves[f"{kind}/{seed}"], curves[f"bfloat16/{seed}"])
        for kind in ("fp8", "nudged")
        for seed in options.seeds
    }
    for one, other in itertools.combinations(options.seeds, 2):
        gaps[f"bfloat16, seeds {one} and {other}"] = gap(curves[f"bfloat16/{other}"], curves[f"bfloat16/{one}"])
    for name, value in gaps.items():
        print(f"{name:28} {value:.3%}" + ("" if "fp8" not in name or value <= BOUND else "  above the bound"))
    for kind, seed in itertools.product(("fp8", "nudged"), options.seeds):
        late = lag(curves[f"{kind}/{seed}"], curves[f"bfloat16/{seed}"])
        print(f"{kind}, seed {seed}: {late:+.1%} steps to the same loss")
    if options.json is not None:
        options.json.write_text(json.dumps({"gaps": gaps, "losses": curves}) + "\n")
    if options.plot is not None:
        plot(curves, options.seeds, options.plot)


if __name__ == "__main__":
    main()
