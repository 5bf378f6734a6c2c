"""Query-key norm, partial rotation, split and transpose, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case, Prepared, relative_error
from ling_flow.kernels import qk_norm_rope as module
from ling_flow.kernels.rotary import rotary_frequencies, rotary_tables

EPS, WIDTH, ROTATED = 1e-6, 128, 64
# name, batch, positions, query heads, key-value heads
SHAPES = (("mini 2x4096", 2, 4096, 16, 4), ("mini 8x4096", 8, 4096, 16, 4), ("flash 4x4096", 4, 4096, 32, 4))


def cases() -> Iterator[Case]:
    for name, *shape in SHAPES:
        yield from _of(name, *shape)


def _of(name: str, batch: int, length: int, heads: int, kv_heads: int) -> Iterator[Case]:
    elements = batch * length * (heads + 2 * kv_heads) * WIDTH
    normed = batch * length * (heads + kv_heads) * WIDTH  # read again in the backward pass
    rstd = 4 * batch * length * (heads + kv_heads)
    tables = 4 * length * ROTATED

    def operands() -> tuple[list[Tensor], list[Tensor]]:
        qkv_BSX = torch.randn((batch, length, (heads + 2 * kv_heads) * WIDTH), dtype=torch.bfloat16, device="cuda")
        weights = [torch.rand(WIDTH, dtype=torch.bfloat16, device="cuda") + 0.5 for _ in range(2)]
        angles = rotary_tables(torch.arange(length, device="cuda"), rotary_frequencies(ROTATED, 6e5))
        return [qkv_BSX, *weights], [table.unsqueeze(-2) for table in angles]

    def with_(tile: tuple[int, ...], backward: bool) -> Prepared:
        def prepare() -> Callable[[], object]:
            leaves, tables = operands()
            out: tuple[Tensor, ...] = ()
            upstream: list[Tensor] = []

            def run() -> object:
                with mock.patch.object(module, "BACKWARD_TILES" if backward else "FORWARD_TILES", (tile,)):
                    if backward:
                        return torch.autograd.grad(out, leaves, upstream, retain_graph=True)
                    return module.qk_norm_rope_triton(*leaves, *tables, heads, kv_heads, EPS)

            if backward:
                for leaf in leaves:
                    leaf.requires_grad_()
                out = module.qk_norm_rope_triton(*leaves, *tables, heads, kv_heads, EPS)
                upstream = [torch.randn_like(part) for part in out]
            return run

        return prepare

    def composed(backward: bool) -> Prepared:
        def prepare() -> Callable[[], object]:
            leaves, tables = operands()
            if not backward:
                return lambda: [
                    part.contiguous() for part in module.qk_norm_rope_reference(*leaves, *tables, heads, kv_heads, EPS)
                ]
            for leaf in leaves:
                leaf.requires_grad_()
            out = module.qk_norm_rope_reference(*leaves, *tables, heads, kv_heads, EPS)
            upstream = [torch.randn_like(part) for part in out]
            return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)

        return prepare

    def linghe() -> Callable[[], object]:
        from linghe.utils.rope import triton_qk_norm_and_half_rope_forward

        leaves, _ = operands()
        angles = torch.outer(torch.arange(length).float(), rotary_frequencies(ROTATED, 6e5)).repeat(1, 2).cuda()
        return lambda: triton_qk_norm_and_half_rope_forward(
            *leaves, angles, H=heads, h=kv_heads, eps=EPS, interleaved=False, transposed=False
        )

    def check() -> float:
        leaves, tables = operands()
        found = module.qk_norm_rope_triton(*leaves, *tables, heads, kv_heads, EPS)
        wide = [part.double() for part in (*leaves, *tables)]
        exact = module.qk_norm_rope_reference(*wide, heads, kv_heads, EPS)
        return max(relative_error(mine, theirs) for mine, theirs in zip(found, exact, strict=True))

    for backward, tiles in enumerate((module.FORWARD_TILES, module.BACKWARD_TILES)):
        yield Case(
            f"qk norm + rope + split{', backward' * backward}", name, with_(tiles[0], bool(backward)),
            moved=2 * (2 * elements + backward * normed) + rstd + tables,
            gate=("share", 0.8 if not backward else 0.75), check=None if backward else check,
            peers={"torch, composed": composed(bool(backward))} | ({} if backward else {"linghe": linghe}),
            variants={str(tile): with_(tile, bool(backward)) for tile in tiles},
        )  # fmt: skip
