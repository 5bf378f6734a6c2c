"""DAG runs under faults: a step that fails and works later, two runs at once, one that is cancelled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ling_flow.flow.artifact import ArtifactStore
from ling_flow.flow.dag import load_dag, make_plan
from ling_flow.flow.runner import OPEN_RUN, OpenRun, _close_abandoned
from ling_flow.flow.tracking import start_dag_run
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]

TOYS = Path(__file__).parent / "toy"
DAG = str(TOYS / "faulty.py")


def started(dag: str = DAG, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ling_flow.cli", "run", dag, "--json", *options],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(run: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def ends(group: int) -> bool:
    """Whether no process of a group is left, in the end."""
    for _ in range(400):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def mlflow_states(home: Path) -> dict[str, list[str]]:
    """Run name → the states of its runs."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    states: dict[str, list[str]] = {}
    for run in client.search_runs(experiments):
        states.setdefault(run.info.run_name, []).append(run.info.status)
    return states


def test_a_step_that_fails_twice_and_then_works(home: Path, calls: Path) -> None:
    result = finished(started())
    assert calls.read_text().split() == ["draw", "average", "average", "average"]
    assert result["phases"]["average"]["metrics"]["average"] > 0
    assert sorted(mlflow_states(home)["average"]) == ["FAILED", "FAILED", "FINISHED"]


def test_two_runs_at_once_make_each_artifact_once(calls: Path) -> None:
    results = [finished(run) for run in [started(), started()]]
    assert calls.read_text().split() == ["draw", "average", "average", "average"]
    first, second = ({name: phase["artifacts"] for name, phase in result["phases"].items()} for result in results)
    assert first == second
    for name in ("draw_series", "average"):
        assert sorted(result["phases"][name]["cached"] for result in results) == [False, True]


def test_a_cancelled_run_leaves_nothing_running_and_goes_on_later(home: Path, calls: Path) -> None:
    run = started()
    numbers = home / "artifacts" / "draw"
    while len(list(numbers.glob("*.partial/numbers/*.txt"))) < 3:
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "run again to go on from here" in err
    assert list(home.glob("artifacts/*/*/manifest.json")) == []
    assert ends(run.pid), "a step of the run is left"
    states = mlflow_states(home)
    assert (states["faulty"], states["draw_series"]) == (["KILLED"], ["FAILED"])

    result = finished(started())
    assert result["phases"]["draw_series"]["metrics"]["started_at"] >= 3
    assert calls.read_text().split().count("draw") == 2


def test_what_a_killed_run_left_open_in_mlflow_is_closed_by_the_next(home: Path, calls: Path) -> None:
    run = started()
    while not list(home.glob("artifacts/draw/*.partial/numbers/*.txt")):
        assert run.poll() is None
        time.sleep(0.05)
    run.kill()
    run.communicate()
    assert ends(run.pid), "a step of the run is left"
    assert mlflow_states(home)["faulty"] == ["RUNNING"]
    finished(started())
    assert sorted(mlflow_states(home)["faulty"]) == ["FINISHED", "KILLED"]
    assert calls.read_text().split().count("draw") == 2
    assert list(home.glob("runs/*/mlflow.json")) == []


def test_a_note_of_an_open_run_says_how_it_ended_and_is_settled_once(home: Path) -> None:
    uri = f"sqlite:///{home}/mlflow.db"
    failed, other = (start_dag_run(uri, name, "", {}, "code") for name in ("failed", "other"))
    assert failed is not None and other is not None
    notes = {
        "ended while the store was away": OpenRun(tracking_uri=uri, run_id=failed, status="failed").model_dump_json(),
        "deleted in the store": OpenRun(tracking_uri=uri, run_id="0" * 32).model_dump_json(),
        "of another store": OpenRun(tracking_uri="http://127.0.0.1:9", run_id=other).model_dump_json(),
        "no note of ours": "[1]",
    }
    for name, text in notes.items():
        directory = home / "runs" / name
        directory.mkdir(parents=True)
        (directory / OPEN_RUN).write_text(text)
    _close_abandoned(home, uri)
    assert mlflow_states(home) == {"failed": ["FAILED"], "other": ["RUNNING"]}
    assert {path.parent.name for path in home.glob(f"runs/*/{OPEN_RUN}")} == {"of another store", "no note of ours"}


def test_texts_that_name_the_interpreter_arrive_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "python3 home"
    monkeypatch.setenv("LING_FLOW_HOME", str(home))
    dag = load_dag(str(TOYS / "named.py"))
    (node,) = make_plan(dag, {}, ArtifactStore(home / "artifacts", home / "cache"), frozenset())
    phases = finished(started(str(TOYS / "named.py")))["phases"]
    assert list(phases) == ["draw_python3_docs"]
    assert phases["draw_python3_docs"]["artifacts"]["numbers"] == f"{home}/artifacts/draw/{node.fingerprint}/numbers"


def test_two_steps_of_one_component_are_told_apart(home: Path) -> None:
    twice = str(TOYS / "twice.py")
    first, again, anew = (
        finished(started(twice, *options)) for options in ((), ("--rebuild", "average-2"), ("--no-cache",))
    )
    labels = ["draw_a,b", "average", "average-2"]
    cached = [[run["phases"][label]["cached"] for label in labels] for run in (first, again, anew)]
    assert cached == [[False, False, False], [True, True, False], [False, False, False]]
    averages = {label: first["phases"][label]["metrics"]["average"] for label in labels[1:]}
    assert averages["average"] != averages["average-2"]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    for run in (first, again, anew):
        recorded = client.get_run(run["mlflow_run_id"]).data.metrics
        assert {label: recorded[f"{label}.average"] for label in averages} == averages
    assert {status for statuses in mlflow_states(home).values() for status in statuses} == {"FINISHED"}
