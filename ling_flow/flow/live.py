"""What a person sees while a DAG runs: a live table on a terminal, plain lines elsewhere; both from the event file."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

_POLL_SECONDS = 0.25
_PLAIN_SECONDS = 10.0  # between two progress lines of a step where there is no terminal

_MARKS = {
    "waiting": ("·", "dim"),
    "running": ("▶", "cyan"),
    "done": ("✓", "green"),
    "cached": ("✓", "blue"),
    "failed": ("✗", "red"),
}


@dataclass
class StepState:
    """One row: what is known of a step from its events so far."""

    label: str
    status: str = "waiting"
    started: float = 0.0
    seconds: float = 0.0
    detail: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    error: dict[str, str] | None = None

    def apply(self, event: dict[str, Any]) -> None:
        """Take in one event of this step."""
        kind = event["event"]
        if kind == "start":
            self.status, self.started = "running", event["time"]
        elif kind == "progress":
            self.detail = _progress_text(event, self.started)
        elif kind == "log":
            self.detail = event["text"]
        elif kind == "done":
            self.status = "cached" if event["cached"] else "done"
            self.seconds = 0.0 if event["cached"] else event["seconds"]
            self.result, self.outputs, self.fingerprint = event["result"], event["outputs"], event["fingerprint"]
            self.detail = headline(event["result"])
        elif kind == "error":
            self.status, self.error, self.detail = "failed", event, event["message"]
            self.seconds = event["time"] - self.started if self.started else 0.0


def _progress_text(event: dict[str, Any], started: float) -> str:
    done, total = event["done"], event["total"] if event["total"] > 0 else 1
    elapsed = event["time"] - started if started else 0.0
    left = elapsed / done * (total - done) if done else None
    numbers = [f"{name} {_number(value)}" for name, value in event["metrics"].items()]
    eta = f"{left:.0f} s left" if left is not None and done < total else ""
    return "  ".join(part for part in (f"{int(100 * done / total):3d} %", event["text"], *numbers, eta) if part)


def headline(result: dict[str, Any], most: int = 4) -> str:
    """The first few numbers of a result, for one line."""
    shown = [(name, value) for name, value in result.items() if isinstance(value, int | float | str) and value != ""]
    return "  ".join(f"{name} {_number(value)}" for name, value in shown[:most])


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = " ".join(str(value).split())
        return text if len(text) <= 60 else f"{text[:57]}…"
    return f"{value:,}" if isinstance(value, int) or float(value).is_integer() else f"{value:.4g}"


class Watcher:
    """Follows an event file in a thread and keeps one `StepState` per step; a context manager around the run."""

    def __init__(self, events: Path, labels: Sequence[str], console: Console) -> None:
        self.steps = {label: StepState(label) for label in labels}
        self._events = events
        self._console = console
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watcher", daemon=True)
        self._last_line: dict[str, float] = {}
        self._live = (
            Live(get_renderable=self._render, console=console, refresh_per_second=4) if console.is_terminal else None
        )

    def __enter__(self) -> Watcher:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._live:
            with contextlib.suppress(OSError):  # the terminal was closed
                self._live.stop()

    def _follow(self) -> None:
        offset = 0
        while True:
            last = self._stop.is_set()
            offset = self._take_in(offset)
            if last:
                return
            self._stop.wait(_POLL_SECONDS)

    def _take_in(self, offset: int) -> int:
        if not self._events.exists():
            return offset
        with self._events.open("rb") as stream:
            stream.seek(offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # still being written
                offset += len(line)
                with contextlib.suppress(Exception):  # one odd event must not end the view of all others
                    self._apply(json.loads(line))
        return offset

    def _apply(self, event: dict[str, Any]) -> None:
        state = self._state_of(event)
        if event["event"] == "done" and event["cached"] and state.status == "done":
            return  # the same step a second time in one DAG
        state.apply(event)
        if not self._live:
            self._print_line(state, event)

    def _state_of(self, event: dict[str, Any]) -> StepState:
        """The step that an event is of.

        A step may give the label of its component where it has a numbered one (`use` for `use-2`): with an error that
        came early, or where it is another one than was planned. Then it is the one of them which runs, or the next one.
        """
        state = self.steps.setdefault(event["step"], StepState(event["step"]))
        over = state.status in ("done", "cached")
        another = over and event.get("fingerprint", state.fingerprint) != state.fingerprint
        if not another and (event["event"] != "error" or state.status == "running"):
            return state
        numbered = re.compile(re.escape(state.label) + r"-\d+")
        alike = [other for other in self.steps.values() if numbered.fullmatch(other.label)]
        wanted = ("running", "waiting", "failed") if over else ("running",)
        return next((other for status in wanted for other in alike if other.status == status), state)

    def _print_line(self, state: StepState, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "metrics":
            return
        now = time.monotonic()
        if kind == "progress" and now - self._last_line.get(state.label, 0.0) < _PLAIN_SECONDS:
            return
        self._last_line[state.label] = now
        text = {"start": "started", "done": f"{state.status}  {state.detail}"}.get(kind, state.detail)
        took = f" in {state.seconds:.1f} s" if kind == "done" and state.status == "done" else ""
        stamp = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        self._console.print(f"{stamp} {state.label}{took}: {text}", highlight=False, markup=False, soft_wrap=True)

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for state in self.steps.values():
            mark, style = _MARKS[state.status]
            seconds = time.time() - state.started if state.status == "running" else state.seconds
            shown = f"{seconds:6.1f} s" if seconds else ""
            table.add_row(
                Text(mark, style=style),
                Text(state.label),
                Text(shown, style="dim"),
                Text(state.detail, overflow="ellipsis", no_wrap=True),
            )
        return Group(table)

    def failed(self) -> Iterator[StepState]:
        """Steps that told of an error."""
        return (state for state in self.steps.values() if state.status == "failed")


def summary_table(steps: Sequence[StepState]) -> Table:
    """Phase, time, what it achieved."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("phase")
    table.add_column("time", justify="right")
    table.add_column("what it achieved", overflow="fold")
    for state in steps:
        took = "cached" if state.status == "cached" else f"{state.seconds:.1f} s"
        table.add_row(state.label, took, Text(headline(state.result, most=8)))
    return table
