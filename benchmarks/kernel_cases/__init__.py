"""What `benchmarks/kernels.py` measures, a file per group of operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Prepared = Callable[[], Callable[[], object]]  # allocates what is needed, returns what is timed


@dataclass(frozen=True)
class Case:
    """One operation at one shape, ours and every peer's.

    Attributes:
        moved: bytes that must be read or written once each; the floor of time is these at the measured copy rate, or
            the FLOPs at the rate of `kind`, whichever is longer.
        check: what `ours` returned against float64, relative error; None where tests alone hold it.
        gate: what is to be reached: ("share", of the floor), ("tflops", ...), or ("ratio", time of the peer named in
            `against` / ours).
        variants: ours with other tile sizes, by name, for `--sweep`.
        peers: by name; importing a library that is missing raises ModuleNotFoundError, and it is left out.
    """

    op: str
    shape: str
    ours: Prepared
    moved: int
    flops: int = 0
    kind: str = "bf16"  # of the matrix products: bf16, fp8, tf32
    gate: tuple[str, float] | None = None
    against: str | None = None
    check: Callable[[], float] | None = None
    peers: Mapping[str, Prepared] = field(default_factory=dict)
    variants: Mapping[str, Prepared] = field(default_factory=dict)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|found - exact| / |exact| in the Euclidean norm, float64."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-300))
