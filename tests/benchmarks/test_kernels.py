"""The kernel benchmark is ready for a bare machine: torch and Triton, nothing else of ours installed."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import REPOSITORY

# What a bare GPU machine lacks must not be imported.
LIST_WITHOUT_THE_REST = """
import runpy, sys
for name in ("pydantic", "ray", "mlflow", "kfp", "click", "fsspec", "safetensors", "tokenizers"):
    sys.modules[name] = None
sys.argv = ["benchmarks/kernels.py", *sys.argv[1:]]
runpy.run_path("benchmarks/kernels.py", run_name="__main__")
"""


def listed(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", LIST_WITHOUT_THE_REST, *arguments],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_every_operation_has_cases_with_a_floor() -> None:
    done = listed("--list")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    operations = {line[:38].strip() for line in lines}
    for part in (
        "quantise 1x128",
        "rms norm",
        "swiglu",
        "router",
        "qk norm",
        "grouped",
        "adamw",
        "embedding",
        "cross entropy",
    ):
        assert any(part in operation for operation in operations), part
    assert all(float(line.split()[-2]) > 0 for line in lines)


def test_without_a_gpu_it_says_so() -> None:
    done = listed()
    assert done.returncode != 0
    assert "needs a CUDA device" in done.stderr
