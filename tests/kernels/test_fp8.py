"""Blockwise FP8: kernels against the definition to the bit, the definition against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ling_flow.kernels import fp8
from ling_flow.kernels.fp8 import STORED
from ling_flow.kernels.row_map import dense_map, row_map_reference
from ling_flow.kernels.shapes import SMALL, MoEShape, normal, route
from tests.kernels.compare import same_by_columns

SCALES = (0.0, 1e-20, 1.0, 1e4)  # what the values are multiplied by


def same(found: fp8.Quantized, expected: fp8.Quantized) -> None:
    torch.testing.assert_close(found.scales, expected.scales, rtol=0, atol=0)
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))


def wide_range(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Magnitudes over six orders, so that small values of a tile fall below FP8's normal range."""
    return (normal(shape, dtype) * (normal(shape, torch.float32, seed=1) * 3).exp().to(dtype)).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 128), (33, 256), (64, 200), (70, 16), (5, 1)])
def test_rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    for factor in SCALES:
        x_MN = wide_range(shape, dtype, device) * factor
        same(fp8.quantize_rows_triton(x_MN), fp8.quantize_rows_reference(x_MN))


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_columns_and_both(shape: MoEShape, device: torch.device) -> None:
    routing = route(shape, device)
    row_map = row_map_reference(routing.indices_TK, routing.counts_E)
    x_TD = wide_range((shape.tokens, shape.hidden), torch.bfloat16, device)
    found = fp8.quantize_columns_triton(x_TD, row_map, gather=True)
    expected = fp8.quantize_columns_reference(x_TD, row_map, gather=True)
    same_by_columns(found, expected, row_map)

    x_RD = wide_range((row_map.rows, shape.hidden), torch.bfloat16, device)
    by_row, by_column = fp8.quantize_both_triton(x_RD, row_map)
    expected_row = fp8.quantize_rows_reference(x_RD)
    expected = fp8.quantize_columns_reference(x_RD, row_map, gather=False)
    real = row_map.pair_R >= 0
    assert torch.equal(by_row.values.view(torch.uint8)[real], expected_row.values.view(torch.uint8)[real])
    assert torch.equal(by_row.scales[:, real], expected_row.scales[:, real])
    same_by_columns(by_column, expected, row_map)


@pytest.mark.parametrize("tile", fp8.COLUMNS_TILES[1:], ids=str)
def test_every_tile_by_columns_gives_the_same(tile: tuple[int, int, int], device: torch.device) -> None:
    shape = MoEShape("", 40, 272, 1, 3, 2, "skewed")
    routing = route(shape, device)
    row_map = row_map_reference(routing.indices_TK, routing.counts_E)
    x_TD = wide_range((shape.tokens, shape.hidden), torch.bfloat16, device)
    found = fp8.quantize_columns_triton(x_TD, row_map, True, tile)
    expected = fp8.quantize_columns_reference(x_TD, row_map, True)
    same_by_columns(found, expected, row_map)


@pytest.mark.parametrize("tile", fp8.BOTH_TILES[1:], ids=str)
def test_every_tile_of_both_gives_the_same(tile: tuple[int, int, int, int], device: torch.device) -> None:
    shape = MoEShape("", 40, 1, 1, 3, 2, "skewed")
    routing = route(shape, device)
    row_map = row_map_reference(routing.indices_TK, routing.counts_E)
    x_RD = wide_range((row_map.rows, 144), torch.bfloat16, device)
    by_row, by_column = fp8.quantize_both_triton(x_RD, row_map, tile)
    expected_row, expected = fp8.quantize_rows_reference(x_RD), fp8.quantize_columns_reference(x_RD, row_map, False)
    real = row_map.pair_R >= 0
    assert torch.equal(by_row.values.view(torch.uint8)[real], expected_row.values.view(torch.uint8)[real])
    assert torch.equal(by_row.scales[:, real], expected_row.scales[:, real])
    same_by_columns(by_column, expected, row_map)


def test_bad_values_by_columns(device: torch.device) -> None:
    x_RN = normal((150, 64), torch.bfloat16).to(device)
    x_RN[3, 5], x_RN[140, 7] = float("nan"), float("-inf")
    row_map = dense_map(150, device)
    x_RN = torch.cat([x_RN, x_RN.new_zeros(row_map.rows - 150, 64)])
    found = fp8.quantize_columns_triton(x_RN, row_map, False)
    assert (found.scales.isinf().nonzero() == torch.tensor([[0, 5], [1, 7]], device=device)).all()
    assert torch.equal(found.scales[:2], fp8.quantize_columns_reference(x_RN, row_map, False).scales[:2])


@pytest.mark.parametrize("shape", [(1, 128, 128), (3, 160, 200), (2, 64, 384)])
def test_blocks_and_their_transpose(shape: tuple[int, int, int], device: torch.device) -> None:
    w_EMN = wide_range(shape, torch.float32, device)
    found, expected = fp8.quantize_blocks_triton(w_EMN), fp8.quantize_blocks_reference(w_EMN)
    same(found, expected)
    turned = fp8.transpose_blocks_triton(found)
    same(turned, fp8.transpose_blocks_reference(expected))
    same(turned, fp8.quantize_blocks_reference(w_EMN.mT.contiguous()))  # blocks are square: nothing is rounded again
    wide_EMN = fp8.dequantize_blocks(expected)
    for matrix, row, column in ((0, 0, 0), (-1, -1, -1), (0, shape[1] // 2, shape[2] // 2)):
        scale = expected.scales[matrix, row % shape[1] // 128, column % shape[2] // 128]
        assert wide_EMN[matrix, row, column] == expected.values[matrix, row, column].float() * scale


def test_the_definition_is_a_loop_over_tiles() -> None:
    x_MN = wide_range((6, 300), torch.float32, torch.device("cpu"))
    values, scales = fp8.quantize_rows_reference(x_MN)
    for row in range(6):
        for tile in range(3):
            part = x_MN[row, tile * 128 : (tile + 1) * 128]
            assert scales[tile, row] == part.abs().max() / 448
            stored = (part * (torch.tensor(448.0) / part.abs().max())).to(STORED)
            assert torch.equal(values[row, tile * 128 : (tile + 1) * 128].float(), stored.float())
    # Within half a step of the grid, or half the spacing below 2^-6 of a tile's unit.
    error = (fp8.dequantize_rows(fp8.Quantized(values, scales)) - x_MN).abs()
    unit = scales.T.repeat_interleave(128, 1)[:, :300]
    assert (error <= torch.maximum(x_MN.abs() * 2**-4, unit * 2**-10) * 1.0001).all()


def test_bad_values_stay_visible(device: torch.device) -> None:
    x_MN = normal((32, 256), torch.float32, device)
    x_MN[3, 5], x_MN[7, 130] = float("nan"), float("inf")
    for quantize in (fp8.quantize_rows_triton, fp8.quantize_rows_reference):
        wide = fp8.dequantize_rows(quantize(x_MN))
        assert not wide[3, :128].isfinite().all()
        assert not wide[7, 128:].isfinite().all()
        assert wide[3, 128:].isfinite().all()
