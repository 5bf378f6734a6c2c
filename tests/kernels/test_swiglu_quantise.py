"""SwiGLU, plain, weighted and quantised: kernels against the definitions and against each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from ling_flow.kernels import fp8, swiglu, swiglu_quantise
from ling_flow.kernels.fp8 import Quantized
from ling_flow.kernels.row_map import RowMap, dense_map, row_map_reference
from ling_flow.kernels.shapes import SMALL, MoEShape, normal, route
from tests.kernels.compare import same_by_columns

by_shape = pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
# exp and the division differ in the last bits between torch and Triton, which tips few roundings of the narrow type.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def prepared(
    shape: MoEShape, dtype: torch.dtype, device: torch.device, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor, RowMap]:
    """[gate | up] and a gradient with NaN in padding, weights, the map."""
    width = width or shape.width
    routing = route(shape, device)
    row_map = row_map_reference(routing.indices_TK, routing.counts_E)
    padding_R1 = (row_map.pair_R < 0)[:, None]
    z_R2F = normal((row_map.rows, 2 * width), dtype).to(device).mul_(3).masked_fill_(padding_R1, float("nan"))
    grad_RF = normal((row_map.rows, width), dtype, seed=1).to(device).masked_fill_(padding_R1, float("nan"))
    return z_R2F, grad_RF, routing.weights_TK, row_map


def same(found: Quantized, expected: Quantized, rows: Tensor | slice, scales: tuple[Tensor | slice, ...]) -> None:
    assert torch.equal(found.values.view(torch.uint8)[rows], expected.values.view(torch.uint8)[rows])
    assert torch.equal(found.scales[scales], expected.scales[scales])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@by_shape
def test_weighted(shape: MoEShape, dtype: torch.dtype, device: torch.device) -> None:
    z_R2F, grad_RF, weights_TK, row_map = prepared(shape, dtype, device)
    tolerance = TOLERANCE[dtype]
    for weights in (weights_TK, None):
        found = swiglu.swiglu_triton(z_R2F, weights, row_map)
        expected = swiglu_quantise.swiglu_weighted_reference(z_R2F, weights, row_map)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-5)
        assert (found[row_map.pair_R < 0] == 0).all()
        found_z, found_weights = swiglu.swiglu_backward_triton(z_R2F, grad_RF, weights, row_map)
        expected_z, expected_weights = swiglu_quantise.swiglu_weighted_backward_reference(
            z_R2F, grad_RF, weights, row_map
        )
        # 1 + gate · (1 - sigmoid) cancels near its zero.
        torch.testing.assert_close(found_z, expected_z, rtol=tolerance, atol=1e-4)
        assert (found_z[row_map.pair_R < 0] == 0).all()
        if weights is None:
            assert found_weights is None and expected_weights is None
        else:
            torch.testing.assert_close(found_weights, expected_weights, rtol=1e-4, atol=1e-3)  # order of the sum


@by_shape
def test_quantised_is_quantising_what_is_weighted(shape: MoEShape, device: torch.device) -> None:
    z_R2F, _, weights_TK, row_map = prepared(shape, torch.bfloat16, device)
    for weights in (weights_TK, None):
        h_RF = swiglu.swiglu_triton(z_R2F, weights, row_map)
        by_rows = swiglu_quantise.swiglu_quantize_triton(z_R2F, weights, row_map, by_columns=False)
        same(by_rows, fp8.quantize_rows_reference(h_RF), slice(None), (slice(None),))
        by_columns = swiglu_quantise.swiglu_quantize_triton(z_R2F, weights, row_map, by_columns=True)
        same_by_columns(by_columns, fp8.quantize_columns_reference(h_RF, row_map, False), row_map)


@by_shape
def test_the_quantised_gradient_is_quantising_the_gradient(shape: MoEShape, device: torch.device) -> None:
    for weighted in (True, False):
        z_R2F, grad_RF, weights_TK, row_map = prepared(shape, torch.bfloat16, device)
        weights, real = weights_TK if weighted else None, row_map.pair_R >= 0
        grad_z_R2F, grad_weights = swiglu.swiglu_backward_triton(z_R2F, grad_RF, weights, row_map)
        by_rows, by_columns, found_weights = swiglu_quantise.swiglu_quantize_backward_triton(
            z_R2F, grad_RF, weights, row_map
        )
        same(by_rows, fp8.quantize_rows_reference(grad_z_R2F), real, (slice(None), real))
        same_by_columns(by_columns, fp8.quantize_columns_reference(grad_z_R2F, row_map, False), row_map)
        torch.testing.assert_close(found_weights, grad_weights, rtol=1e-5, atol=1e-4)  # order of the sum


@pytest.mark.parametrize("tile", swiglu_quantise.COLUMNS_TILES[1:], ids=str)
def test_every_tile_by_columns_gives_the_same(tile: tuple[int, int, int], device: torch.device) -> None:
    z_R2F, _, weights_TK, row_map = prepared(MoEShape("", 30, 1, 144, 3, 2, "skewed"), torch.bfloat16, device)
    h_RF = swiglu.swiglu_triton(z_R2F, weights_TK, row_map)
    found = swiglu_quantise.swiglu_quantize_triton(z_R2F, weights_TK, row_map, True, tile)
    expected = fp8.quantize_columns_reference(h_RF, row_map, False)
    same_by_columns(found, expected, row_map)


@pytest.mark.parametrize("tile", swiglu_quantise.BACKWARD_TILES[1:], ids=str)
def test_every_tile_of_the_gradient_gives_the_same(tile: tuple[int, int, int, int], device: torch.device) -> None:
    z_R2F, grad_RF, weights_TK, row_map = prepared(MoEShape("", 30, 1, 128, 3, 2, "skewed"), torch.bfloat16, device)
    found = swiglu_quantise.swiglu_quantize_backward_triton(z_R2F, grad_RF, weights_TK, row_map, tile)
    grad_z_R2F, grad_weights = swiglu.swiglu_backward_triton(z_R2F, grad_RF, weights_TK, row_map)
    real = row_map.pair_R >= 0
    same(found[0], fp8.quantize_rows_reference(grad_z_R2F), real, (slice(None), real))
    same_by_columns(found[1], fp8.quantize_columns_reference(grad_z_R2F, row_map, False), row_map)
    torch.testing.assert_close(found[2], grad_weights, rtol=1e-5, atol=1e-4)


def test_several_parts_of_columns(device: torch.device) -> None:
    """The weight's gradient is summed over programs, and halves of [gate | up] are told apart."""
    shape = MoEShape("wide", 20, 1, 384, 3, 2, "skewed")
    z_R2F, grad_RF, weights_TK, row_map = prepared(shape, torch.bfloat16, device)
    found = swiglu_quantise.swiglu_quantize_backward_triton(z_R2F, grad_RF, weights_TK, row_map)
    grad_z_R2F, grad_weights = swiglu.swiglu_backward_triton(z_R2F, grad_RF, weights_TK, row_map)
    real = row_map.pair_R >= 0
    same(found[0], fp8.quantize_rows_reference(grad_z_R2F), real, (slice(None), real))
    same_by_columns(found[1], fp8.quantize_columns_reference(grad_z_R2F, row_map, False), row_map)
    torch.testing.assert_close(found[2], grad_weights, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [(3, 1030), (17, 24), (5, 7), (0, 16)])
def test_dense(size: tuple[int, int], device: torch.device) -> None:
    rows, width = size
    z_N2F = normal((rows, 2 * width), torch.bfloat16, device)
    grad_NF = normal((rows, width), torch.bfloat16, device, seed=1)
    exact_N2F = z_N2F.double().requires_grad_()
    exact_NF = swiglu.swiglu(exact_N2F)
    exact_NF.backward(grad_NF.double())
    torch.testing.assert_close(swiglu.swiglu_triton(z_N2F).double(), exact_NF.detach(), rtol=2**-8, atol=1e-6)
    found, _ = swiglu.swiglu_backward_triton(z_N2F, grad_NF)
    torch.testing.assert_close(found.double(), exact_N2F.grad, rtol=2**-8, atol=1e-6)


def test_dense_quantised_through_a_map_of_all_rows(device: torch.device) -> None:
    z_N2F = normal((50, 2 * 144), torch.bfloat16, device)
    found = swiglu_quantise.swiglu_quantize_triton(z_N2F, None, dense_map(50, device), by_columns=False)
    expected = fp8.quantize_rows_reference(swiglu.swiglu_triton(z_N2F))
    same(found, Quantized(expected.values, expected.scales), slice(50), (slice(None), slice(50)))


def test_extremes_give_what_torch_gives(device: torch.device) -> None:
    gate_N1 = torch.tensor([-1e4, -100.0, -0.0, 100.0, 1e4, float("nan")], device=device)[:, None]
    z_N2 = torch.cat([gate_N1, torch.ones_like(gate_N1)], 1)
    torch.testing.assert_close(
        swiglu.swiglu_triton(z_N2), torch.nn.functional.silu(gate_N1), equal_nan=True, rtol=1e-5, atol=1e-30
    )
    grad_N2, _ = swiglu.swiglu_backward_triton(z_N2, torch.ones_like(gate_N1))
    assert grad_N2[:5].isfinite().all()


@pytest.mark.parametrize("shape", SMALL[1:4], ids=lambda shape: shape.name)
def test_the_definition_and_its_gradient(shape: MoEShape) -> None:
    z_R2F, _, weights_TK, row_map = prepared(shape, torch.float64, torch.device("cpu"), width=2)
    h_RF = swiglu_quantise.swiglu_weighted(z_R2F, weights_TK, row_map)
    for row, pair in enumerate(row_map.pair_R.tolist()):
        expected = torch.zeros(2, dtype=torch.float64)
        if pair >= 0:
            gate, up = z_R2F[row].chunk(2)
            expected = gate / (1 + (-gate).exp()) * up * weights_TK.flatten()[pair]
        torch.testing.assert_close(h_RF[row], expected)
    z_R2F, weights_TK = z_R2F.nan_to_num().requires_grad_(), weights_TK.double().requires_grad_()
    assert gradcheck(lambda z, w: swiglu_quantise.swiglu_weighted(z, w, row_map), (z_R2F, weights_TK))
