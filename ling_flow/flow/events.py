"""What a running step says: one JSON line per event for the live view, or plain lines for a person.

Events, each with `time` (seconds since the epoch) and `step` (its label):
    start     component, fingerprint
    progress  done, total, text, metrics
    metrics   at (training step), metrics
    log       text
    done      fingerprint, cached, seconds, result, outputs
    error     kind ("user" | "system" | "defect"), message (one line), traceback (defects only)
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

from ling_flow.errors import LingFlowError, RemoteDefect, SystemFault, UserError
from ling_flow.redact import redact

_FILE_INTERVAL = 0.2  # seconds between two progress events of a step in the event file
_HUMAN_INTERVAL = 2.0  # seconds between two progress lines of a step for a person

_last_progress: dict[str, float] = {}


def emit(event: str, /, *, step: str, **payload: Any) -> None:
    """Tell whoever listens: appends to the file named by LING_FLOW_EVENTS (`-`: stderr), else prints a plain line.

    Never fails: a full disk under the event file must not end a training run.
    """
    path = os.environ.get("LING_FLOW_EVENTS")
    if event == "log":
        payload["text"] = redact(str(payload["text"]))
    if event == "progress":
        payload |= {name: _count(payload[name]) for name in ("done", "total")}
    if event == "progress" and _too_soon(step, payload, _HUMAN_INTERVAL if path in (None, "", "-") else _FILE_INTERVAL):
        return
    if not path:
        line = _plain(event, step, payload)
        if line:
            print(line, file=sys.stderr, flush=True)
        return
    record = {"event": event, "time": time.time(), "step": step, **payload}
    if path == "-":
        print(json.dumps(record, default=str), file=sys.stderr, flush=True)
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(record, default=str) + "\n").encode())  # one write: lines never interleave
        finally:
            os.close(descriptor)
    except OSError as error:
        print(f"{path}: event not written ({error.strerror})", file=sys.stderr, flush=True)


def report_failure(step: str, error: BaseException) -> int:
    """Emit the error event, print the error on stderr (one line; defects with traceback), return the exit code."""
    if isinstance(error, LingFlowError):
        kind = "user" if isinstance(error, UserError) else "system" if isinstance(error, SystemFault) else "defect"
        message, code = str(error), error.exit_code
        trace = error.traceback if isinstance(error, RemoteDefect) else ""
    else:
        kind, code = "defect", 1
        message = redact(f"{type(error).__name__}: {error}".strip().splitlines()[0])
        trace = redact("".join(traceback.format_exception(error)))
    emit("error", step=step, kind=kind, message=message, **({"traceback": trace} if trace else {}))
    print(f"{trace}error: {message}", file=sys.stderr, flush=True)
    return code


def _count(value: Any) -> int | float:
    """A plain number of any kind of number, NumPy's and torch's too: their text in JSON would be no number."""
    number = float(value)
    return int(number) if number.is_integer() else number


def _too_soon(step: str, payload: dict[str, Any], interval: float) -> bool:
    now = time.monotonic()
    finished = payload["done"] >= payload["total"]
    if not finished and now - _last_progress.get(step, -interval) < interval:
        return True
    _last_progress[step] = now
    return False


def _plain(event: str, step: str, payload: dict[str, Any]) -> str:
    """The event as a line for a person; "" for what a person need not see, or sees elsewhere (results, errors)."""
    if event == "start":
        return f"{step}: started"
    if event == "progress":
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in payload["metrics"].items())
        return "  ".join(
            part for part in (f"{step}: {payload['done']}/{payload['total']}", payload["text"], numbers) if part
        )
    if event == "log":
        return f"{step}: {payload['text']}"
    if event == "done":
        return f"{step}: " + ("already done" if payload["cached"] else f"done in {payload['seconds']:.1f} s")
    return ""
