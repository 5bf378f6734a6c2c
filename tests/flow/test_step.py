"""Running a step: cache, rebuild, failure, resume, races, events."""

import json
import math
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, field_serializer, field_validator
from toy.average import AverageConfig, average
from toy.draw import DrawConfig, draw
from toy.planned import PublishConfig, publish

from ling_flow.config import StrictModel
from ling_flow.errors import SystemFault, UserError
from ling_flow.flow import mlflow_store
from ling_flow.flow.artifact import content_digest
from ling_flow.flow.component import Dataset, Model, Output, Resources, Step, component
from ling_flow.flow.tracking import NullTracker, default_tracking_uri

pytestmark = pytest.mark.usefixtures("home")


class Recorder(NullTracker):
    """A tracker that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def start_step(
        self, label: str, component: str, fingerprint: str, config: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> None:
        self.told.append(("start", label, component, fingerprint, dict(config), dict(inputs)))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.told.append(("metrics", dict(values), step))

    def finish(self, result: Mapping[str, Any], status: str = "finished") -> None:
        self.told.append(("finish", dict(result), status))


def entries(home: Path, name: str) -> list[str]:
    """What lies in a component's directory of the artifact root."""
    return sorted(path.name for path in (home / "artifacts" / name).iterdir())


def test_second_call_is_served_without_running_the_body(home: Path, calls: Path) -> None:
    first = draw({"count": 3})
    second = draw(DrawConfig(count=3, stop_at=99))  # a context field does not matter
    assert calls.read_text() == "draw\n"
    assert (first.cached, second.cached) == (False, True)
    assert second.result == first.result and second.outputs == first.outputs and second.seconds == first.seconds
    assert first.outputs["numbers"] == home / "artifacts" / "draw" / first.fingerprint / "numbers"
    assert not draw({"count": 4}).cached and calls.read_text() == "draw\n" * 2


@pytest.mark.slow
def test_on_kubeflow_a_cached_step_records_itself(
    home: Path, calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There, no process drives the DAG that could."""
    made = draw({"count": 3})
    uri = default_tracking_uri(home)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert draw({"count": 3}).cached
    assert not (home / "mlflow.db").exists(), "elsewhere the runner records it"
    monkeypatch.setenv("LING_FLOW_KFP_RUN_ID", "kfp-9")
    assert draw({"count": 3}).cached and calls.read_text() == "draw\n"
    client = mlflow_store.connect(uri)
    experiment = mlflow_store.experiment_id(client, mlflow_store.EXPERIMENT)
    (run,) = client.search_runs([experiment], "tags.`ling_flow.cached` = 'true'")
    assert (run.info.run_name, run.info.status) == ("draw_series", "FINISHED")
    assert run.data.tags["ling_flow.fingerprint"] == made.fingerprint
    assert run.data.tags["mlflow.parentRunId"] == mlflow_store.find_kfp_parent(client, experiment, "kfp-9")

    for store in ("http://127.0.0.1:9", "nonsense://store"):  # away; of another opinion
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
        assert draw({"count": 3}).cached, "the step has what it was asked for"
        assert "the cached step is not recorded" in capsys.readouterr().err


def test_manifest_tells_the_whole_story(home: Path) -> None:
    drawn = draw({"count": 3})
    averaged = average({"power": 2}, numbers=drawn.outputs["numbers"])
    manifest = json.loads((home / "artifacts" / "average" / averaged.fingerprint / "manifest.json").read_text())
    reference = {"ref": str(drawn.outputs["numbers"]), "fingerprint": f"{drawn.fingerprint}/numbers"}
    assert manifest["inputs"] == {"numbers": {**reference, "digest": content_digest(drawn.manifest, "numbers")}}
    assert manifest["outputs"] == {
        "model": {"kind": "system.Model", "contract": {"unit": "one"}}
    }  # passed on by the body
    assert manifest["identity"] == {"power": 2, "fail": "no"}
    assert manifest["config"] == {**manifest["identity"], "pause": 0.0}
    assert manifest["result"] == averaged.result.model_dump()
    drawn_manifest = json.loads((home / "artifacts" / "draw" / drawn.fingerprint / "manifest.json").read_text())
    assert drawn_manifest["label"] == "draw_series" and "stop_at" not in drawn_manifest["identity"]


def test_optional_inputs_bear_identity_only_when_given() -> None:
    numbers = draw({"count": 3}).outputs["numbers"]
    alone = average({"power": 2}, numbers=numbers)
    assert average({"power": 2}, numbers=numbers, previous=None).cached
    followed = average({"power": 2}, numbers=numbers, previous=alone.outputs["model"])
    assert followed.result.had_previous and followed.fingerprint != alone.fingerprint


def test_inputs_are_checked_by_name_kind_and_existence() -> None:
    drawn = draw({"count": 3})
    numbers = drawn.outputs["numbers"]
    for given, message in (
        ({}, "input 'numbers' is missing; give it a step's output (Dataset)"),
        ({"numbers": numbers, "nubmers": numbers}, "no input called 'nubmers'; inputs: numbers, summary, previous"),
        ({"numbers": drawn.outputs["summary"]}, "must be a Dataset, but"),
        ({"numbers": numbers.parent / "digits"}, "no such output; draw has: numbers, summary, report"),
        ({"numbers": "/x/draw/ffff/numbers"}, "is not a step's output"),
    ):
        with pytest.raises(UserError) as caught:
            average({"power": 2}, **given)
        assert message in str(caught.value) and str(caught.value).startswith("average: ")


def test_damaged_input_is_refused_and_rebuild_heals_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw({"count": 3})
    file = drawn.outputs["numbers"] / "0001.txt"
    whole = file.read_text()
    file.write_text(whole[:-1] + ("1" if whole[-1] != "1" else "2"))  # same size: only reading it in full can tell
    assert draw({"count": 3}).cached
    with pytest.raises(UserError, match=r"numbers/0001\.txt: damaged, its SHA-256 differs.*--rebuild draw_series"):
        average({"power": 2}, numbers=drawn.outputs["numbers"])
    assert not (home / "artifacts" / "average").exists()
    file.unlink()
    with pytest.raises(UserError, match=r"numbers/0001\.txt: missing; run again with --rebuild draw_series"):
        draw({"count": 3})
    monkeypatch.setenv("LING_FLOW_REBUILD", '["other", "draw_series"]')
    assert not draw({"count": 3}).cached
    monkeypatch.delenv("LING_FLOW_REBUILD")
    assert file.read_text() == whole and draw({"count": 3}).cached
    assert entries(home, "draw") == [drawn.fingerprint]


@pytest.mark.parametrize(
    ("fail", "error", "message"),
    [
        ("user", UserError, "power: give a smaller one"),
        ("system", SystemFault, "the server is away"),
        ("defect", ZeroDivisionError, "a bug of ours"),
        ("nan", UserError, "average: result average is nan: the computation diverged"),
        ("contract", UserError, "average: contract model.rate is nan: all its numbers must be finite"),
        ("leave", RuntimeError, r"average called sys.exit\(0\); it must return its result or raise an error"),
    ],
)
def test_a_failing_body_leaves_nothing(home: Path, fail: str, error: type[Exception], message: str) -> None:
    numbers = draw({"count": 3}).outputs["numbers"]
    recorder = Recorder()
    with pytest.raises(error, match=message):
        average({"power": 2, "fail": fail}, numbers=numbers, tracker=recorder)
    assert entries(home, "average") == []
    assert recorder.told[-1] == ("finish", {}, "failed")


def test_tracker_hears_start_metrics_and_result_once() -> None:
    recorder = Recorder()
    outcome = draw({"count": 3}, tracker=recorder)
    assert [entry[0] for entry in recorder.told] == ["start", "metrics", "finish"]
    assert recorder.told[0][1:4] == ("draw_series", "draw", outcome.fingerprint)
    assert recorder.told[1] == ("metrics", {"mean": outcome.result.mean}, 3)
    assert recorder.told[2][1]["mean"] == outcome.result.mean
    draw({"count": 3}, tracker=recorder)
    assert len(recorder.told) == 3


def test_events_go_to_the_file_as_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    path = tmp_path / "events.jsonl"
    monkeypatch.setenv("LING_FLOW_EVENTS", str(path))
    outcome = draw({"count": 3})
    draw({"count": 3})
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] != "progress"] == ["start", "metrics", "done", "done"]
    assert {event["step"] for event in events} == {"draw_series"}
    last = [event for event in events if event["event"] == "progress"][-1]
    assert (last["done"], last["total"]) == (3, 3) and set(last["metrics"]) == {"value"}
    assert [event["cached"] for event in events if event["event"] == "done"] == [False, True]
    assert events[-1]["result"]["mean"] == outcome.result.mean and set(events[-1]["outputs"]) == {
        "numbers",
        "summary",
        "report",
    }
    assert capfd.readouterr() == ("", "")


def test_progress_is_thinned_for_people(capfd) -> None:
    draw({"count": 50})
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "draw_series: started" and lines[-1].startswith("draw_series: done in ")
    assert lines[-2].startswith("draw_series: 50/50  value ") and len(lines) < 10


def test_an_unwritable_event_file_does_not_stop_the_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LING_FLOW_EVENTS", str(tmp_path / "no" / "directory"))
    assert draw({"count": 3}).result.ok


def toy(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_killed_resumable_step_goes_on_where_it_was(home: Path) -> None:
    process = toy("toy.draw", "--count", "6", "--stop_at", "4")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert [name.partition(".")[2] for name in entries(home, "draw")] == ["partial"]
    outcome = draw({"count": 6})
    assert (outcome.cached, outcome.result.started_at, outcome.result.count) == (False, 4, 6)
    assert entries(home, "draw") == [outcome.fingerprint]


def test_a_step_told_to_end_clears_up(home: Path, calls: Path) -> None:
    numbers = str(draw({"count": 3}).outputs["numbers"])
    process = toy("toy.average", "--power", "2", "--numbers", numbers, "--pause", "60")
    while not list((home / "artifacts").glob("average/*.partial/model/half.txt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert entries(home, "average") == []


def test_two_processes_make_an_artifact_once(calls: Path) -> None:
    arguments = ("toy.draw", "--count", "30", "--pause", "0.02", "--json")
    processes = [toy(*arguments) for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    outcomes = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    assert calls.read_text() == "draw\n"
    assert sorted(outcome["cached"] for outcome in outcomes) == [False, True, True]
    assert len({json.dumps({**outcome, "cached": None}) for outcome in outcomes}) == 1
    assert any("waiting: another process makes it" in err for _, err in outputs)


def test_side_effects_are_checked_before_they_are_believed(tmp_path: Path) -> None:
    config = PublishConfig(directory=tmp_path)
    assert (publish(config).cached, publish(config).cached) == (False, True)
    (tmp_path / "mark").unlink()
    assert not publish(config).cached and (tmp_path / "mark").exists()


class FileConfig(StrictModel):
    path: Path = Field(description="File to copy")
    digest: str = Field("", description="Its content, pinned")


class FileResult(StrictModel):
    size: int = Field(description="Bytes")


@component(
    version=1,
    resources=Resources(),
    resolve=lambda config: config.model_copy(update={"digest": config.path.read_text()}),
    label=lambda config: f"copy_{config.digest}",
)
def copy(config: FileConfig, copied: Output[Dataset], step: Step) -> FileResult:
    """Copy a file."""
    (copied.path / "copy").write_bytes(config.path.read_bytes())
    step.log(f"root {step.root}, code {step.code_version}")
    return FileResult(size=config.path.stat().st_size)


def test_resolve_pins_outside_content(tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_text("one")
    first = copy({"path": path})
    assert copy({"path": path}).cached and first.label == "copy_one" and first.manifest.config["digest"] == "one"
    path.write_text("two!")
    assert copy({"path": path}).result.size == 4


@component(version=1, resources=Resources())
def wrong(config: FileConfig) -> FileResult:
    """Return the wrong thing."""
    return "wrong"  # type: ignore[return-value]


class Nested(StrictModel):
    scores: tuple[dict[str, float], ...] = Field(description="A number within")


@component(version=1, resources=Resources())
def diverges(config: FileConfig) -> Nested:
    """Return what is no number."""
    return Nested(scores=({"loss": math.nan},))


def test_a_number_within_a_result_is_checked_too(home: Path) -> None:
    with pytest.raises(UserError, match=r"result scores\.0\.loss is nan: the computation diverged"):
        diverges({"path": "x"})
    assert entries(home, "diverges") == []


class Half(StrictModel):
    share: float = Field(description="Read back as half of it")

    @field_validator("share")
    @classmethod
    def _at_most_one(cls, share: float) -> float:
        if share > 1:
            raise ValueError("must be at most 1")
        return share

    @field_serializer("share")
    def _percent(self, share: float) -> float:
        return 100 * share


@component(version=1, resources=Resources())
def lossy(config: FileConfig) -> Half:
    """Return what is not written as it is read."""
    return Half(share=0.5)


def test_a_result_that_could_not_be_read_back_is_not_committed(home: Path) -> None:
    with pytest.raises(TypeError, match=r"lossy returned what cannot be read back: result\.share: must be at most 1"):
        lossy({"path": "x"})
    assert entries(home, "lossy") == []


@component(version=1, resources=Resources())
def foreign(config: FileConfig, corpus: Output[Dataset], model: Output[Model]) -> FileResult:
    """Write files that have the names of ours."""
    (corpus.path / "corpus.json").write_text('{"sources": {"books": 3}}')
    (model.path / "config.json").write_text("// by hand")
    return FileResult(size=0)


def test_files_of_other_shape_are_not_recorded(home: Path) -> None:
    told: list[tuple[Any, ...]] = []

    class Outputs(Recorder):
        def dataset(self, name: str, source: str, digest: str, context: str) -> None:
            told.append((name, context))

        def model(self, name: str, path: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
            told.append((name, dict(params)))

    recorder = Outputs()
    assert not foreign({"path": "x"}, tracker=recorder).cached
    assert told == [("corpus", "output"), ("foreign", {})] and recorder.told[-1][2] == "finished"

    class Broken(Recorder):
        def dataset(self, name: str, source: str, digest: str, context: str) -> None:
            raise ValueError("no such table")

    recorder = Broken()
    assert not foreign({"path": "y"}, tracker=recorder).cached and foreign({"path": "y"}).cached
    assert recorder.told[-1][2] == "finished", "once it is committed, nothing fails"


def test_a_body_that_breaks_its_declaration(home: Path) -> None:
    with pytest.raises(TypeError, match="wrong returned a str, declared FileResult"):
        wrong({"path": "x"})
    assert entries(home, "wrong") == []


def test_old_results_that_no_longer_fit(home: Path) -> None:
    outcome = draw({"count": 3})
    path = home / "artifacts" / "draw" / outcome.fingerprint / "manifest.json"
    data = json.loads(path.read_text())
    del data["result"]["mean"]
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"result\.mean: required field is missing; .*--rebuild draw_series"):
        draw({"count": 3})


def test_an_object_store_as_root(calls: Path) -> None:
    root = f"memory://bucket-{uuid.uuid4().hex}/artifacts"
    drawn = draw({"count": 3}, root=root)
    assert drawn.refs["numbers"] == f"{root}/draw/{drawn.fingerprint}/numbers"
    assert draw({"count": 3}, root=root).cached
    averaged = average(AverageConfig(power=2), root=root, numbers=drawn.refs["numbers"])
    local = average(AverageConfig(power=2), numbers=drawn.outputs["numbers"])  # the copy here has the same identity
    assert averaged.fingerprint == local.fingerprint and averaged.result == local.result
    assert (averaged.outputs["model"] / "half.txt").read_text() == "half written"
    assert calls.read_text() == "draw\naverage\naverage\n"
