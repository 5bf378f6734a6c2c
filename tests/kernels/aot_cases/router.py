"""The router: its three products, the choice, and the choice's gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ling_flow.kernels import router_triton
from ling_flow.kernels.shapes import normal
from tests.kernels.aot_cases import Case

SHAPES = (
    ("mini 8k", 8192, 2048, 256),
    ("mini 32k", 32768, 2048, 256),
    ("flash", 8192, 4096, 256),
    ("decode", 64, 2048, 256),
)


def cases() -> Iterator[Case]:
    for name, tokens, hidden, experts in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            weight = normal((experts, hidden), dtype, "meta")
            of = f"{name}, weight of {str(dtype).removeprefix('torch.')}"
            yield Case(f"router products, {of}", lambda t=tokens, w=weight: _products(t, w), wgmma=True)
        yield Case(f"router choice, {name}", lambda t=tokens, e=experts: _choice(t, e, 8, 8, 4))
    for experts, top_k, n_group, topk_group in ((512, 8, 8, 4), (32, 4, 4, 2), (16, 2, 4, 2), (24, 3, 1, 1)):
        yield Case(f"router choice of {experts}", lambda a=(experts, top_k, n_group, topk_group): _choice(8192, *a))


def _products(tokens: int, weight_ED: torch.Tensor) -> None:
    x_TD = normal((tokens, weight_ED.shape[1]), torch.bfloat16, "meta")
    grad_PTE = normal((2, tokens, len(weight_ED)), torch.bfloat16, "meta")
    router_triton.logits_triton(x_TD, weight_ED)
    router_triton.input_gradient_triton(grad_PTE, weight_ED, torch.bfloat16)
    router_triton.weight_gradient_triton(grad_PTE, x_TD)


def _choice(tokens: int, experts: int, top_k: int, n_group: int, topk_group: int) -> None:
    logits_TE, bias_E = normal((tokens, experts), torch.float32, "meta"), normal((experts,), torch.float32, "meta")
    indices_TK, weights_TK, _ = router_triton.choose_triton(logits_TE, bias_E, top_k, n_group, topk_group, 2.5)
    for grad_TE in (None, logits_TE):
        router_triton.logits_gradient_triton(weights_TK, grad_TE, logits_TE, indices_TK, 2.5, parts=2)
    router_triton.logits_gradient_triton(None, logits_TE, logits_TE, indices_TK, 2.5, parts=1)
