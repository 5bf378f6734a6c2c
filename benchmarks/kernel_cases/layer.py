"""A whole layer of routed experts: router's choice given, forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.kernel_cases import Case
from ling_flow.kernels.experts import routed_experts
from ling_flow.kernels.fp8_layers import FP8Weight, fp8_routed_experts
from ling_flow.kernels.shapes import PUBLISHED, MoEShape, normal, route

# The shape that SonicMoE and ScatterMoE publish figures at.
SONIC = MoEShape("32k 4096 512 128", 32768, 4096, 512, 128, 8)


def cases() -> Iterator[Case]:
    for shape in (SONIC, *PUBLISHED):
        yield _layer(shape, backward=False)
        yield _layer(shape, backward=True)
    for shape in PUBLISHED:
        yield _fp8_layer(shape)


def _inputs(shape: MoEShape) -> tuple[torch.Tensor, ...]:
    routing = route(shape, "cuda")
    x_TD = normal((shape.tokens, shape.hidden), torch.bfloat16, "cuda").requires_grad_()
    gate_up = normal((shape.experts, 2 * shape.width, shape.hidden), torch.bfloat16, "cuda", 1) * 0.02
    down = normal((shape.experts, shape.hidden, shape.width), torch.bfloat16, "cuda", 2) * 0.02
    weights_TK = routing.weights_TK.requires_grad_()
    return x_TD, routing.indices_TK, weights_TK, routing.counts_E, gate_up.requires_grad_(), down.requires_grad_()


def _run(forward: Callable[[], torch.Tensor], upstream: torch.Tensor | None) -> Callable[[], object]:
    if upstream is None:

        def once() -> object:
            with torch.no_grad():
                return forward()

        return once
    return lambda: forward().backward(upstream)


def _upstream(shape: MoEShape, backward: bool) -> torch.Tensor | None:
    return normal((shape.tokens, shape.hidden), torch.bfloat16, "cuda", 3) if backward else None


def _bfloat16(shape: MoEShape, backward: bool) -> Callable[[], object]:
    inputs = _inputs(shape)
    return _run(lambda: routed_experts(*inputs), _upstream(shape, backward))


def _moved(shape: MoEShape, weight_bytes: int, row_bytes: int, passes: int) -> int:
    weights = 3 * shape.experts * shape.width * shape.hidden * weight_bytes
    rows = shape.pairs * (2 * shape.hidden + 3 * shape.width) * row_bytes
    return passes * (weights + rows)


def _layer(shape: MoEShape, backward: bool) -> Case:
    def scattermoe() -> Callable[[], object]:
        from scattermoe.mlp import GLUMLP

        x_TD, indices_TK, weights_TK, *_ = _inputs(shape)
        mlp = GLUMLP(shape.hidden, shape.width, shape.experts, shape.top_k, activation=torch.nn.SiLU())
        mlp = mlp.to("cuda", torch.bfloat16)
        weights = weights_TK.detach().bfloat16()
        return _run(lambda: mlp(x_TD, weights, indices_TK), _upstream(shape, backward))

    flops = (18 if backward else 6) * shape.pairs * shape.width * shape.hidden
    gate = ("tflops", 325.0) if shape is SONIC and not backward else None
    name = "experts bf16 forward" + (" + backward" if backward else "")
    return Case(
        name, shape.name, lambda: _bfloat16(shape, backward), moved=_moved(shape, 2, 2, 3 if backward else 1),
        flops=flops, gate=gate, peers={"scattermoe": scattermoe},
    )  # fmt: skip


def _fp8_layer(shape: MoEShape) -> Case:
    def ours() -> Callable[[], object]:
        x_TD, indices_TK, weights_TK, counts_E, gate_up, down = _inputs(shape)
        masters = [weight.detach().float().requires_grad_() for weight in (gate_up, down)]
        kept = (FP8Weight(), FP8Weight())

        def forward() -> torch.Tensor:
            return fp8_routed_experts(x_TD, indices_TK, weights_TK, counts_E, masters[0], masters[1], *kept)

        return _run(forward, _upstream(shape, True))

    return Case(
        "experts FP8 forward + backward", shape.name, ours, moved=_moved(shape, 1, 1, 3),
        flops=18 * shape.pairs * shape.width * shape.hidden, kind="fp8", gate=("ratio", 1.3), against="ours in bf16",
        peers={"ours in bf16": lambda: _bfloat16(shape, True)},
    )  # fmt: skip
