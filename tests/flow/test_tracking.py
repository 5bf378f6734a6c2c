import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ling_flow.flow import mlflow_store, tracking
from ling_flow.flow.context import Context
from ling_flow.flow.tracking import (
    NullTracker,
    finish_dag_run,
    finish_kfp_run,
    open_tracker,
    record_cached,
    start_dag_run,
)
from tests.conftest import REPOSITORY
from tests.flow.mlflow_server import Server
from tests.ports import free_port

PARENT = {"corpus": {"ref": "/root/prepare_data/abc/corpus", "fingerprint": "abc/corpus"}}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return mlflow_store.default_tracking_uri(tmp_path_factory.mktemp("home"))


def context(tmp_path: Path, uri: str | None, parent: str | None = None) -> Context:
    return Context(home=tmp_path, artifacts=str(tmp_path), tracking_uri=uri, parent_run_id=parent)


def only_run(uri: str, condition: str) -> Any:
    client = mlflow_store.connect(uri)
    (run,) = client.search_runs([mlflow_store.experiment_id(client, mlflow_store.EXPERIMENT)], condition)
    return run


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_no_store_no_record(tmp_path: Path) -> None:
    tracker = open_tracker(context(tmp_path, None))
    assert type(tracker) is NullTracker
    tracker.start_step("pretrain", "pretrain", "f0", {}, {})
    tracker.finish({}, "finished")
    assert tracker.run_id is None


@pytest.mark.slow
def test_a_new_store_is_made_once_by_processes_that_open_it_together(tmp_path: Path) -> None:
    uri = mlflow_store.default_tracking_uri(tmp_path)
    opened = (
        "import os; from ling_flow.flow.mlflow_store import connect; "
        f"connect({uri!r}).create_experiment(str(os.getpid()))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", opened], cwd=REPOSITORY) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0, 0, 0, 0]
    assert len(mlflow_store.connect(uri).search_experiments()) == 5  # theirs and MLflow's own


def test_a_step_under_its_dag_run(tmp_path: Path, uri: str) -> None:
    parent = start_dag_run(uri, "lifecycle-1", "tiny", {"pretrain_short": {"tokens": 5}}, "0.1+abc")
    assert parent is not None
    tracker = open_tracker(context(tmp_path, uri, parent))
    tracker.start_step("pretrain_short", "pretrain", "f1", {"a": {"b": 1}, "names": ["x"]}, PARENT)
    for step in range(3):
        tracker.metrics({"loss": 3.0 - step}, step)
    tracker.trial("trial-0", {"learning_rate": 0.1}, {"loss": 2.5})
    tracker.dataset("stdlib", "/data/stdlib", "d" * 64, "pretrain")
    plot = tmp_path / "loss.txt"
    plot.write_text("a plot")
    tracker.artifact(plot)
    plot.unlink()  # the step may move its files as soon as the call returns
    tracker.model("base", "/root/pretrain/f1/model", {"layers": 4}, {"stage": "base"})
    tracker.finish({"validation_loss": 1.5, "url": "here", "passed": True}, "finished")
    finish_dag_run(uri, parent, "finished")

    client = mlflow_store.connect(uri)
    child = only_run(uri, "tags.`ling_flow.fingerprint` = 'f1'")
    assert child.info.run_id == tracker.run_id
    assert child.info.run_name == "pretrain_short"
    assert child.info.status == "FINISHED"
    assert child.data.tags["mlflow.parentRunId"] == parent
    assert child.data.tags["ling_flow.component"] == "pretrain"
    assert child.data.tags["ling_flow.input.corpus"] == "/root/prepare_data/abc/corpus"
    assert child.data.tags["ling_flow.result.url"] == "here"
    assert child.data.params == {"a.b": "1", "names": '["x"]'}
    assert child.data.metrics == {"loss": 1.0, "validation_loss": 1.5, "passed": 1.0}
    assert [point.step for point in client.get_metric_history(child.info.run_id, "loss")] == [0, 1, 2]
    assert {file.path for file in client.list_artifacts(child.info.run_id)} == {"config.json", "loss.txt"}
    (dataset,) = child.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.tags[0].value) == ("stdlib", "pretrain")

    trial = only_run(uri, "tags.`ling_flow.trial` = 'trial-0'")
    assert trial.data.tags["mlflow.parentRunId"] == child.info.run_id
    assert trial.data.params == {"learning_rate": "0.1"}
    assert (trial.data.metrics, trial.info.status) == ({"loss": 2.5}, "FINISHED")

    (output,) = child.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (str(model.status), model.source_run_id) == ("READY", child.info.run_id)
    assert model.tags["ling_flow.artifact_uri"] == "/root/pretrain/f1/model"
    assert model.tags["ling_flow.fingerprint"] == "f1"

    top = client.get_run(parent)
    assert top.info.status == "FINISHED"
    assert top.data.params == {"preset": "tiny", "pretrain_short.tokens": "5"}
    assert top.data.metrics["pretrain_short.validation_loss"] == 1.5


def test_adopts_the_run_that_the_platform_made(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = mlflow_store.connect(uri)
    given = client.create_run(
        client.create_experiment("platform", artifact_location=str(tmp_path / "platform"))
    ).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    tracker = open_tracker(context(tmp_path, uri, "a-parent-that-does-not-count"))
    assert "MLFLOW_RUN_ID" not in os.environ
    tracker.start_step("deploy", "deploy", "f2", {"x": 1}, {})
    tracker.metrics({"loss": 1.0}, 7)
    tracker.finish({"latency_ms": 3.0}, "finished")
    run = client.get_run(given)
    assert tracker.run_id == given
    assert run.data.tags["ling_flow.fingerprint"] == "f2"
    assert run.data.metrics == {"loss": 1.0, "latency_ms": 3.0}
    assert run.info.status == "RUNNING"  # its maker closes it


def test_steps_of_a_kfp_run_agree_on_one_run_above_them(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LING_FLOW_KFP_RUN_ID", "kfp-1")
    monkeypatch.setenv("RAY_JOB_SUBMISSION_ID", "job-1")
    trackers = [open_tracker(context(tmp_path, uri)) for _ in range(2)]
    for number, tracker in enumerate(trackers):  # both find none, and both make one
        tracker.start_step(f"step_{number}", "pretrain", f"k{number}", {}, {})
    for number, tracker in enumerate(trackers):
        tracker.model(f"step_{number}", f"/root/pretrain/k{number}/model", {}, {})
        tracker.finish({"loss": 1.0}, "finished")
    late = open_tracker(context(tmp_path, uri))
    late.start_step("step_2", "evaluate", "k2", {}, {})
    late.uses_model("/root/pretrain/k0/model")
    client = mlflow_store.connect(uri)
    wait_for(lambda: late.run_id is not None and len(client.get_run(late.run_id).inputs.model_inputs) > 0)

    parent = finish_kfp_run(uri, "kfp-1", "failed")
    assert parent is not None and finish_kfp_run(uri, "kfp-2", "failed") is None
    experiment = mlflow_store.experiment_id(client, mlflow_store.EXPERIMENT)
    runs = client.search_runs([experiment], "tags.`ling_flow.kfp_run_id` = 'kfp-1'")
    above = [run for run in runs if run.data.tags.get("ling_flow.dag_run")]
    below = {run.info.run_name: run for run in runs if run not in above}
    assert [(run.info.run_id, run.info.status) for run in above] == [(parent, "FAILED")]
    assert {run.data.tags["mlflow.parentRunId"] for run in below.values()} == {parent}
    assert {name: run.info.status for name, run in below.items()} == {
        "step_0": "FINISHED",
        "step_1": "FINISHED",
        "step_2": "KILLED",
    }
    assert above[0].data.metrics == {"step_0.loss": 1.0, "step_1.loss": 1.0}
    assert below["step_0"].data.tags["ling_flow.ray_job_id"] == "job-1"
    made, used = below["step_0"].outputs.model_outputs, client.get_run(str(late.run_id)).inputs.model_inputs
    assert [model.model_id for model in used] == [model.model_id for model in made]


def test_a_cached_step_is_recorded_with_the_same_numbers(uri: str) -> None:
    parent = start_dag_run(uri, "lifecycle-2", "tiny", {}, "0.1+abc")
    assert parent is not None
    inputs, result = {"model": "/root/x/f/model"}, {"exact_match": 0.25}
    record_cached(uri, parent, "evaluate", "evaluate", "f3", {"seed": 0}, inputs, result, "0.1+abc")
    run = only_run(uri, "tags.`ling_flow.fingerprint` = 'f3'")
    assert run.data.tags["ling_flow.cached"] == "true"
    assert run.data.tags["ling_flow.code_version"] == "0.1+abc"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert (run.data.metrics, run.data.params, run.info.status) == ({"exact_match": 0.25}, {"seed": "0"}, "FINISHED")


def test_labels_that_are_no_names_for_mlflow(tmp_path: Path, uri: str, capfd: pytest.CaptureFixture[str]) -> None:
    parent = start_dag_run(uri, "lifecycle-4", "tiny", {}, "0.1+abc")
    assert parent is not None
    record_cached(uri, parent, "use (lr=0.1)", "use", "f8", {}, {}, {"n": 5, "text": "a"}, "0.1+abc")
    tracker = open_tracker(context(tmp_path, uri, parent))
    tracker.start_step("use, again", "use", "f9", {}, {})
    tracker.finish({"n": 6})
    for key in ("f8", "f9"):
        assert only_run(uri, f"tags.`ling_flow.fingerprint` = '{key}'").info.status == "FINISHED"
    assert mlflow_store.connect(uri).get_run(parent).data.metrics == {"use _lr_0.1_.n": 5, "use_ again.n": 6}
    assert "record" not in capfd.readouterr().err


def test_a_cached_step_is_closed_although_its_record_is_refused(uri: str) -> None:
    parent = start_dag_run(uri, "lifecycle-5", "tiny", {}, "0.1+abc")
    assert parent is not None
    record_cached(uri, parent, "odd", "odd", "f10", {}, {}, {"what's this": 5}, "0.1+abc")
    assert only_run(uri, "tags.`ling_flow.fingerprint` = 'f10'").info.status == "FINISHED"


def test_the_dag_run_closes_steps_that_were_killed(tmp_path: Path, uri: str) -> None:
    parent = start_dag_run(uri, "lifecycle-3", "tiny", {}, "0.1+abc")
    assert parent is not None
    tracker = open_tracker(context(tmp_path, uri, parent))
    tracker.start_step("pretrain_mid", "pretrain", "f4", {}, {})
    wait_for(lambda: tracker.run_id is not None)
    finish_dag_run(uri, parent, "failed")
    assert only_run(uri, "tags.`ling_flow.fingerprint` = 'f4'").info.status == "KILLED"
    assert mlflow_store.connect(uri).get_run(parent).info.status == "FAILED"


def test_a_refused_record_loses_nothing_else(tmp_path: Path, uri: str, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = open_tracker(context(tmp_path, uri))
    tracker.start_step("odd", "odd", "f5", {}, {})
    tracker.metrics({"a name with 'quotes' is refused": 1.0}, 0)
    tracker.trial("trial", {}, {"fine": 2.0})
    tracker.finish({"loss": 1.0}, "finished")
    run = only_run(uri, "tags.`ling_flow.fingerprint` = 'f5'")
    assert (run.data.metrics, run.info.status) == ({"loss": 1.0}, "FINISHED")
    assert "refused a record" in capfd.readouterr().err


def test_a_store_that_is_away_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = f"http://127.0.0.1:{free_port()}"
    assert start_dag_run(away, "lifecycle", "tiny", {}, "0.1+abc") is None
    assert f"tracking store {away} cannot be used" in capfd.readouterr().err
    tracker = open_tracker(context(tmp_path, away))
    tracker.start_step("pretrain", "pretrain", "f6", {}, {})
    tracker.metrics({"loss": 1.0}, 0)
    time.sleep(1)
    tracker.finish({}, "finished")
    told = capfd.readouterr().err
    assert told.count("does not answer") == 1
    assert "part of the record is lost" in told


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.stop()


@pytest.mark.slow
def test_what_is_said_while_the_server_is_away_arrives_later(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("ling_flow.flow.outbox.RETRY_SECONDS", (0.2, 0.2))
    server.start()
    tracker = open_tracker(context(tmp_path, server.uri))
    tracker.start_step("pretrain", "pretrain", "f7", {}, {})
    tracker.metrics({"loss": 2.0}, 0)
    wait_for(lambda: tracker.run_id is not None)
    server.stop()
    begun = time.monotonic()
    for step in range(1, 2001):
        tracker.metrics({"loss": 1.0}, step)
    assert time.monotonic() - begun < 1  # a training step never waits for the store
    time.sleep(2)
    server.start()
    tracker.finish({"validation_loss": 1.0}, "finished")
    client = mlflow_store.connect(server.uri)
    assert tracker.run_id is not None
    assert len(client.get_metric_history(tracker.run_id, "loss")) == 2001
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    told = capfd.readouterr()
    assert told.err.count("does not answer") == 1
    assert "View run" not in told.out
