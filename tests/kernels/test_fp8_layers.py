"""Linear layers and experts in FP8: every product against float64 of the values that FP8 holds, step by step."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from ling_flow.kernels import fp8, fp8_layers
from ling_flow.kernels.experts import routed_experts
from ling_flow.kernels.fp8_layers import FP8Weight, fp8_linear, fp8_routed_experts
from ling_flow.kernels.grouped_gemm_fp8 import grouped_forward_fp8_triton, grouped_wgrad_fp8_triton
from ling_flow.kernels.row_map import dense_map, row_map_triton
from ling_flow.kernels.shapes import SMALL, MoEShape, normal, route
from ling_flow.kernels.swiglu_quantise import swiglu_quantize_backward_triton, swiglu_quantize_triton
from ling_flow.kernels.unpermute import sum_rows_triton


def close(found: Tensor, exact: Tensor, tolerance: float) -> None:
    assert found.shape == exact.shape
    error = (found.double() - exact.double()).norm()
    assert error <= tolerance * exact.double().norm() + 1e-30


def seen_by_rows(x: Tensor) -> Tensor:
    return fp8.dequantize_rows(fp8.quantize_rows_reference(x)).double()


def seen_by_columns(x: Tensor) -> Tensor:
    where = dense_map(len(x), x.device)
    return fp8.dequantize_columns(fp8.quantize_columns_reference(x, where, False), where)[: len(x)].double()


def seen_in_blocks(w: Tensor) -> Tensor:
    return fp8.dequantize_blocks(fp8.quantize_blocks_reference(w.unsqueeze(0)))[0].double()


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(64, 128, 256), (37, 144, 80), (1, 96, 192), (300, 48, 16)])
def test_linear_multiplies_what_fp8_holds(tokens: int, inputs: int, outputs: int) -> None:
    x = normal((2, tokens, inputs), torch.bfloat16).requires_grad_()
    weight = (normal((outputs, inputs), torch.float32, seed=1) * 0.05).requires_grad_()
    y = fp8_linear(x, weight, FP8Weight())
    upstream = normal((2, tokens, outputs), torch.bfloat16, seed=2) * 1e-6
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), upstream)
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    flat, grad = x.detach().flatten(0, 1), upstream.flatten(0, 1)
    close(y.flatten(0, 1), seen_by_rows(flat) @ seen_in_blocks(weight.detach()).T, 0.003)  # bfloat16 has 8 bits
    close(grad_x.flatten(0, 1), seen_by_rows(grad) @ seen_in_blocks(weight.detach()), 0.003)
    close(grad_weight, seen_by_columns(grad).T @ seen_by_columns(flat), 1e-5)
    close(y, x.detach().double() @ weight.detach().double().T, 0.06)  # E4M3 has 4 bits


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_experts_are_those_of_bfloat16_up_to_fp8(shape: MoEShape) -> None:
    routing = route(shape)
    gate_up = normal((shape.experts, 2 * shape.width, shape.hidden), torch.float32, seed=1) * 0.1
    down = normal((shape.experts, shape.hidden, shape.width), torch.float32, seed=2) * 0.1
    x = normal((shape.tokens, shape.hidden), torch.bfloat16)
    upstream = normal((shape.tokens, shape.hidden), torch.bfloat16, seed=3)

    def leaves(dtype: torch.dtype) -> list[Tensor]:
        wide = (x, routing.weights_TK, gate_up, down)
        return [leaf.to(dtype).requires_grad_() for leaf in wide]

    exact = leaves(torch.float64)
    expected = routed_experts(exact[0], routing.indices_TK, exact[1], routing.counts_E, exact[2], exact[3])
    ours = [leaf.clone().requires_grad_() for leaf in (x, routing.weights_TK, gate_up, down)]
    found = fp8_routed_experts(
        ours[0], routing.indices_TK, ours[1], routing.counts_E, ours[2], ours[3], FP8Weight(), FP8Weight()
    )
    close(found, expected, 0.08)
    pairs = zip(
        torch.autograd.grad(found, ours, upstream),
        torch.autograd.grad(expected, exact, upstream.double()),
        strict=True,
    )
    for mine, theirs in pairs:
        # A few numbers, each a sum of terms of either sign: rounding weighs more than in a large matrix.
        close(mine, theirs, 0.1 if mine.numel() > 100 else 0.4)


def test_a_weight_is_quantised_once_per_change() -> None:
    weight, kept = normal((1, 128, 128), torch.float32), FP8Weight()
    first = kept.quantized(weight)
    assert kept.quantized(weight) is first
    weight.mul_(2)
    second = kept.quantized(weight)
    assert second is not first
    assert torch.equal(second.scales, 2 * first.scales)


def test_a_weight_is_quantised_anew_after_a_step_of_any_optimizer() -> None:
    weight, kept = torch.nn.Parameter(normal((96, 160), torch.float32)), FP8Weight()
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for _ in range(3):
        before, version = kept.quantized(weight), weight._version
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert weight._version == version  # as torch has it
        assert kept.quantized(weight) is not before
        close(fp8.dequantize_blocks(kept.quantized(weight))[0], weight, 0.04)
        assert kept.quantized(weight) is kept.quantized(weight)


def test_another_weight_in_the_same_memory_is_quantised() -> None:
    memory, kept = np.ones((128, 128), np.float32), FP8Weight()
    first = torch.nn.Parameter(torch.from_numpy(memory))
    assert kept.quantized(first).scales == 1 / 448
    memory *= 2
    second = torch.nn.Parameter(torch.from_numpy(memory))
    assert (second.data_ptr(), second._version) == (first.data_ptr(), first._version)
    assert kept.quantized(second).scales == 2 / 448
    second.data = torch.full((128, 128), 3.0)
    assert kept.quantized(second).scales == 3 / 448


def test_a_copy_of_a_layer_keeps_nothing_of_the_first_ones_weight() -> None:
    kept, weight = FP8Weight(), normal((128, 128), torch.float32)
    quantized = kept.quantized(weight)
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert other.quantized(weight) is not quantized
    assert kept.quantized(weight) is quantized


def test_a_watch_hears_of_every_operation() -> None:
    heard: dict[str, tuple[Tensor, Tensor]] = {}
    weight = (normal((64, 128), torch.float32, seed=1) * 0.1).requires_grad_()
    x = normal((40, 128), torch.bfloat16).requires_grad_()
    kept = FP8Weight()
    kept.watch = lambda name, exact, found: heard.__setitem__(name, (exact, found))
    y = fp8_linear(x, weight, kept)
    y.backward(normal((40, 64), torch.bfloat16, seed=2))
    assert set(heard) == {
        "weight", "input", "input by columns", "forward", "gradient", "gradient by columns", "dgrad", "wgrad"
    }  # fmt: skip
    for name, (exact, found) in heard.items():
        close(found, exact, 0.06)
        assert not torch.equal(found, exact), name
    assert torch.equal(heard["forward"][1], y.detach().float())


@pytest.mark.parametrize("shape", [SMALL[2], SMALL[5]], ids=lambda shape: shape.name)
def test_a_watch_hears_of_every_product_of_every_expert(shape: MoEShape) -> None:
    routing = route(shape)
    x = normal((shape.tokens, shape.hidden), torch.bfloat16).requires_grad_()
    gate_up = (normal((shape.experts, 2 * shape.width, shape.hidden), torch.float32, seed=1) * 0.1).requires_grad_()
    down = (normal((shape.experts, shape.hidden, shape.width), torch.float32, seed=2) * 0.1).requires_grad_()
    heard: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}

    def watched(layer: str) -> FP8Weight:
        kept = FP8Weight()
        kept.watch = lambda name, exact, found: heard.setdefault((layer, name), []).append((exact, found))
        return kept

    y = fp8_routed_experts(
        x, routing.indices_TK, routing.weights_TK, routing.counts_E, gate_up, down, watched("gate_up"), watched("down")
    )
    y.backward(normal((shape.tokens, shape.hidden), torch.bfloat16, seed=3))
    once = {"input", "input by columns", "gradient", "gradient by columns"}
    each = {"weight", "forward", "dgrad", "wgrad"}
    assert set(heard) == {(layer, name) for layer in ("gate_up", "down") for name in once | each}
    counts = routing.counts_E.tolist()
    for (layer, name), parts in heard.items():
        assert len(parts) == (shape.experts if name in each else 1)
        for exact, found in parts:
            close(found, exact, 0.08)
        if name in ("forward", "dgrad"):
            assert [len(found) for _, found in parts] == counts, layer
        if name == "wgrad":
            gradient = (gate_up if layer == "gate_up" else down).grad
            assert gradient is not None
            assert torch.equal(torch.stack([found for _, found in parts]), gradient)


def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would run: every operation of the layers by its Triton kernels."""
    replaced = {
        "quantize_rows": fp8.quantize_rows_triton,
        "quantize_blocks": fp8.quantize_blocks_triton,
        "quantize_columns": fp8.quantize_columns_triton,
        "quantize_rows_and_columns": fp8.quantize_both_triton,
        "row_map": row_map_triton,
        "grouped_forward_fp8": grouped_forward_fp8_triton,
        "grouped_dgrad_fp8": lambda grad, w, where, gather=False: grouped_forward_fp8_triton(
            grad, fp8.transpose_blocks_triton(w), where, gather
        ),
        "grouped_wgrad_fp8": grouped_wgrad_fp8_triton,
        "swiglu_quantize": swiglu_quantize_triton,
        "swiglu_quantize_backward": swiglu_quantize_backward_triton,
        "sum_rows": sum_rows_triton,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(fp8_layers, name, function)


@pytest.mark.parametrize("shape", [SMALL[1], SMALL[5], SMALL[7]], ids=lambda shape: shape.name)
def test_kernels_give_what_the_definitions_give(
    shape: MoEShape, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    routing = route(shape, device)
    gate_up = normal((shape.experts, 2 * shape.width, shape.hidden), torch.float32, device, seed=1) * 0.1
    down = normal((shape.experts, shape.hidden, shape.width), torch.float32, device, seed=2) * 0.1
    dense = normal((shape.hidden, shape.hidden), torch.float32, device, seed=4) * 0.1
    x = normal((shape.tokens, shape.hidden), torch.bfloat16, device)
    upstream = normal((shape.tokens, shape.hidden), torch.bfloat16, device, seed=3)

    def everything(on: torch.device) -> list[Tensor]:
        given = (x, routing.weights_TK, gate_up, down, dense)
        leaves = [leaf.to(on, copy=True).requires_grad_() for leaf in given]
        indices_TK, counts_E = routing.indices_TK.to(on), routing.counts_E.to(on)
        h = fp8_linear(leaves[0], leaves[4], FP8Weight())
        y = fp8_routed_experts(h, indices_TK, leaves[1], counts_E, leaves[2], leaves[3], FP8Weight(), FP8Weight())
        return [y, *torch.autograd.grad(y, leaves, upstream.to(on))]

    expected = everything(torch.device("cpu"))
    by_kernels(monkeypatch)
    found = everything(device)
    # Sums in another order change a last bit of bfloat16, and that one a step of FP8. A GPU's SwiGLU does so too, and
    # its tensor cores keep some 14 bits of a partial sum.
    large, small = (0.02, 0.1) if device.type == "cuda" else (0.01, 0.05)
    for mine, theirs in zip(found, expected, strict=True):
        close(mine.cpu(), theirs, large if mine.numel() > 100 else small)
    if device.type == "cuda":  # the interpreter runs one program after the other
        assert all(torch.equal(mine, twice) for mine, twice in zip(found, everything(device), strict=True))
