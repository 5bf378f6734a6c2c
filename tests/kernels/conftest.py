"""The device that kernels are tested on: CUDA where there is one, else the CPU under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ling_flow.kernels._triton import AVAILABLE


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Where there is no Triton (it has no wheels for macOS) tests that launch a kernel are skipped."""
    try:
        return (yield)
    except RuntimeError as error:
        if not AVAILABLE and "is a Triton kernel" in str(error):
            pytest.skip("Triton is not installed")
        raise


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
