"""Cache, change and kill, on the lifecycle at its smallest size (micro.yaml)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, Called, run_module, user_environment
from tests.dags.test_lifecycle_ir import PHASES

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CONFIG = [
    "--config", str(Path(__file__).with_name("micro.yaml")),
    # The first stage takes long enough to be killed in.
    "--set", "pretrain_short.tokens=120000", "--set", "pretrain_short.checkpoints_saved=40",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("micro")
    yield home
    lingflow(home, "stop")


def lingflow(home: Path, *arguments: str, module: str = "ling_flow.cli") -> Called:
    return run_module(user_environment(home), *arguments, module=module, timeout=800)


def run(home: Path, *arguments: str) -> dict[str, Any]:
    done = lingflow(home, "run", *CONFIG, "--json", *arguments)
    assert done.code == 0, done.err
    result: dict[str, Any] = done.json
    return result


def planned(home: Path, *arguments: str) -> dict[str, tuple[str, str]]:
    """Step → (state, reason)."""
    nodes = lingflow(home, "plan", *CONFIG, *arguments, "--json").json["nodes"]
    return {node["step"]: (node["state"], node["reason"]) for node in nodes}


def computed(result: dict[str, Any]) -> list[str]:
    return [phase for phase, entry in result["phases"].items() if not entry["cached"]]


@pytest.fixture(scope="module")
def killed(home: Path) -> dict[str, tuple[str, str]]:
    """The plan after kill -9 of a run's whole process group in the first stage."""
    command = [sys.executable, "-m", "ling_flow.cli", "run", *CONFIG]
    running = subprocess.Popen(
        command, cwd=REPOSITORY, env=user_environment(home), start_new_session=True, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 600
    while not list(home.glob("artifacts/pretrain/*.partial/checkpoints/step-*/training_state/files.json")):
        assert running.poll() is None, running.stderr.read() if running.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    return planned(home)


@pytest.fixture(scope="module")
def finished(killed: dict[str, tuple[str, str]], home: Path) -> dict[str, Any]:
    """The run that goes on from there."""
    return run(home)


def test_killed_inside_a_training_step_and_run_again(
    killed: dict[str, tuple[str, str]], finished: dict[str, Any], home: Path
) -> None:
    """It goes on from the last checkpoint, and ends with the bytes of a run that was not killed."""
    assert [step for step, (state, _) in killed.items() if state == "cached"] == PHASES[:4]
    assert killed["pretrain_short"] == ("run", "begun earlier and not finished; goes on from its last checkpoint")
    assert computed(finished) == PHASES[4:]
    events = max(home.glob("runs/*/events.jsonl"), key=lambda path: path.stat().st_mtime)
    said = [json.loads(line) for line in events.read_text().splitlines()]
    assert any(
        event["event"] == "log" and "resum" in event["text"] for event in said if event["step"] == "pretrain_short"
    )

    artifacts = {phase: entry["artifacts"] for phase, entry in finished["phases"].items()}
    unbroken = lingflow(
        home,
        "--config", _write_config(home, "pretrain_short"),
        "--corpus", artifacts["prepare_data"]["corpus"],
        "--scaling_law", artifacts["fit_scaling_laws"]["scaling_law"],
        "--root", str(home / "unbroken"), "--json", module="components.pretrain",
    )  # fmt: skip
    assert unbroken.code == 0, unbroken.err
    ours = Path(artifacts["pretrain_short"]["checkpoints"])
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


def test_run_again_nothing_is_computed(finished: dict[str, Any], home: Path) -> None:
    assert computed(run(home)) == []


def test_a_change_reruns_only_what_depends_on_it(finished: dict[str, Any], home: Path) -> None:
    change = ["--set", "evaluate.problems=9"]
    assert planned(home, *change)["evaluate"] == ("run", "problems: 8 → 9")
    assert computed(run(home, *change)) == ["plan", "evaluate", "register", "deploy"]


def test_a_dead_endpoint_is_brought_back(finished: dict[str, Any], home: Path) -> None:
    assert lingflow(home, "stop").code == 0
    assert computed(run(home)) == ["deploy"]


def test_a_step_that_fails_tells_its_own_error(finished: dict[str, Any], home: Path) -> None:
    done = lingflow(home, "run", *CONFIG, "--set", "capability_pass.examples_per_batch=999")
    assert done.code == 2
    assert "error: capability_pass: examples_per_batch: 999 asked, but only" in done.err
    assert "Traceback" not in done.err


def test_a_damaged_artifact_is_named(finished: dict[str, Any], home: Path) -> None:
    corpus = Path(finished["phases"]["prepare_data"]["artifacts"]["corpus"])
    shard = sorted(corpus.glob("shards/*/train-00000.bin"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    try:
        done = lingflow(home, "run", *CONFIG)
        assert done.code == 2
        assert str(shard) in done.err and "damaged" in done.err and "--rebuild prepare_data" in done.err
    finally:
        shard.write_bytes(whole)
