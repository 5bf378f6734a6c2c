"""The view of a running DAG: from event lines to states, lines and a table."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ling_flow.flow.live import StepState, Watcher, headline, summary_table


def event(kind: str, /, **payload: Any) -> dict[str, Any]:
    return {"event": kind, "time": 100.0, "step": "train", **payload}


def test_a_step_goes_through_its_states() -> None:
    state = StepState("train")
    state.apply(event("start", component="train", fingerprint="f"))
    assert state.status == "running"
    state.apply({**event("progress", done=25, total=100, text="lr 0.1", metrics={"loss": 2.5}), "time": 110.0})
    assert state.detail == "25 %  lr 0.1  loss 2.5  30 s left".rjust(len(state.detail))
    done = event("done", fingerprint="f", cached=False, seconds=40.0, result={"loss": 2.0}, outputs={"model": "/m"})
    state.apply(done)
    assert (state.status, state.seconds, state.result) == ("done", 40.0, {"loss": 2.0})
    state.apply({**done, "cached": True})
    assert (state.status, state.seconds) == ("cached", 0.0)


def test_an_error_is_kept_whole() -> None:
    state = StepState("train")
    state.apply(event("error", kind="user", message="field: wrong"))
    assert state.status == "failed"
    assert state.error is not None and state.error["kind"] == "user"


def test_without_a_terminal_lines_are_printed_and_half_lines_wait(tmp_path: Path) -> None:
    events, out = tmp_path / "events.jsonl", io.StringIO()
    half = json.dumps(event("done", fingerprint="f", cached=True, seconds=1.0, result={"n": 3}, outputs={}))
    with Watcher(events, ["train", "later"], Console(file=out, width=200)) as watcher:
        with events.open("w") as stream:
            stream.write(json.dumps(event("start", component="train", fingerprint="f")) + "\n" + half[:20])
        offset = watcher._take_in(0)
        assert watcher.steps["train"].status == "running"
        with events.open("a") as stream:
            stream.write(half[20:] + "\n")
        assert watcher._take_in(offset) > offset
    assert watcher.steps["train"].status == "cached"
    assert watcher.steps["later"].status == "waiting"
    assert "train: cached  n 3" in out.getvalue()


def watched(tmp_path: Path, labels: list[str], *events: dict[str, Any]) -> Watcher:
    """A watcher that has seen `events`."""
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    with Watcher(path, labels, Console(file=io.StringIO(), width=200)) as watcher:
        pass
    return watcher


def test_odd_events_end_nothing(tmp_path: Path) -> None:
    odd = event("progress", done="1", total="3", text="", metrics={})
    done = event("done", fingerprint="f", cached=False, seconds=1.0, result={}, outputs={})
    watcher = watched(tmp_path, ["train"], odd, {"event": "start"}, done)
    assert watcher.steps["train"].status == "done"


def test_progress_in_parts() -> None:
    state = StepState("train")
    state.apply(event("progress", done=0.25, total=0.5, text="", metrics={}))
    assert state.detail.strip().startswith("50 %")


def test_the_same_step_a_second_time_is_no_news(tmp_path: Path) -> None:
    done = event("done", fingerprint="f", cached=False, seconds=1.0, result={}, outputs={})
    watcher = watched(tmp_path, ["train"], done, {**done, "cached": True})
    assert (watcher.steps["train"].status, watcher.steps["train"].seconds) == ("done", 1.0)


def test_an_error_belongs_to_the_numbered_step_that_runs(tmp_path: Path) -> None:
    done = event("done", fingerprint="f", cached=False, seconds=1.0, result={}, outputs={})
    start = {**event("start", component="train", fingerprint="g"), "step": "train-2"}
    error = event("error", kind="user", message="field: wrong")
    for started in ([start], []):  # or it failed before
        watcher = watched(tmp_path, ["train", "train-2", "train-3"], done, *started, error)
        assert [state.status for state in watcher.steps.values()] == ["done", "failed", "waiting"]


def test_a_step_that_is_another_than_was_planned_is_not_lost(tmp_path: Path) -> None:
    done = event("done", fingerprint="f", cached=False, seconds=1.0, result={}, outputs={})
    unplanned = [event("start", component="train", fingerprint="g"), {**done, "fingerprint": "g", "seconds": 2.0}]
    watcher = watched(tmp_path, ["train", "train-2"], done, *unplanned)
    assert [(state.status, state.seconds) for state in watcher.steps.values()] == [("done", 1.0), ("done", 2.0)]


def test_the_table_shows_phase_time_and_what_it_achieved() -> None:
    done = StepState("train", status="done", seconds=12.34, result={"loss": 1.23456, "tokens": 2_000_000})
    out = io.StringIO()
    Console(file=out, width=100).print(summary_table([done, StepState("data", status="cached", result={})]))
    assert "12.3 s" in out.getvalue() and "loss 1.235  tokens 2,000,000" in out.getvalue()
    assert "cached" in out.getvalue()


def test_a_long_text_is_cut_and_nested_values_are_left_out() -> None:
    assert headline({"config": {"a": 1}, "text": "x" * 100}) == "text " + "x" * 57 + "…"
