"""The output head with its loss, the loss on a chunk of logits, AdamW with 8-bit moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_cases import Case, Prepared, relative_error
from ling_flow.kernels import adamw8
from ling_flow.kernels import linear_cross_entropy as module

VOCABULARY = 157184


def cases() -> Iterator[Case]:
    rows = module.CHUNK_ELEMENTS["cuda"] // VOCABULARY
    for name, count in ((f"chunk of {rows}", rows), ("8192 tokens", 8192)):
        yield _loss(name, count, gradient=False)
        yield _loss(name, count, gradient=True)
    for name, hidden in (("mini 8k", 2048), ("flash 8k", 4096)):
        yield _head(name, 8192, hidden)
    yield _optimizer("experts of a mini layer", 256, 1024, 2048)


def _targets(count: int) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(0)).cuda()


def _random(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.bfloat16, device="cuda")


def _loss(name: str, rows: int, gradient: bool) -> Case:
    """In place. What is timed overwrites its input with gradients, which are as good logits as any."""

    def with_(tile: tuple[int, ...]) -> Prepared:
        def prepare() -> Callable[[], object]:
            logits_CV, targets_C = _random(rows, VOCABULARY), _targets(rows)

            def run() -> object:
                with mock.patch.object(module, "GRADIENT_TILES" if gradient else "STATISTICS_TILES", (tile,)):
                    return module.cross_entropy_triton_(logits_CV, targets_C, gradient=gradient)

            return run

        return prepare

    def torchs() -> Callable[[], object]:
        logits_CV, targets_C = _random(rows, VOCABULARY).requires_grad_(gradient), _targets(rows)

        def run() -> object:
            loss = functional.cross_entropy(logits_CV, targets_C, reduction="sum")
            return torch.autograd.grad(loss, logits_CV) if gradient else loss

        return run

    def liger() -> Callable[[], object]:
        from liger_kernel.transformers.functional import liger_cross_entropy

        logits_CV, targets_C = _random(rows, VOCABULARY).requires_grad_(gradient), _targets(rows)
        return lambda: liger_cross_entropy(logits_CV, targets_C, reduction="sum")  # its forward makes the gradient

    def linghe() -> Callable[[], object]:
        from linghe.utils.loss import triton_softmax_cross_entropy_forward

        logits_CV, targets_C = _random(rows, VOCABULARY), _targets(rows)
        return lambda: triton_softmax_cross_entropy_forward(logits_CV, targets_C)

    def check() -> float:
        logits_CV, targets_C = _random(64, VOCABULARY), _targets(64)
        exact = module.cross_entropy_reference(logits_CV.double(), targets_C)
        logprobs_C, _ = module.cross_entropy_triton_(logits_CV, targets_C, gradient=True)
        return max(relative_error(logprobs_C, exact[0]), relative_error(logits_CV, exact[2]))

    passes = 2 if gradient else 1  # read once and written once; the second reading should come from the cache
    tiles: tuple[tuple[int, ...], ...] = module.GRADIENT_TILES if gradient else module.STATISTICS_TILES
    return Case(
        f"cross entropy{', gradient in place' * gradient}", name, with_(tiles[0]),
        moved=passes * 2 * rows * VOCABULARY, gate=("share", 0.65 if gradient else 0.85), check=check,
        peers={"torch": torchs, **({"liger": liger} if gradient else {"linghe": linghe})},
        variants={str(tile): with_(tile) for tile in tiles},
    )  # fmt: skip


def _head(name: str, tokens: int, hidden: int) -> Case:
    def operands() -> tuple[Tensor, Tensor, Tensor]:
        head_VD = (_random(VOCABULARY, hidden) * 0.02).requires_grad_()
        return _random(tokens, hidden).requires_grad_(), head_VD, _targets(tokens)

    def of(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        hidden_TD, head_VD, targets_T = operands()
        return lambda: torch.autograd.grad(loss(hidden_TD, head_VD, targets_T), (hidden_TD, head_VD))

    def with_(chunk: int) -> Prepared:
        def prepare() -> Callable[[], object]:
            run = of(module.linear_cross_entropy)

            def swept() -> object:
                with mock.patch.dict(module.CHUNK_ELEMENTS, cuda=chunk):
                    return run()

            return swept

        return prepare

    def torchs() -> Callable[[], object]:
        if not hasattr(functional, "linear_cross_entropy"):
            raise ModuleNotFoundError("torch below 2.13 has no linear_cross_entropy")
        return of(lambda x, w, t: functional.linear_cross_entropy(x, w, t, reduction="sum"))

    def whole() -> Callable[[], object]:
        return of(lambda x, w, t: functional.cross_entropy((x @ w.T).float(), t, reduction="sum"))

    def liger() -> Callable[[], object]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return of(lambda x, w, t: loss(w, x, t))

    def check() -> float:
        hidden_TD, head_VD, targets_T = operands()
        found = torch.autograd.grad(module.linear_cross_entropy(hidden_TD, head_VD, targets_T), hidden_TD)[0][:64]
        wide = hidden_TD[:64].detach().double().requires_grad_()
        exact = functional.cross_entropy(wide @ head_VD.detach().double().T, targets_T[:64], reduction="sum")
        return relative_error(found, torch.autograd.grad(exact, wide)[0])

    moved = 2 * (2 * tokens * hidden + 2 * VOCABULARY * hidden)
    return Case(
        "output head, loss and gradients", name, with_(module.CHUNK_ELEMENTS["cuda"]), moved=moved,
        flops=6 * tokens * VOCABULARY * hidden, gate=("share", 0.6), check=check,
        peers={"torch": torchs, "torch, all logits": whole, "liger": liger},
        variants={f"{2**power} logits": with_(2**power) for power in (27, 28, 29, 30)},
    )  # fmt: skip


def _optimizer(name: str, *shape: int) -> Case:
    elements = 1
    for size in shape:
        elements *= size

    def operands() -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.randn(shape, device="cuda"))
        parameter.grad = torch.randn(shape, device="cuda")
        return parameter

    def with_(rows: int, warps: int) -> Prepared:
        def prepare() -> Callable[[], object]:
            parameter = operands()
            assert parameter.grad is not None
            grad, moments = parameter.grad, adamw8.new_moments(parameter)
            rates = adamw8.Rates(10, 3e-4, (0.9, 0.95), 1e-8, 0.1)

            def run() -> object:
                with mock.patch.multiple(adamw8, ROWS=rows, WARPS=warps):
                    return adamw8.adamw8_(parameter, grad, moments, rates)

            return run

        return prepare

    def of(optimizer: Callable[..., torch.optim.Optimizer], **options: object) -> Callable[[], object]:
        made = optimizer([operands()], lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, **options)
        return lambda: made.step()

    def bitsandbytes() -> Callable[[], object]:
        from bitsandbytes.optim import AdamW8bit

        return of(AdamW8bit)

    def torchao() -> Callable[[], object]:
        from torchao.optim import AdamW8bit

        return of(AdamW8bit)

    moved = elements * (4 + 4 + 4 + 2 + 2) + 16 * (elements // adamw8.BLOCK)
    return Case(
        "adamw, 8-bit moments", name, with_(adamw8.ROWS, adamw8.WARPS), moved=moved, gate=("share", 0.85),
        peers={
            "torch fused, float32": lambda: of(torch.optim.AdamW, fused=True),
            "bitsandbytes": bitsandbytes,
            "torchao": torchao,
        },
        variants={f"{rows} blocks, {warps} warps": with_(rows, warps) for rows in (2, 4, 8, 16) for warps in (2, 4, 8)},
    )  # fmt: skip
