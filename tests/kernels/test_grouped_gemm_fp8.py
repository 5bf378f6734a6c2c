"""Products of blockwise FP8 matrices: kernels against the definition, the definition against loops in float64.

Results are float32 sums rounded once to bfloat16: where sums of another order fall on the two sides of a boundary they
differ by one rounding of 2^-8. In float32 they differ by the rounding of the sums. On a GPU the 128 products of a
partial sum are added with some 14 bits (what FP8 tensor cores do), so there whole rows are compared.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ling_flow.kernels import fp8, grouped_gemm_fp8
from ling_flow.kernels.fp8 import Quantized
from ling_flow.kernels.row_map import RowMap, dense_map, row_map_reference
from ling_flow.kernels.shapes import SMALL, MoEShape, normal, route

BFLOAT16 = {"rtol": 2**-7, "atol": 1e-4}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-4}
ROW_ERROR = 5e-3  # of a row on a GPU, in the Euclidean norm; a scale at the wrong place gives more than 0.1
# Rows of several tiles, several blocks of columns, more than one step along the sum: what SMALL has one at a time.
LARGER = MoEShape("larger", 150, 272, 256, 3, 2, "skewed")


def assert_close(found: Tensor, expected: Tensor, tolerance: dict[str, float]) -> None:
    if not found.is_cuda:
        torch.testing.assert_close(found, expected, **tolerance)
        return
    found, expected = found.double(), expected.double()
    assert found.isfinite().all()
    assert ((found - expected).norm(dim=-1) <= ROW_ERROR * expected.norm(dim=-1)).all()


def quantized(
    shape: MoEShape, device: torch.device
) -> tuple[RowMap, Quantized, Quantized, Quantized, Quantized, Quantized]:
    """The map; tokens (T, B), rows (R, B), weights (E, A, B); gradients (A, R) and tokens (B, R) by columns.

    Rows and tokens differ in magnitude, so that a scale at the wrong place shows.
    """
    routing = route(shape, device)
    row_map = row_map_reference(routing.indices_TK, routing.counts_E)
    outputs, inputs = 2 * shape.width, shape.hidden

    def uneven(sizes: tuple[int, ...], seed: int) -> Tensor:
        return normal(sizes, torch.float32, device, seed) * normal(sizes, torch.float32, device, seed + 10).exp()

    x_TB, x_RB = uneven((shape.tokens, inputs), 0), uneven((row_map.rows, inputs), 1)
    grad_RA = uneven((row_map.rows, outputs), 2).masked_fill((row_map.pair_R < 0).unsqueeze(1), float("nan"))
    w_EAB = uneven((shape.experts, outputs, inputs), 3) * inputs**-0.5
    return (
        row_map,
        fp8.quantize_rows(x_TB),
        fp8.quantize_rows(x_RB),
        fp8.quantize_blocks(w_EAB),
        fp8.quantize_columns(grad_RA, row_map),
        fp8.quantize_columns(x_TB, row_map, gather=True),
    )


@pytest.mark.parametrize("shape", (*SMALL, LARGER), ids=lambda shape: shape.name)
def test_kernels_equal_the_definition(shape: MoEShape, device: torch.device) -> None:
    row_map, x_TB, x_RB, w_EAB, grad_AR, x_BR = quantized(shape, device)
    real = row_map.pair_R >= 0
    for x, gather in ((x_TB, True), (x_RB, False)):
        found = grouped_gemm_fp8.grouped_forward_fp8_triton(x, w_EAB, row_map, gather)
        expected = grouped_gemm_fp8.grouped_forward_fp8_reference(x, w_EAB, row_map, gather)
        assert found.dtype == torch.bfloat16
        assert_close(found[real], expected[real], BFLOAT16)
    found = grouped_gemm_fp8.grouped_wgrad_fp8_triton(grad_AR, x_BR, row_map, torch.float32)
    expected = grouped_gemm_fp8.grouped_wgrad_fp8_reference(grad_AR, x_BR, row_map, torch.float32)
    assert_close(found, expected, FLOAT32)
    rounded = grouped_gemm_fp8.grouped_wgrad_fp8_triton(grad_AR, x_BR, row_map)
    assert_close(rounded, expected.bfloat16(), BFLOAT16)


@pytest.mark.parametrize("launch", ["definition", "kernel"])
def test_a_gradient_of_weights_is_written_or_added(launch: str, device: torch.device) -> None:
    row_map, _, _, w_EAB, grad_AR, x_BR = quantized(SMALL[2], device)  # every other expert is empty
    exact = torch.bmm(*_by_expert(grad_AR, x_BR, row_map)).float()
    run = {
        "definition": grouped_gemm_fp8.grouped_wgrad_fp8_reference,
        "kernel": grouped_gemm_fp8.grouped_wgrad_fp8_triton,
    }[launch]
    out = torch.full(w_EAB.values.shape, float("nan"), device=device)
    assert run(grad_AR, x_BR, row_map, out=out) is out
    assert_close(out, exact, FLOAT32)
    run(grad_AR, x_BR, row_map, out=out, add=True)
    assert_close(out, 2 * exact, FLOAT32)
    with pytest.raises(ValueError, match="out="):
        grouped_gemm_fp8.grouped_wgrad_fp8(grad_AR, x_BR, row_map, add=True)


def _by_expert(grad_AR: Quantized, x_BR: Quantized, row_map: RowMap) -> tuple[Tensor, Tensor]:
    """float64 (E, A, R) and (E, R, B), zero in the rows of other experts."""
    grad_RA = fp8.dequantize_columns(grad_AR, row_map).double()
    x_RB = fp8.dequantize_columns(x_BR, row_map).double()
    mine_ER = torch.zeros(len(row_map.counts_E), row_map.rows, dtype=torch.float64, device=grad_RA.device)
    for expert, rows in row_map.filled():
        mine_ER[expert, rows] = 1
    return (mine_ER[:, :, None] * grad_RA).mT, mine_ER[:, :, None] * x_RB


@pytest.mark.parametrize("shape", (*SMALL, LARGER), ids=lambda shape: shape.name)
def test_the_definition_multiplies_what_is_stored(shape: MoEShape) -> None:
    row_map, x_TB, x_RB, w_EAB, grad_AR, x_BR = quantized(shape, torch.device("cpu"))
    wide_EAB = fp8.dequantize_blocks(w_EAB).double()
    for x, gather in ((x_TB, True), (x_RB, False)):
        found = grouped_gemm_fp8.grouped_forward_fp8(x, w_EAB, row_map, gather)
        wide = fp8.dequantize_rows(x).double()
        for expert, rows in row_map.filled():
            for row in range(rows.start, rows.stop, 7):
                x_B = wide[row_map.pair_R[row] // row_map.top_k] if gather else wide[row]
                torch.testing.assert_close(found[row].double(), wide_EAB[expert] @ x_B, rtol=2**-8, atol=1e-5)
    found = grouped_gemm_fp8.grouped_wgrad_fp8(grad_AR, x_BR, row_map, torch.float32)
    torch.testing.assert_close(found.double(), torch.bmm(*_by_expert(grad_AR, x_BR, row_map)), **FLOAT32)


def test_the_gradient_of_rows_is_the_product_with_the_transpose(device: torch.device) -> None:
    row_map, _, _, w_EAB, _, _ = quantized(SMALL[1], device)
    grad_RA = fp8.quantize_rows(normal((row_map.rows, w_EAB.values.shape[1]), torch.float32, device))
    found = grouped_gemm_fp8.grouped_dgrad_fp8(grad_RA, w_EAB, row_map)
    wide_RA, wide_EAB = fp8.dequantize_rows(grad_RA), fp8.dequantize_blocks(w_EAB)
    for expert, rows in row_map.filled():
        assert_close(found[rows].float(), wide_RA[rows] @ wide_EAB[expert], BFLOAT16)


def test_a_dense_product_is_one_group(device: torch.device) -> None:
    row_map = dense_map(150, device)
    x_TB = fp8.quantize_rows(normal((150, 96), torch.bfloat16, device))
    w_1AB = fp8.quantize_blocks(normal((1, 72, 96), torch.bfloat16, device, seed=1))
    found = grouped_gemm_fp8.grouped_forward_fp8_triton(x_TB, w_1AB, row_map)
    expected = fp8.dequantize_rows(x_TB) @ fp8.dequantize_blocks(w_1AB)[0].T
    assert_close(found[:150].float(), expected, {"rtol": 2**-7, "atol": 1e-3})


def test_a_bad_value_reaches_its_own_results_and_no_others(device: torch.device) -> None:
    shape = SMALL[0]
    routing = route(shape, device)
    row_map = row_map_reference(routing.indices_TK, routing.counts_E)
    x_TB = normal((shape.tokens, shape.hidden), torch.float32, device)
    x_TB[3, 5] = float("inf")
    w_EAB = fp8.quantize_blocks(normal((shape.experts, 128, shape.hidden), torch.float32, device))
    y_RA = grouped_gemm_fp8.grouped_forward_fp8_triton(fp8.quantize_rows(x_TB), w_EAB, row_map, True)
    y_TKA = y_RA[row_map.place_TK.long()]
    assert not y_TKA[3].isfinite().any()
    assert y_TKA[torch.arange(shape.tokens, device=device) != 3].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_past_two_billion_elements_are_found() -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    rows, depth, columns, times = 2**11, 256, 128, 2**12 + 1
    device = torch.device("cuda")
    few = fp8.quantize_rows(normal((rows, depth), torch.bfloat16, device))
    w_1AB = fp8.quantize_blocks(normal((1, columns, depth), torch.bfloat16, device, seed=1))
    many = Quantized(few.values.view(torch.uint8).repeat(times, 1).view(fp8.STORED), few.scales.repeat(1, times))
    assert many.values.numel() > 2**31  # offsets of 64 bits
    for gather in (False, True):
        expected_RA = grouped_gemm_fp8.grouped_forward_fp8(few, w_1AB, dense_map(rows, device), gather)
        found = grouped_gemm_fp8.grouped_forward_fp8(many, w_1AB, dense_map(rows * times, device), gather)
        for part_RA in found[: rows * times].split(rows):
            assert torch.equal(part_RA, expected_RA[:rows])
