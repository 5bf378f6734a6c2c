"""Share of time that trains when the trainer is killed again and again, by the interval between two saves.

    python benchmarks/goodput.py                                # about 10 minutes: kills every 60 s on average
    python benchmarks/goodput.py --preset tiny --minutes 1.5 --kill-seconds 10 --json figures.json

A model of a preset (default `small`) on random tokens. First a step, what a save takes from training, and going on
after a kill are measured; from these comes the interval of the formula (Ling 2.0, appendix A). Then the interval, its
half and its double are each given the same time and the same kills (`kill -9`, their number by the mean, their moments
at random). Useful are the steps that counted in the end × the median step of that part; the rest of the time went into
saving, steps that were lost, and starting again. Beside it stands what the formula expects from the median cost of the
saves of that part. One run has few kills: repeat it before you tell neighbouring intervals apart.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from ling_flow.data.batches import Batch
from ling_flow.model.presets import model_preset
from ling_flow.training import stage as stages
from ling_flow.training.interval import SaveClock, best_interval, expected_loss
from ling_flow.training.retention import Retention
from ling_flow.training.settings import OptimizerSettings, StageSettings

DAY = 86_400
LENGTH, SEQUENCES = 256, 2
CALIBRATION_STEPS, CALIBRATION_SAVES = 12, 5
SETTINGS = StageSettings(
    stage="goodput",
    steps=1_000_000,  # more than there is time for
    sequence_length=LENGTH,
    sequences_per_batch=SEQUENCES,
    sequences_per_forward=SEQUENCES,
    optimizer=OptimizerSettings(learning_rate=1e-4),
    warmup_steps=0,
    expert_bias_update_rate=1e-3,
    checkpoints_saved=1,
    retention=Retention(window=1),
)


class RandomRows:
    """A batch is a pure function of the step, as those of a corpus are."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(self.vocabulary, (SEQUENCES, LENGTH + 1), generator=generator)
        return Batch(tokens, None, torch.zeros(SEQUENCES, dtype=torch.int64))

    def drawn(self, steps: int) -> dict[str, int]:
        return {}


class FixedClock(SaveClock):
    """Saves at a given interval, and measures what a save costs as ever."""

    def __init__(self, seconds: float) -> None:
        super().__init__(failures_per_day=1)
        self.saved()
        self.seconds = seconds

    @property
    def interval(self) -> float:
        return self.seconds


def train(directory: Path, preset: str, interval: float, threads: int) -> None:
    """The process that is killed: a line of `lines.jsonl` for every step and every save."""
    torch.set_num_threads(threads)
    clock = FixedClock(interval)
    stages.SaveClock = lambda failures_per_day: clock  # type: ignore[assignment, misc]
    (directory / "tokenizer").mkdir(parents=True, exist_ok=True)
    checkpoints = directory / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    with (directory / "lines.jsonl").open("a", buffering=1) as lines:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = model_preset(preset)
        run = stages.open_stage(checkpoints, SETTINGS, config, seed=0, previous=None, device=device, log=print)
        stages.run_stage(
            run,
            checkpoints,
            RandomRows(config.vocab_size),  # type: ignore[arg-type]
            SETTINGS,
            tokenizer_dir=directory / "tokenizer",
            on_step=lambda report: print(json.dumps({"step": report.step, "seconds": report.seconds}), file=lines),
            on_saved=lambda report: print(json.dumps({"save": report.step, "cost": clock.cost}), file=lines),
        )


class Trainers:
    """Starts what is killed."""

    def __init__(self, preset: str, threads: int) -> None:
        self.options = ["--preset", preset, "--threads", str(threads)]

    def start(self, directory: Path, interval: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, __file__, "--train", str(directory), str(interval), *self.options]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        sys.exit(f"the trainer ended by itself with {process.returncode}")
    process.send_signal(signal.SIGKILL)
    process.wait()


def lines_of(directory: Path, key: str) -> list[dict[str, float]]:
    """The lines in which `key` has a value."""
    path = directory / "lines.jsonl"
    found = path.read_text().split("\n")[:-1] if path.exists() else []  # the last may be cut by a kill
    lines = [json.loads(line) for line in found if line.endswith("}")]
    return [line for line in lines if line.get(key) is not None]


class Costs(NamedTuple):
    """In seconds: a step without saves, what a save takes from training (medians), what going on after a kill takes."""

    step: float
    save: float
    restart: float


def calibrate(directory: Path, trainers: Trainers) -> Costs:
    """What a step, a save, and going on after a kill take."""
    plain, saving = directory / "steps", directory / "saves"
    process = trainers.start(plain, 1e9)
    steps = [line["seconds"] for line in wait_for(process, plain, CALIBRATION_STEPS + 3, "step")]
    kill(process)
    step = statistics.median(steps[3:])
    process = trainers.start(saving, CALIBRATION_STEPS * step / 2)
    saves = wait_for(process, saving, CALIBRATION_SAVES, "cost")
    kill(process)
    made, started = len(lines_of(saving, "step")), time.monotonic()
    process = trainers.start(saving, 1e9)  # goes on from what was saved, as after a failure
    wait_for(process, saving, made + 1, "step")
    restart = time.monotonic() - started - step
    kill(process)
    return Costs(step, statistics.median(line["cost"] for line in saves), restart)


def wait_for(process: subprocess.Popen[bytes], directory: Path, count: int, key: str) -> list[dict[str, float]]:
    """The lines that have `key`, once there are `count`."""
    while len(lines := lines_of(directory, key)) < count:
        time.sleep(0.1)
        if process.poll() is not None:
            sys.exit(f"the trainer ended by itself with {process.returncode}")
    return lines


class Row(NamedTuple):
    """What became of one interval; seconds and save cost are medians."""

    interval_seconds: float
    kills: int
    steps_made: int
    steps_counted: int
    step_seconds: float
    save_seconds: float
    useful: float
    predicted: float


def measure(
    trainers: Trainers, directory: Path, interval: float, seconds: float, kill_seconds: float, restart_seconds: float
) -> Row:
    """Train for `seconds`, killed on the way."""
    draw = random.Random(0)
    begun = time.monotonic()
    moments = sorted(draw.uniform(0, seconds) for _ in range(round(seconds / kill_seconds)))
    for moment in (*moments, seconds):
        process = trainers.start(directory, interval)
        time.sleep(max(0.0, begun + moment - time.monotonic()))
        kill(process)
    steps = lines_of(directory, "step")
    step = statistics.median(line["seconds"] for line in steps)
    saves = [line["cost"] for line in lines_of(directory, "cost")]
    if not saves:
        sys.exit(f"no save was measured at an interval of {interval:.1f} s: give more --minutes")
    save = statistics.median(saves)
    counted = int(steps[-1]["step"])
    expected = expected_loss(interval, save, len(moments) * DAY / seconds, restart_seconds)
    return Row(interval, len(moments), len(steps), counted, step, save, counted * step / seconds, 1 - expected / DAY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("tiny", "small"), default="small")
    parser.add_argument("--minutes", type=float, default=10, help="of all three intervals together")
    parser.add_argument("--kill-seconds", type=float, default=60, help="mean time between two kills")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--train", nargs=2, metavar=("DIRECTORY", "INTERVAL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(Path(arguments.train[0]), arguments.preset, float(arguments.train[1]), arguments.threads)
        return
    trainers = Trainers(arguments.preset, arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        costs = calibrate(Path(scratch), trainers)
        failures = DAY / arguments.kill_seconds
        best = best_interval(costs.save, failures)
        print(f"step {costs.step:.3f} s, a save costs {costs.save:.3f} s, going on {costs.restart:.1f} s")
        print(f"best interval {best:.1f} s")
        print(
            f"{'interval':>20} {'kills':>6} {'made':>6} {'counted':>8} {'step':>7} {'save':>7} {'useful':>7} "
            f"{'formula':>8}"
        )
        rows = {}
        for name, factor in (("formula / 2", 0.5), ("formula", 1.0), ("formula × 2", 2.0)):
            directory, seconds = Path(scratch) / name, 60 * arguments.minutes / 3
            row = measure(trainers, directory, factor * best, seconds, arguments.kill_seconds, costs.restart)
            rows[name] = row._asdict()
            print(
                f"{name:>12} {row.interval_seconds:5.1f} s {row.kills:6} {row.steps_made:6} {row.steps_counted:8} "
                f"{row.step_seconds:5.3f} s {row.save_seconds:5.3f} s {row.useful:7.1%} {row.predicted:8.1%}",
                flush=True,
            )
    if arguments.json:
        figures = {"seconds": costs._asdict(), "kill_seconds": arguments.kill_seconds, "rows": rows}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
