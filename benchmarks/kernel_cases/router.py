"""The router: its three products, the choice, the choice's gradient.

The floor of a product is one pass in bfloat16 (forward) or TF32 (backward), as in the published tables; ours makes
three in bfloat16, for float32's precision. The peers "one pass" have the precision of bfloat16 and TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case, Prepared, relative_error
from ling_flow.kernels import router, router_triton

SHAPES = (("mini 8k", 8192, 2048, 256), ("mini 32k", 32768, 2048, 256), ("flash 32k", 32768, 4096, 256))
TOP_K, GROUPS, KEPT, SCALING = 8, 8, 4, 2.5
TILES = (
    router_triton.LARGE,
    router_triton._Tile(128, 256, 64, 8, 2),
    router_triton._Tile(128, 256, 32, 8, 3),
    router_triton._Tile(128, 128, 32, 8, 4),
    router_triton._Tile(128, 128, 64, 4, 3),
    router_triton._Tile(64, 256, 64, 4, 2),
    router_triton._Tile(64, 128, 64, 4, 3),
)


def cases() -> Iterator[Case]:
    for shape in SHAPES:
        yield _forward(*shape)
        yield _input_gradient(*shape)
        yield _weight_gradient(*shape)
        yield _choice(*shape)
        yield _choice_gradient(*shape)


def _random(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sizes, dtype=dtype, device="cuda")


def _with_tile(tile: router_triton._Tile, prepare: Prepared) -> Prepared:
    def prepared() -> Callable[[], object]:
        run = prepare()

        def swept() -> object:
            with mock.patch.object(router_triton, "LARGE", tile):
                return run()

        return swept

    return prepared


def _swept(prepare: Prepared) -> dict[str, Prepared]:
    return {f"{tuple(tile)}": _with_tile(tile, prepare) for tile in TILES}


def _forward(name: str, tokens: int, hidden: int, experts: int) -> Case:
    def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        return _random(tokens, hidden, dtype=torch.bfloat16), _random(experts, hidden, dtype=dtype)

    def ours() -> Callable[[], object]:
        x_TD, weight_ED = operands()
        return lambda: router_triton.logits_triton(x_TD, weight_ED)

    def float32() -> Callable[[], object]:
        x_TD, weight_ED = operands()
        return lambda: x_TD.float() @ weight_ED.T

    def one_pass() -> Callable[[], object]:
        x_TD, weight_ED = operands(torch.bfloat16)
        return lambda: torch.mm(x_TD, weight_ED.T, out_dtype=torch.float32)

    def linghe() -> Callable[[], object]:
        from linghe.gemm.fp32_gemm import triton_fp32_gemm

        x_TD, weight_ED = operands(torch.bfloat16)
        return lambda: triton_fp32_gemm(x_TD, weight_ED)

    def check() -> float:
        x_TD, weight_ED = operands()
        return relative_error(router_triton.logits_triton(x_TD, weight_ED), x_TD.double() @ weight_ED.double().T)

    return Case(
        "router product", name, ours, moved=tokens * (2 * hidden + 4 * experts) + 4 * experts * hidden,
        flops=2 * tokens * hidden * experts, gate=("ratio", 1.0), against="torch float32", check=check,
        peers={"torch float32": float32, "torch, one pass": one_pass, "linghe, one pass": linghe},
        variants=_swept(ours),
    )  # fmt: skip


def _input_gradient(name: str, tokens: int, hidden: int, experts: int) -> Case:
    def operands() -> tuple[Tensor, Tensor]:
        return _random(tokens, experts), _random(experts, hidden)

    def ours() -> Callable[[], object]:
        grad_TE, weight_ED = operands()
        grad_PTE = router_triton.split_triton(grad_TE, router_triton.BACKWARD_PARTS)
        return lambda: router_triton.input_gradient_triton(grad_PTE, weight_ED, torch.bfloat16)

    def float32() -> Callable[[], object]:
        grad_TE, weight_ED = operands()
        return lambda: (grad_TE @ weight_ED).bfloat16()

    def linghe() -> Callable[[], object]:
        from linghe.gemm.fp32_gemm import triton_fp32_gemm_for_backward

        grad_TE, weight_ED = operands()
        weight_ED = weight_ED.bfloat16()
        return lambda: triton_fp32_gemm_for_backward(grad_TE, weight_ED)

    def check() -> float:
        grad_TE, weight_ED = operands()
        grad_PTE = router_triton.split_triton(grad_TE, router_triton.BACKWARD_PARTS)
        found = router_triton.input_gradient_triton(grad_PTE, weight_ED, torch.bfloat16)
        return relative_error(found, grad_TE.double() @ weight_ED.double())

    return Case(
        "router product, gradient of x", name, ours, moved=tokens * (2 * hidden + 4 * experts) + 4 * experts * hidden,
        flops=2 * tokens * hidden * experts, kind="tf32", gate=("ratio", 1.0), against="torch float32", check=check,
        peers={"torch float32": float32, "linghe, one pass": linghe}, variants=_swept(ours),
    )  # fmt: skip


def _weight_gradient(name: str, tokens: int, hidden: int, experts: int) -> Case:
    def operands() -> tuple[Tensor, Tensor]:
        return _random(tokens, experts), _random(tokens, hidden, dtype=torch.bfloat16)

    def ours() -> Callable[[], object]:
        grad_TE, x_TD = operands()
        grad_PTE = router_triton.split_triton(grad_TE, router_triton.BACKWARD_PARTS)
        return lambda: router_triton.weight_gradient_triton(grad_PTE, x_TD)

    def float32() -> Callable[[], object]:
        grad_TE, x_TD = operands()
        return lambda: grad_TE.T @ x_TD.float()

    def linghe() -> Callable[[], object]:
        from linghe.gemm.fp32_gemm import triton_fp32_gemm_for_update

        grad_TE, x_TD = operands()
        return lambda: triton_fp32_gemm_for_update(grad_TE, x_TD)

    def check() -> float:
        grad_TE, x_TD = operands()
        grad_PTE = router_triton.split_triton(grad_TE, router_triton.BACKWARD_PARTS)
        found = router_triton.weight_gradient_triton(grad_PTE, x_TD)
        return relative_error(found, grad_TE.double().T @ x_TD.double())

    return Case(
        "router product, gradient of weight", name, ours,
        moved=tokens * (2 * hidden + 4 * experts) + 4 * experts * hidden, flops=2 * tokens * hidden * experts,
        kind="tf32", gate=("ratio", 1.0), against="torch float32", check=check,
        peers={"torch float32": float32, "linghe, one pass": linghe}, variants=_swept(ours),
    )  # fmt: skip


def _choice(name: str, tokens: int, hidden: int, experts: int) -> Case:
    del hidden

    def operands() -> tuple[Tensor, Tensor]:
        return _random(tokens, experts), _random(experts) / 10

    def with_(elements: int, warps: int) -> Prepared:
        def prepare() -> Callable[[], object]:
            logits_TE, bias_E = operands()

            def run() -> object:
                with mock.patch.multiple(router_triton, CHOICE_ELEMENTS=elements, CHOICE_WARPS=warps):
                    return router_triton.choose_triton(logits_TE, bias_E, TOP_K, GROUPS, KEPT, SCALING)

            return run

        return prepare

    def torchs() -> Callable[[], object]:
        logits_TE, bias_E = operands()

        def run() -> object:
            scores_TE = logits_TE.sigmoid()
            indices_TK = router.choose_experts(scores_TE, bias_E, TOP_K, GROUPS, KEPT)
            counts_E = torch.bincount(indices_TK.flatten(), minlength=experts)
            return indices_TK, router.expert_weights(scores_TE, indices_TK, SCALING), counts_E

        return run

    def linghe() -> Callable[[], object]:
        from linghe.facade.topk import group_topk_score

        logits_TE, bias_E = operands()
        return lambda: group_topk_score(
            logits_TE, TOP_K, expert_bias=bias_E, num_groups=GROUPS, group_topk=KEPT, scaling_factor=SCALING
        )

    chosen = (router_triton.CHOICE_ELEMENTS, router_triton.CHOICE_WARPS)
    return Case(
        "router choice", name, with_(*chosen), moved=tokens * (4 * experts + 12 * TOP_K), gate=("share", 0.4),
        peers={"torch": torchs, "linghe (dense output)": linghe},
        variants={f"{n} elements, {w} warps": with_(n, w) for n in (1024, 2048, 4096, 8192) for w in (2, 4, 8)},
    )  # fmt: skip


def _choice_gradient(name: str, tokens: int, hidden: int, experts: int) -> Case:
    del hidden

    def ours() -> Callable[[], object]:
        logits_TE = _random(tokens, experts)
        indices_TK, weights_TK, _ = router_triton.choose_triton(
            logits_TE, torch.zeros(experts, device="cuda"), TOP_K, GROUPS, KEPT, SCALING
        )
        return lambda: router_triton.logits_gradient_triton(weights_TK, None, logits_TE, indices_TK, SCALING, parts=2)

    moved = tokens * (4 * experts + TOP_K * (8 + 4 + 4))
    return Case("router choice, gradient", name, ours, moved=moved, gate=("share", 0.6))
