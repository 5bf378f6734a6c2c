"""Pre-training beside a real MLflow server that is killed, and comes back after a while."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from components.pretrain import pretrain
from ling_flow.flow import mlflow_store, tracking
from ling_flow.flow.tracking import Tracker
from tests.components.pretraining import config, make_inputs
from tests.flow.mlflow_server import Server
from tests.watching import found_below

pytestmark = [pytest.mark.slow]

AWAY_SECONDS = float(os.environ.get("LING_FLOW_TEST_AWAY_SECONDS", "20"))  # up to a minute and a half
STEPS = 200


class Remembering(Tracker):
    """A tracker that also keeps what it is told, and holds training up: until MLflow has answered for the first time,
    which can take longer than all of it, and a little at every step, so that the server goes in the middle."""

    def __init__(self, uri: str) -> None:
        self.told: set[tuple[str, int, float]] = set()
        super().__init__(uri, mlflow_store.EXPERIMENT, None, None)

    def start_step(self, *arguments: Any) -> None:
        super().start_step(*arguments)
        until = time.monotonic() + 200
        while self.run_id is None and time.monotonic() < until:
            time.sleep(0.05)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.told |= {(name, step, value) for name, value in values.items()}
        super().metrics(values, step)
        time.sleep(0.02)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def test_metrics_of_every_step_are_there_after_the_server_was_gone(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "RETURN_SECONDS", AWAY_SECONDS + 200)  # a crowded machine starts servers slowly
    root = tmp_path / "artifacts"
    inputs = make_inputs(root, tmp_path / "texts")
    client = mlflow_store.connect(server.uri)  # imports MLflow, which takes seconds
    client.search_experiments()
    tracker = Remembering(server.uri)
    newest = [0, 0]  # checkpoint when the server went and when it came back

    def wait_for_checkpoint_after(step: int) -> int:
        until = time.monotonic() + 200
        while time.monotonic() < until:
            found = max((int(path.name.removeprefix("step-")) for path in found_below(root, "step-*")), default=0)
            if found > step:
                return found
            time.sleep(0.01)
        return step

    def fault() -> None:
        newest[0] = wait_for_checkpoint_after(0)
        server.stop(signal.SIGKILL)
        time.sleep(AWAY_SECONDS)
        newest[1] = wait_for_checkpoint_after(newest[0])
        server.start()

    thread = threading.Thread(target=fault)
    thread.start()
    outcome = pretrain(
        config(tokens=64 * STEPS, checkpoints_saved=8, validation_tokens=64), root=root, tracker=tracker, **inputs
    )
    thread.join()
    assert outcome.result.steps == STEPS
    assert newest[0] < newest[1]  # training went on in between
    assert {step for name, step, _ in tracker.told if name == "loss"} == set(range(1, STEPS + 1))

    assert tracker.run_id is not None
    run = client.get_run(tracker.run_id)
    names = {name for name, _, _ in tracker.told}
    found = {
        (name, point.step, point.value) for name in names for point in client.get_metric_history(tracker.run_id, name)
    }
    missing = tracker.told - found
    assert not missing
    assert run.info.status == "FINISHED"
    assert run.data.metrics["steps"] == STEPS  # the result
    told = capfd.readouterr().err
    assert told.count("does not answer") == 1
    assert "lost" not in told
