"""A local run, with what KFP and the steps would do played by functions: what steps are given, how a run ends."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ling_flow.errors import UserError
from ling_flow.flow import events, runner, tracking
from ling_flow.flow.artifact import ArtifactStore
from ling_flow.flow.context import Context
from ling_flow.flow.dag import load_dag, make_plan
from ling_flow.flow.runner import DagRun, DefectError, run_local

TWICE = str(Path(__file__).parent / "toy" / "twice.py")
Run = Callable[..., DagRun]


def start(step: str) -> None:
    events.emit("start", step=step, component=step, fingerprint="f")


def done(step: str) -> None:
    events.emit("done", step=step, fingerprint="f", cached=False, seconds=1.0, result={"of": step}, outputs={})


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(steps)` runs the toy DAG "twice", its steps played by `steps`, and nothing is tracked."""
    recorded: dict[str, Any] = {}

    def start_dag_run(uri: str, name: str, preset: str, overrides: Mapping[str, Any], *_: Any) -> None:
        recorded["overrides"] = overrides

    monkeypatch.setattr(tracking, "start_dag_run", start_dag_run)
    numbers = itertools.count()

    def run_directory(home: Path, name: str) -> Path:
        directory = home / "runs" / f"{name}-{next(numbers)}"  # runs of one process in one second
        directory.mkdir(parents=True)
        return directory

    monkeypatch.setattr(runner, "_run_directory", run_directory)

    def call(steps: Callable[[], None], arguments: Mapping[str, Any] | None = None, **options: Any) -> DagRun:
        def play(dag: Any, arguments: Any, directory: Path, kfp_runner: Any) -> None:
            (directory / "log.txt").touch()
            steps()

        monkeypatch.setattr(runner, "_execute", play)
        dag = load_dag(TWICE)
        plan = make_plan(dag, dag.parameters, ArtifactStore(home / "artifacts", home / "cache"), frozenset())
        console = Console(file=io.StringIO())
        return run_local(dag, arguments or {}, plan, Context.from_environment(), console, **options)

    call.recorded = recorded  # type: ignore[attr-defined]
    return call


def all_done() -> None:
    for label in ("draw_a,b", "average", "average-2"):
        start(label)
        done(label)


def test_each_of_two_steps_of_one_label_keeps_its_own(run: Run) -> None:
    phases = run(all_done).to_json()["phases"]
    assert {label: phase["metrics"] for label, phase in phases.items()} == {
        label: {"of": label} for label in ("draw_a,b", "average", "average-2")
    }


def test_a_step_that_left_before_it_was_finished_is_named(run: Run) -> None:
    def left() -> None:
        start("draw_a,b")

    def left_and_next_one_has_no_input() -> None:
        start("draw_a,b")
        raise ValueError("Tried to get output 'numbers' from task 'draw', but task 'draw' not found.")

    def left_and_next_one_failed() -> None:
        start("draw_a,b")
        events.emit("error", step="average", kind="user", message="numbers: no reference")
        raise RuntimeError("Inner task failed: average")

    for steps in (left, left_and_next_one_has_no_input, left_and_next_one_failed):
        with pytest.raises(DefectError, match=r"^draw_a,b: ended with exit code 0 before it was finished"):
            run(steps)


def test_errors_of_kfp_itself_are_not_hidden(run: Run) -> None:
    def broken() -> None:
        raise TypeError("of KFP")

    with pytest.raises(TypeError, match="of KFP"):
        run(broken)


def test_what_steps_are_told_to_redo(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LING_FLOW_REBUILD", '["average"]')
    monkeypatch.setenv("LING_FLOW_NO_CACHE", "1")
    seen: list[Context] = []

    def look() -> None:
        seen.append(Context.from_environment())
        all_done()

    run(look)
    run(look, rebuild=frozenset({"draw_a,b"}))
    run(look, no_cache=True)
    assert [(context.rebuild, context.no_cache) for context in seen] == [
        (frozenset(), False), (frozenset({"draw_a,b"}), False), (frozenset(), True),
    ]  # fmt: skip
    assert list(seen[0].labels.values()) == ["average-2"]
    assert os.environ["LING_FLOW_REBUILD"] == '["average"]', "the caller's environment is as it was"


@pytest.mark.parametrize(
    ("given", "recorded"),
    [('{"a": {"b": 1}}', {"a": {"b": 1}}), ("none", {"overrides": "none"}), ({"a": 1}, {"a": 1}), ("", {})],
)
def test_a_parameter_called_overrides(run: Any, given: Any, recorded: dict[str, Any]) -> None:
    run(all_done, {"overrides": given})
    assert run.recorded["overrides"] == recorded


def test_no_temporary_directory_no_run(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(home / "none"))
    with pytest.raises(UserError, match="TMPDIR"):
        run(all_done)
    assert not (home / "runs").exists(), "nothing is begun"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_unless_it_is_ignored(run: Run, number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored from the start
    try:
        with pytest.raises(KeyboardInterrupt):
            run(lambda: os.kill(os.getpid(), number))
        assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        run(lambda: (os.kill(os.getpid(), number), all_done())[1])  # type: ignore[func-returns-value]
    finally:
        signal.signal(number, before)


def test_an_odd_event_does_not_hide_the_end(run: Run) -> None:
    def odd() -> None:
        with open(os.environ["LING_FLOW_EVENTS"], "a") as stream:
            stream.write(json.dumps({"event": "progress", "step": "average", "time": 1.0}) + "\nno JSON\n")
        events.emit("log", step="artifacts", text="the store is away")  # of no step
        all_done()

    assert [step.status for step in run(odd).steps] == ["done"] * 3
