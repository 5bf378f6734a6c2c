"""Every kernel compiled for sm_90 at the published models' shapes, on the oldest and the newest supported Triton."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.kernels.aot_cases import SHARED_LIMIT

SPILL_LIMIT = 16  # bytes a thread: four values that wait for the end of a program are no loss, sums in a loop would be
OLDEST = REPOSITORY / ".venv" / "triton-oldest"  # `make setup` puts it there


def compile_all(triton: Path | None) -> list[dict[str, object]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"LING_FLOW_TRITON": "compile", "TRITON_DEFAULT_FP_FUSION": "0"}  # the default from Triton 3.10 on
    if triton is not None:
        environment["PYTHONPATH"] = str(triton)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_every_kernel_compiles_for_hopper(which: str) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if which == "oldest" and not OLDEST.is_dir():
        pytest.skip(f"{OLDEST} is missing: run `make setup`")
    found = compile_all(OLDEST if which == "oldest" else None)
    assert len(found) > 10
    if which == "oldest":
        assert {kernel["triton"] for kernel in found} == {"3.6.0"}
    for kernel in found:
        assert int(str(kernel["stack"])) <= SPILL_LIMIT, f"spills: {kernel}"
        assert int(str(kernel["shared"])) <= SHARED_LIMIT, f"shared memory: {kernel}"
        assert kernel["wgmma"] or not kernel["wgmma_wanted"], f"no wgmma: {kernel}"
        assert kernel["fused"], f"no fused multiply-add: {kernel}"
