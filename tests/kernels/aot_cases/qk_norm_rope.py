"""Query-key norm and rotation, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ling_flow.kernels.qk_norm_rope import qk_norm_rope_triton
from ling_flow.kernels.shapes import normal
from tests.kernels.aot_cases import Case

# name, batch, positions, query heads, key-value heads, head width, rotated elements
SHAPES = (
    ("mini", 2, 4096, 16, 4, 128, 64),
    ("flash", 2, 4096, 32, 4, 128, 64),
    ("one_t", 1, 4096, 64, 8, 128, 64),
    ("small", 8, 512, 4, 2, 64, 32),
    ("tiny", 8, 256, 2, 1, 48, 24),
)


def cases() -> Iterator[Case]:
    for name, *shape in SHAPES:
        for packed in (False, True):
            yield Case(
                f"qk norm rope, {name}{', packed' * packed}",
                lambda shape=tuple(shape), packed=packed: _of(shape, packed),
            )


def _of(shape: tuple[int, int, int, int, int, int], packed: bool) -> None:
    batch, length, heads, kv_heads, width, rotated = shape
    qkv = normal((batch, length, (heads + 2 * kv_heads) * width), torch.bfloat16, "meta").requires_grad_()
    weights = [normal((width,), torch.float32, "meta").requires_grad_() for _ in range(2)]
    rows = (batch, length, 1, rotated // 2) if packed else (length, 1, rotated // 2)
    tables = [normal(rows, torch.float32, "meta") for _ in range(2)]
    out = qk_norm_rope_triton(qkv, *weights, *tables, heads, kv_heads, 1e-6, positions_first=packed)
    torch.autograd.grad(out, [qkv, *weights], [part.detach() for part in out])
