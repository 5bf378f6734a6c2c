"""The kernel benchmark is ready for a bare machine: torch and Triton, nothing else of ours installed."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from benchmarks.kernel_cases import grouped_gemm
from ling_flow.kernels.grouped_gemm import grouped_mm, grouped_wgrad
from ling_flow.kernels.row_map import row_map_reference
from ling_flow.kernels.shapes import MoEShape, normal, route
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


def test_what_grouped_mm_is_given_can_be_left_out_of_its_time() -> None:
    peers = {case.op: set(case.peers) for case in grouped_gemm.cases() if "torch grouped_mm" in case.peers}
    ready = {op for op, names in peers.items() if grouped_gemm.READY in names}
    assert ready == {
        "grouped gate_up forward", "grouped down dgrad", "grouped gate_up wgrad", "grouped gate_up wgrad, added",
    }  # fmt: skip
    assert peers.keys() - ready == {"grouped down forward", "grouped gate_up dgrad"}  # nothing is looked up


def test_operands_that_are_ready_give_the_same_products() -> None:
    shape = MoEShape("ragged", 75, 128, 64, 8, 2, "skewed")
    routing = route(shape)
    where = row_map_reference(routing.indices_TK, routing.counts_E)
    grad_RA, x_TB = normal((where.rows, 128), torch.bfloat16), normal((shape.tokens, 128), torch.bfloat16, seed=1)
    expected = grouped_wgrad(grad_RA, x_TB, where, False, True)
    grad_RA, x_RB = grouped_gemm._ready(grad_RA.clone(), where, False), grouped_gemm._ready(x_TB, where, True)
    torch.testing.assert_close(grouped_mm(grad_RA.T, x_RB, where), expected, rtol=2**-7, atol=1e-4)
