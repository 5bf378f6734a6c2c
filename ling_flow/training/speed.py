"""What a run costs: share of the device's peak (MFU), memory, energy."""

from __future__ import annotations

import resource
import sys
import time

import torch

from ling_flow.model.config import ModelConfig
from ling_flow.model.flops import training_flops_per_token
from ling_flow.training.settings import Precision

_MEASURE_SECONDS = 0.3


def measured_peak(device: torch.device, precision: Precision) -> float:
    """FLOP/s of a large matrix product on this device, in the type that training multiplies in. FP8 is measured as
    bfloat16: an MFU stays comparable, and may exceed 1."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, started = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - started < _MEASURE_SECONDS:
        _wait(device)
        before = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Cost:
    """Figures of a stage's steps.

    Args:
        config: of the model.
        sequence_length: of the stage, tokens.
        peak: FLOP/s of the device, from `measured_peak`.
        watts: power of the device while it trains; None: energy is not told.
    """

    def __init__(self, config: ModelConfig, sequence_length: int, peak: float, watts: float | None) -> None:
        # Recomputation is not counted: it is a way to train, not more training.
        self._flops = training_flops_per_token(config, sequence_length, "causal").total
        self._peak, self._watts, self._seconds = peak, watts, 0.0

    def step(self, tokens: int, seconds: float, device: torch.device) -> dict[str, float]:
        """Metrics after one more step: `mfu`, `memory_gib` (largest so far), and `energy_kwh` since the start."""
        self._seconds += seconds
        metrics = {"mfu": self._flops * tokens / seconds / self._peak, "memory_gib": peak_memory(device) / 2**30}
        if self._watts is not None:
            metrics["energy_kwh"] = self._watts * self._seconds / 3.6e6
        return metrics


def peak_memory(device: torch.device) -> int:
    """Largest memory so far, bytes: the device's for CUDA, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024  # bytes there, KiB elsewhere
