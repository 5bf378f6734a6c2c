"""What a step says: any kind of number and text arrives as a plain one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ling_flow.flow import events


@pytest.mark.parametrize(
    ("done", "total", "kept"),
    [
        (np.int64(1), np.int64(3), [1, 3]),
        (0.5, np.float32(1), [0.5, 1]),
        (torch.tensor(2), 4, [2, 4]),
    ],
)
def test_progress_is_told_in_plain_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: Any, total: Any, kept: list[float]
) -> None:
    path = tmp_path / "events.jsonl"
    monkeypatch.setenv("LING_FLOW_EVENTS", str(path))
    monkeypatch.setattr(events, "_last_progress", {})
    events.emit("progress", step="train", done=done, total=total, text="", metrics={})
    event = json.loads(path.read_text())
    assert [event["done"], event["total"]] == kept


def test_anything_can_be_logged(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("LING_FLOW_EVENTS", raising=False)
    events.emit("log", step="train", text=ValueError("too large"))
    assert capfd.readouterr().err == "train: too large\n"
