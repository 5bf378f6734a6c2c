"""The toy components must be importable here and in the processes that the tests start."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh LING_FLOW_HOME, with nothing else of ours in the environment."""
    for name in list(os.environ):
        if name.startswith(("LING_FLOW_", "MLFLOW_", "TOY_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LING_FLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", f"{HERE.parents[1]}:{HERE}")
    return tmp_path / "home"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets one line for each time a toy component's body runs, in whatever process."""
    path = tmp_path / "calls"
    path.touch()
    monkeypatch.setenv("TOY_CALLS", str(path))
    return path
