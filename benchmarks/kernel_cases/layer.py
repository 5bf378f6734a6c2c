"""A whole layer of routed experts: router's choice given, forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.kernel_cases import Case, Prepared
from ling_flow.kernels.experts import routed_experts
from ling_flow.kernels.fp8_layers import FP8Weight, fp8_routed_experts
from ling_flow.kernels.shapes import PUBLISHED, MoEShape, normal, route

# The shape that SonicMoE and ScatterMoE publish figures at.
SONIC = MoEShape("32k 4096 512 128", 32768, 4096, 512, 128, 8)


def cases() -> Iterator[Case]:
    for shape in (SONIC, *PUBLISHED):
        yield _layer(shape, backward=False)
        yield _layer(shape, backward=True)
        for quantised in (False, True):
            yield _fp8_layer(shape, quantised)
            yield _trained_layer(shape, quantised)


def _inputs(shape: MoEShape, weights: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    routing = route(shape, "cuda")
    x_TD = normal((shape.tokens, shape.hidden), torch.bfloat16, "cuda").requires_grad_()
    gate_up = normal((shape.experts, 2 * shape.width, shape.hidden), torch.bfloat16, "cuda", 1) * 0.02
    down = normal((shape.experts, shape.hidden, shape.width), torch.bfloat16, "cuda", 2) * 0.02
    gate_up, down = (weight.to(weights).requires_grad_() for weight in (gate_up, down))
    weights_TK = routing.weights_TK.requires_grad_()
    return x_TD, routing.indices_TK, weights_TK, routing.counts_E, gate_up, down


def _run(forward: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    """The call that is timed: with leaves also their gradients, which replace those before."""
    if not leaves:

        def once() -> object:
            with torch.no_grad():
                return forward()

        return once
    upstream = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, upstream)


def _leaves(inputs: tuple[torch.Tensor, ...], backward: bool = True) -> tuple[torch.Tensor, ...]:
    return tuple(tensor for tensor in inputs if tensor.requires_grad) if backward else ()


def _bfloat16(shape: MoEShape, backward: bool) -> Callable[[], object]:
    inputs = _inputs(shape)
    return _run(lambda: routed_experts(*inputs), _leaves(inputs, backward))


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
        return _run(lambda: mlp(x_TD, weights, indices_TK), (x_TD, *mlp.parameters()) if backward else ())

    flops = (18 if backward else 6) * shape.pairs * shape.width * shape.hidden
    gate = ("tflops", 325.0) if shape is SONIC and not backward else None
    name = "experts bf16 forward" + (" + backward" if backward else "")
    return Case(
        name, shape.name, lambda: _bfloat16(shape, backward), moved=_moved(shape, 2, 2, 3 if backward else 1),
        flops=flops, gate=gate, peers={"scattermoe": scattermoe},
    )  # fmt: skip


def _fp8(shape: MoEShape, weights: torch.dtype, quantised: bool) -> Callable[[], object]:
    inputs, kept = _inputs(shape, weights), (FP8Weight(), FP8Weight())

    def forward() -> torch.Tensor:
        return fp8_routed_experts(*inputs, *((FP8Weight(), FP8Weight()) if quantised else kept))

    return _run(forward, _leaves(inputs))


def _fp8_case(name: str, shape: MoEShape, weights: torch.dtype, quantised: bool, bfloat16: Prepared) -> Case:
    """Weights are quantised once in an optimizer step: within the time where that has one forward pass, as is the
    default, and before it in each later one. Everything else is always quantised within the time."""
    moved = _moved(shape, 1, 1, 3)
    if quantised:
        moved += 3 * shape.experts * shape.width * shape.hidden * (weights.itemsize + 1)
    like_for_like = weights == torch.bfloat16 and not quantised
    return Case(
        name, shape.name, lambda: _fp8(shape, weights, quantised), moved=moved, kind="fp8",
        flops=18 * shape.pairs * shape.width * shape.hidden, gate=("ratio", 1.3) if like_for_like else None,
        against="ours in bf16", peers={"ours in bf16": bfloat16},
    )  # fmt: skip


def _fp8_layer(shape: MoEShape, quantised: bool) -> Case:
    """Like for like: bfloat16 weights and gradients of weights on both sides."""
    name = "experts FP8, weights quantised too" if quantised else "experts FP8 forward + backward"
    return _fp8_case(name, shape, torch.bfloat16, quantised, lambda: _bfloat16(shape, True))


def _trained_layer(shape: MoEShape, quantised: bool) -> Case:
    """As our training runs it: float32 masters, float32 gradients; in bfloat16 the masters are rounded on the way."""

    def bfloat16() -> Callable[[], object]:
        inputs = _inputs(shape, torch.float32)
        return _run(lambda: routed_experts(*inputs[:4], *(w.bfloat16() for w in inputs[4:])), _leaves(inputs))

    name = "experts FP8, masters quantised too" if quantised else "experts FP8, float32 masters"
    return _fp8_case(name, shape, torch.float32, quantised, bfloat16)
