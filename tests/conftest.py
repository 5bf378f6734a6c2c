"""Shared fixtures: a home of one's own, and the command line as users call it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# Test processes share few cores with servers and subprocesses; spinning threads would cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# A process asks for Ray's token or does without once and for all, and tests of both kinds share processes. The command
# line, as users call it, has its own (`user_environment`).
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what follows `&` deaf to Ctrl-C, and so would be all that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parents[1]
OURS = ("LING_FLOW_", "MLFLOW_", "RAY_ADDRESS", "RAY_AUTH", "TRITON_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is allowed the most time comes first, so that at the end no worker is alone with it."""

    def allowed(item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        return float(marker.args[0]) if marker else 0.0

    items.sort(key=allowed, reverse=True)  # stable


@dataclass(frozen=True)
class Called:
    """What a command gave back."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of standard output."""
        return json.loads(self.out.strip().splitlines()[-1])


def user_environment(home: Path) -> dict[str, str]:
    """The environment of a user whose home is `home`, with nothing else of ours set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return {**kept, "LING_FLOW_HOME": str(home)}


def run_module(
    environment: dict[str, str], *arguments: str, module: str = "ling_flow.cli", timeout: float = 120
) -> Called:
    """`python -m MODULE ARGUMENTS` in the repository."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Called(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a user with an empty home."""
    return user_environment(tmp_path / "home")


@pytest.fixture
def call(environment: dict[str, str]) -> Callable[..., Called]:
    """`call("plan", "--json")` runs `python -m ling_flow.cli plan --json` in a process of its own."""

    def run(*arguments: str, module: str = "ling_flow.cli", timeout: float = 120, **changes: str) -> Called:
        return run_module({**environment, **changes}, *arguments, module=module, timeout=timeout)

    return run
