"""Rows of the experts from tokens and back: kernels against the definition, the definition against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from ling_flow.kernels import unpermute
from ling_flow.kernels.row_map import RowMap, row_map_reference
from ling_flow.kernels.shapes import SMALL, MoEShape, normal, route

by_shape = pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def prepared(shape: MoEShape, device: torch.device | str = "cpu") -> tuple[RowMap, Tensor]:
    routing = route(shape, device)
    return row_map_reference(routing.indices_TK, routing.counts_E), routing.weights_TK


def garbage(row_map: RowMap, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows with NaN in padding: what is never to be read."""
    rows_RD = normal((row_map.rows, width), dtype, device, seed=1)
    return rows_RD.masked_fill_((row_map.pair_R < 0)[:, None], float("nan"))


@by_dtype
@by_shape
def test_gather_and_sum(shape: MoEShape, dtype: torch.dtype, device: torch.device) -> None:
    row_map, _ = prepared(shape, device)
    for width in (shape.hidden // 2, 7):
        x_TD = normal((shape.tokens, width), dtype, device)
        found = unpermute.gather_rows_triton(x_TD, row_map)
        assert torch.equal(found, unpermute.gather_rows_reference(x_TD, row_map))
        y_RD = garbage(row_map, width, dtype, device)
        found = unpermute.sum_rows_triton(y_RD, row_map)
        assert torch.equal(found, unpermute.sum_rows_reference(y_RD, row_map))


@by_dtype
@by_shape
def test_weighted_sum(shape: MoEShape, dtype: torch.dtype, device: torch.device) -> None:
    row_map, weights_TK = prepared(shape, device)
    # A GPU fuses weight·row + sum: one rounding of float32 less, which may tip one of the narrow type.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    for width in (40, 7):
        y_RD = garbage(row_map, width, dtype, device)
        found = unpermute.sum_rows_triton(y_RD, row_map, weights_TK)
        expected = unpermute.sum_rows_reference(y_RD, row_map, weights_TK)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-6)
        grad_TD = normal((shape.tokens, width), dtype, device, seed=2)
        grads = unpermute.weighted_sum_rows_backward_triton(grad_TD, y_RD, weights_TK, row_map)
        expected_y, expected_weights = unpermute.weighted_sum_rows_backward_reference(
            grad_TD, y_RD.nan_to_num(), weights_TK, row_map
        )
        assert torch.equal(grads[0], expected_y)
        torch.testing.assert_close(grads[1], expected_weights, rtol=1e-5, atol=1e-5 * width**0.5)  # order of the sum


def test_wide_rows(device: torch.device) -> None:
    row_map, weights_TK = prepared(MoEShape("wide", 5, 4200, 1, 3, 2), device)
    x_TD = normal((5, 4200), torch.bfloat16, device)
    y_RD = garbage(row_map, 4200, torch.bfloat16, device)
    assert torch.equal(unpermute.gather_rows_triton(x_TD, row_map), unpermute.gather_rows_reference(x_TD, row_map))
    assert torch.equal(unpermute.sum_rows_triton(y_RD, row_map), unpermute.sum_rows_reference(y_RD, row_map))
    found = unpermute.weighted_sum_rows_backward_triton(x_TD, y_RD, weights_TK, row_map)
    expected = unpermute.weighted_sum_rows_backward_reference(x_TD, y_RD.nan_to_num(), weights_TK, row_map)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-3)


@by_shape
def test_the_definition_is_a_loop_over_pairs(shape: MoEShape) -> None:
    row_map, weights_TK = prepared(shape)
    x_TD = normal((shape.tokens, 5), torch.float32)
    rows_RD = unpermute.gather_rows(x_TD, row_map)
    y_RD = garbage(row_map, 5, torch.float32, torch.device("cpu"))
    sum_TD, weighted_TD = unpermute.sum_rows(y_RD, row_map), unpermute.weighted_sum_rows(y_RD, weights_TK, row_map)
    for row, pair in enumerate(row_map.pair_R.tolist()):
        assert torch.equal(rows_RD[row], x_TD[pair // shape.top_k] if pair >= 0 else torch.zeros(5))
    for token, places in enumerate(row_map.place_TK.tolist()):
        total = weighted = torch.zeros(5)
        for k, row in enumerate(places):
            total, weighted = total + y_RD[row], weighted + weights_TK[token, k] * y_RD[row]
        assert torch.equal(sum_TD[token], total)
        assert torch.equal(weighted_TD[token], weighted)


@pytest.mark.parametrize("shape", SMALL[1:4], ids=lambda shape: shape.name)
def test_gradients(shape: MoEShape) -> None:
    row_map, weights_TK = prepared(shape)
    x_TD = normal((shape.tokens, 2), torch.float64).requires_grad_()
    y_RD = normal((row_map.rows, 2), torch.float64).requires_grad_()
    weights_TK = weights_TK.double().requires_grad_()
    assert gradcheck(lambda x: unpermute.gather_rows(x, row_map), (x_TD,))
    assert gradcheck(lambda y: unpermute.sum_rows(y, row_map), (y_RD,))
    assert gradcheck(lambda y, w: unpermute.weighted_sum_rows(y, w, row_map), (y_RD, weights_TK))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_same_bits_in_every_run(device: torch.device) -> None:
    row_map, weights_TK = prepared(MoEShape("many", 4096, 512, 1, 64, 8, "skewed"), device)
    y_RD = garbage(row_map, 512, torch.bfloat16, device).nan_to_num().requires_grad_()
    weights_TK.requires_grad_()
    first, *others = (
        torch.autograd.grad(unpermute.weighted_sum_rows(y_RD, weights_TK, row_map).float().square().sum(),
                            (y_RD, weights_TK))
        for _ in range(5)
    )  # fmt: skip
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
