"""Cache, change and kill, on the lifecycle at its smallest size (micro.yaml)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, Called
from tests.dags.test_lifecycle_ir import PHASES

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CONFIG = str(Path(__file__).with_name("micro.yaml"))
Call = Callable[..., Called]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("micro")
    yield home
    subprocess.run([sys.executable, "-m", "ling_flow.cli", "--home", str(home), "stop"], cwd=REPOSITORY, check=False)


def run(call: Call, home: Path, *arguments: str) -> dict[str, Any]:
    done = call("--home", str(home), "run", "--config", CONFIG, "--json", *arguments, timeout=800)
    assert done.code == 0, done.err
    result: dict[str, Any] = done.json
    return result


def computed(result: dict[str, Any]) -> list[str]:
    return [phase for phase, entry in result["phases"].items() if not entry["cached"]]


def test_killed_inside_a_training_step_and_run_again(home: Path, call: Call, environment: dict[str, str]) -> None:
    """kill -9 of the whole process group in the first stage: the next run goes on from the last checkpoint."""
    slow = ["--set", "pretrain_short.tokens=120000", "--set", "pretrain_short.checkpoints_saved=40"]
    command = [sys.executable, "-m", "ling_flow.cli", "--home", str(home), "run", "--config", CONFIG, *slow]
    running = subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list(home.glob("artifacts/pretrain/*.partial/checkpoints/step-*/training_state/files.json")):
        assert running.poll() is None, running.stderr.read() if running.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()

    plan = call("--home", str(home), "plan", "--config", CONFIG, *slow, "--json").json["nodes"]
    states = {node["step"]: (node["state"], node["reason"]) for node in plan}
    assert [step for step, (state, _) in states.items() if state == "cached"] == PHASES[:4]
    assert states["pretrain_short"] == ("run", "begun earlier and not finished; goes on from its last checkpoint")

    result = run(call, home, *slow)
    assert computed(result) == PHASES[4:]
    events = max(home.glob("runs/*/events.jsonl"), key=lambda path: path.stat().st_mtime)
    said = [json.loads(line) for line in events.read_text().splitlines()]
    assert any(
        event["event"] == "log" and "resum" in event["text"] for event in said if event["step"] == "pretrain_short"
    )

    unbroken = call(
        "--config", _write_config(home, "pretrain_short"),
        "--corpus", result["phases"]["prepare_data"]["artifacts"]["corpus"],
        "--scaling_law", result["phases"]["fit_scaling_laws"]["artifacts"]["scaling_law"],
        "--root", str(home / "unbroken"), "--json", module="components.pretrain", timeout=300,
    )  # fmt: skip
    assert unbroken.code == 0, unbroken.err
    ours = Path(result["phases"]["pretrain_short"]["artifacts"]["checkpoints"])
    theirs = Path(unbroken.json["outputs"]["checkpoints"])
    latest = json.loads((ours / "checkpoints.json").read_text())["latest"]
    assert (ours / latest / "model.safetensors").read_bytes() == (theirs / latest / "model.safetensors").read_bytes()


def _write_config(home: Path, phase: str) -> str:
    """The config of a phase of the newest run, as a file for the component's own command line."""
    newest = max(home.glob("runs/*/plan.json"), key=lambda path: path.stat().st_mtime)
    config = next(node["config"] for node in json.loads(newest.read_text()) if node["step"] == phase)
    path = home / f"{phase}.yaml"
    path.write_text(json.dumps(config))
    return str(path)


def test_run_again_nothing_is_computed(home: Path, call: Call) -> None:
    run(call, home)
    assert computed(run(call, home)) == []


def test_a_change_reruns_only_what_depends_on_it(home: Path, call: Call) -> None:
    run(call, home)
    change = ["--set", "evaluate.problems=9"]
    plan = call("--home", str(home), "plan", "--config", CONFIG, *change, "--json").json["nodes"]
    reasons = {node["step"]: node["reason"] for node in plan if node["state"] == "run"}
    assert reasons["evaluate"] == "problems: 8 → 9"
    assert computed(run(call, home, *change)) == ["plan", "evaluate", "register", "deploy"]


def test_a_dead_endpoint_is_brought_back(home: Path, call: Call) -> None:
    run(call, home)
    assert call("--home", str(home), "stop").code == 0
    assert computed(run(call, home)) == ["deploy"]


def test_a_step_that_fails_tells_its_own_error(home: Path, call: Call) -> None:
    done = call("--home", str(home), "run", "--config", CONFIG, "--set", "merge_checkpoints.last_k=5")
    assert done.code == 2
    assert "error: merge_checkpoints.last_k: 5 asked for, but" in done.err
    assert "Traceback" not in done.err


def test_a_damaged_artifact_is_named(home: Path, call: Call) -> None:
    result = run(call, home)
    corpus = Path(result["phases"]["prepare_data"]["artifacts"]["corpus"])
    shard = sorted(corpus.glob("shards/*/train-00000.bin"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    try:
        done = call("--home", str(home), "run", "--config", CONFIG)
        assert done.code == 2
        assert str(shard) in done.err and "damaged" in done.err and "--rebuild prepare_data" in done.err
    finally:
        shard.write_bytes(whole)
