"""The bookkeeping of `benchmarks/goodput.py`, on a trainer that only counts: it is started, killed and goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import goodput

STEP, SAVE = 0.01, 0.002  # seconds

COUNTER = f"""
import json, os, sys, time
from pathlib import Path

directory, interval = Path(sys.argv[1]), float(sys.argv[2])
directory.mkdir(parents=True, exist_ok=True)
saved = directory / "saved"
step = int(saved.read_text()) if saved.exists() else 0
last = time.monotonic()
with (directory / "lines.jsonl").open("a", buffering=1) as lines:
    while True:
        time.sleep({STEP})
        step += 1
        print(json.dumps({{"step": step, "seconds": {STEP}}}), file=lines)
        if time.monotonic() - last >= interval:
            (directory / "saving").write_text(str(step))
            os.replace(directory / "saving", saved)
            last = time.monotonic()
            print(json.dumps({{"save": step, "cost": {SAVE}}}), file=lines)
"""


class Counters(goodput.Trainers):
    def __init__(self) -> None:
        self.starts = 0

    def start(self, directory: Path, interval: float) -> subprocess.Popen[bytes]:
        self.starts += 1
        return subprocess.Popen([sys.executable, "-c", COUNTER, str(directory), str(interval)])


def test_useful_are_the_steps_that_counted(tmp_path: Path) -> None:
    counters = Counters()
    row = goodput.measure(counters, tmp_path, 0.1, seconds=4, kill_seconds=1, restart_seconds=0.2)
    assert (row.kills, counters.starts) == (4, 5)  # the last one is stopped by the end of the time
    steps = [line["step"] for line in goodput.lines_of(tmp_path, "step")]
    made_again = len(steps) - len(set(steps))
    assert row.steps_made == len(steps)
    assert row.steps_counted == steps[-1] == row.steps_made - made_again
    assert row.useful == pytest.approx(row.steps_counted * STEP / 4)
    # E(s) = 86400·C/s + F·s/2 + F·A, with one failure a second
    assert row.predicted == pytest.approx(1 - (SAVE / 0.1 + 0.1 / 2 + 0.2))


def test_going_on_is_measured_from_a_checkpoint(tmp_path: Path) -> None:
    costs = goodput.calibrate(tmp_path, Counters())
    assert (costs.step, costs.save) == (STEP, SAVE)
    assert costs.restart > 0
    steps = [line["step"] for line in goodput.lines_of(tmp_path / "saves", "step")]
    assert steps.count(1) == 1 and len(steps) > goodput.CALIBRATION_SAVES  # the last start did not begin anew


def test_a_trainer_that_ends_by_itself_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="the trainer ended by itself with 3"):
        goodput.kill(_ended(3))
    with pytest.raises(SystemExit, match="the trainer ended by itself with 4"):
        goodput.wait_for(_ended(4), tmp_path, 1, "step")


def test_a_line_that_a_kill_cut_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"step": 1, "seconds": 2}\n{"save": 1, "cost": null}\n{"step": 2, "sec')
    assert goodput.lines_of(tmp_path, "step") == [{"step": 1, "seconds": 2}]
    assert goodput.lines_of(tmp_path, "cost") == []


def _ended(code: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])
    process.wait()
    return process
