"""The loss on a chunk of logits, and AdamW with 8-bit moments."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ling_flow.kernels import adamw8, linear_cross_entropy
from ling_flow.kernels.shapes import normal
from tests.kernels.aot_cases import Case

VOCABULARY = 157184
RATES = adamw8.Rates(step=10, learning_rate=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield Case(f"cross entropy, {name}", lambda dtype=dtype: _cross_entropy(dtype))
        yield Case(f"adamw 8 bit, gradient of {name}", lambda dtype=dtype: _adamw8(dtype))


def _cross_entropy(dtype: torch.dtype) -> None:
    rows = linear_cross_entropy.CHUNK_ELEMENTS["cuda"] // VOCABULARY
    logits_CV = normal((rows, VOCABULARY), dtype, "meta")
    targets_C = torch.empty(rows, dtype=torch.int64, device="meta")
    for gradient in (False, True):
        _, lse_C = linear_cross_entropy.cross_entropy_triton_(logits_CV, targets_C, 1e-4, gradient)
    linear_cross_entropy.cross_entropy_gradient_triton_(logits_CV, targets_C, lse_C, lse_C)


def _adamw8(dtype: torch.dtype) -> None:
    parameter = normal((256, 1024, 2048), torch.float32, "meta")
    moments = adamw8.new_moments(parameter)
    for copy in (None, normal((256, 1024, 2048), torch.bfloat16, "meta")):
        adamw8.adamw8_triton_(parameter, normal((256, 1024, 2048), dtype, "meta"), moments, RATES, copy)
