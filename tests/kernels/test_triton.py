"""How kernels are launched, and what is told where they cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from ling_flow.kernels import swiglu
from ling_flow.kernels._triton import AVAILABLE
from tests.conftest import REPOSITORY

WITHOUT_TRITON = "import sys; sys.modules['triton'] = None; "


@pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
def test_every_launch_fuses_multiplication_and_addition(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    kind = type(swiglu._swiglu_kernel)
    launched: list[dict[str, Any]] = []
    run = kind.run

    def recorded(self: Any, *args: Any, **options: Any) -> Any:
        launched.append(options)
        return run(self, *args, **options)

    monkeypatch.setattr(kind, "run", recorded)
    swiglu.swiglu_triton(torch.ones(2, 32, device=device))
    assert [options["enable_fp_fusion"] for options in launched] == [True]


def test_without_triton_a_cpu_needs_none_and_a_kernel_says_so() -> None:
    program = WITHOUT_TRITON + (
        "import torch, ling_flow.model.layers; from ling_flow.kernels.swiglu import swiglu, swiglu_triton; "
        "print(swiglu(torch.ones(1, 4)).shape); swiglu_triton(torch.ones(1, 4))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "torch.Size([1, 2])\n", done.stderr
    assert done.stderr.splitlines()[-1] == (
        "RuntimeError: _swiglu_kernel is a Triton kernel: it needs Triton, which is not installed"
    )
