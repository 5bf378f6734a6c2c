"""Products of rows grouped by expert: kernels and torch's own against the definition, the definition against a loop.

bfloat16 results may differ by one rounding of 2^-8 where float32 sums of another order fall on the two sides of a
boundary; float32 ones by the rounding of the sums alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ling_flow.kernels import grouped_gemm
from ling_flow.kernels.experts import routed_experts
from ling_flow.kernels.experts_triton import routed_experts_triton
from ling_flow.kernels.grouped_gemm import Backend, grouped_dgrad, grouped_forward, grouped_wgrad
from ling_flow.kernels.row_map import RowMap, dense_map, row_map_reference
from ling_flow.kernels.shapes import PUBLISHED, SMALL, MoEShape, normal, route
from tests.kernels.aot_cases import SHARED_LIMIT, meta_map

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-4}}.get(
        dtype, {"rtol": 2**-10, "atol": 1e-4}
    )


def mapped(shape: MoEShape, device: torch.device) -> RowMap:
    routing = route(shape, device)
    return row_map_reference(routing.indices_TK, routing.counts_E)


def spoiled(x_RC: Tensor, row_map: RowMap) -> Tensor:
    """NaN in the rows of padding, which must not be read as values."""
    return x_RC.masked_fill((row_map.pair_R < 0).unsqueeze(1), float("nan"))


def operands(
    shape: MoEShape, dtype: torch.dtype, device: torch.device
) -> tuple[RowMap, Tensor, Tensor, Tensor, Tensor]:
    """The map, tokens (T, B), rows (R, B), gradients (R, A), weights (E, A, B)."""
    row_map = mapped(shape, device)
    outputs, inputs = 2 * shape.width, shape.hidden
    scale = inputs**-0.5
    return (
        row_map,
        normal((shape.tokens, inputs), dtype, device),
        spoiled(normal((row_map.rows, inputs), dtype, device, seed=1), row_map),
        spoiled(normal((row_map.rows, outputs), dtype, device, seed=2), row_map),
        (normal((shape.experts, outputs, inputs), torch.float32, device, seed=3) * scale).to(dtype),
    )


def check(shape: MoEShape, dtype: torch.dtype, device: torch.device, backend: Backend) -> None:
    row_map, x_TB, x_RB, grad_RA, w_EAB = operands(shape, dtype, device)
    real, close = row_map.pair_R >= 0, tolerance(dtype)
    for x, gather in ((x_TB, True), (x_RB, False)):
        found = grouped_forward(x, w_EAB, row_map, gather, backend)
        expected = grouped_gemm.grouped_forward_reference(x, w_EAB, row_map, gather)
        assert found.dtype == dtype
        torch.testing.assert_close(found[real], expected[real], **close)
    found = grouped_dgrad(grad_RA, w_EAB, row_map, False, backend)
    expected = grouped_gemm.grouped_dgrad_reference(grad_RA, w_EAB, row_map, False)
    torch.testing.assert_close(found[real], expected[real], **close)
    for x, gather in ((x_TB, True), (x_RB, False)):
        found = grouped_wgrad(grad_RA, x, row_map, False, gather, backend=backend)
        expected = grouped_gemm.grouped_wgrad_reference(grad_RA, x, row_map, False, gather)
        torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_kernels_equal_the_definition_in_bfloat16(shape: MoEShape, device: torch.device) -> None:
    check(shape, torch.bfloat16, device, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SMALL[1:6:4], ids=lambda shape: shape.name)
def test_kernels_equal_the_definition(shape: MoEShape, dtype: torch.dtype, device: torch.device) -> None:
    check(shape, dtype, device, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_torchs_own_equals_the_definition(shape: MoEShape, dtype: torch.dtype, device: torch.device) -> None:
    check(shape, dtype, device, "torch")


def test_gradients_by_token_are_looked_up(device: torch.device) -> None:
    shape = SMALL[1]
    row_map, x_TB, x_RB, _, w_EAB = operands(shape, torch.float32, device)
    grad_TA = normal((shape.tokens, 2 * shape.width), torch.float32, device, seed=4)
    real = row_map.pair_R >= 0
    found = grouped_dgrad(grad_TA, w_EAB, row_map, True, "triton")
    expected = grouped_gemm.grouped_dgrad_reference(grad_TA, w_EAB, row_map, True)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
    for x, gather_x in ((x_TB, True), (x_RB, False)):
        found = grouped_wgrad(grad_TA, x, row_map, True, gather_x, backend="triton")
        expected = grouped_gemm.grouped_wgrad_reference(grad_TA, x, row_map, True, gather_x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_a_gradient_of_weights_is_written_or_added_in_float32(backend: Backend, device: torch.device) -> None:
    row_map, x_TB, _, grad_RA, w_EAB = operands(SMALL[2], torch.bfloat16, device)  # every other expert is empty
    exact = grouped_gemm.grouped_wgrad_reference(
        grad_RA.float(), x_TB.float(), row_map, False, True
    )  # from values that bfloat16 holds
    out = torch.full(w_EAB.shape, float("nan"), dtype=torch.float32, device=device)
    close = {"rtol": 1e-5, "atol": 1e-5} if backend != "torch" else {"rtol": 2**-7, "atol": 1e-3}
    assert grouped_wgrad(grad_RA, x_TB, row_map, False, True, out, backend=backend) is out
    torch.testing.assert_close(out, exact, **close)
    grouped_wgrad(grad_RA, x_TB, row_map, False, True, out, add=True, backend=backend)
    torch.testing.assert_close(out, 2 * exact, **close)
    with pytest.raises(ValueError, match="out="):
        grouped_wgrad(grad_RA, x_TB, row_map, False, True, add=True, backend=backend)


def test_a_dense_product_is_one_group(device: torch.device) -> None:
    row_map = dense_map(150, device)
    x_TB, w_AB = normal((150, 96), torch.float32, device), normal((72, 96), torch.float32, device, seed=1)
    found = grouped_forward(x_TB, w_AB[None], row_map, False, "triton")
    torch.testing.assert_close(found[:150], x_TB @ w_AB.T, rtol=1e-5, atol=1e-4)


def test_every_cut_gives_the_same(device: torch.device) -> None:
    row_map, x_TB, _, grad_RA, w_EAB = operands(SMALL[5], torch.bfloat16, device)
    real, close = row_map.pair_R >= 0, tolerance(torch.bfloat16)
    expected = grouped_gemm.grouped_forward_reference(x_TB, w_EAB, row_map, True)
    for tiles in grouped_gemm.ROWS_TILES[2]:
        found = grouped_gemm.grouped_forward_triton(x_TB, w_EAB, row_map, True, tiles)
        torch.testing.assert_close(found[real], expected[real], **close)
    expected = grouped_gemm.grouped_wgrad_reference(grad_RA, x_TB, row_map, False, True)
    tables = (grouped_gemm.WEIGHTS_TILES, grouped_gemm.PLAIN_WEIGHTS_TILES, grouped_gemm.FEW_ROWS_TILES)
    for tiles in itertools.chain(*(table[2] for table in (*tables, grouped_gemm.ADDED_TILES))):
        found = grouped_gemm.grouped_wgrad_triton(grad_RA, x_TB, row_map, False, True, tiles=tiles)
        torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shape", PUBLISHED, ids=lambda shape: shape.name)
def test_stages_without_a_look_up_fit_into_shared_memory(
    shape: MoEShape, add: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: dict[str, int] = {}

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **options: launched.update(options)

    monkeypatch.setattr(grouped_gemm, "_weights_kernel", Kernel())
    row_map = meta_map(shape)
    grad_RA, x_RB = (normal((row_map.rows, side), torch.bfloat16, "meta") for side in (2 * shape.width, shape.hidden))
    out = normal((shape.experts, 2 * shape.width, shape.hidden), torch.float32, "meta") if add else None
    grouped_gemm.grouped_wgrad_triton(grad_RA, x_RB, row_map, False, False, out, add)
    stage = (launched["BLOCK_A"] + launched["BLOCK_B"]) * launched["BLOCK_R"] * 2
    assert stage * launched["num_stages"] <= SHARED_LIMIT


def test_the_definition_is_a_loop_over_rows() -> None:
    row_map, x_TB, _, grad_RA, w_EAB = operands(SMALL[5], torch.float64, torch.device("cpu"))
    wgrad = torch.zeros_like(w_EAB)
    forward = grouped_forward(x_TB, w_EAB, row_map, True)
    dgrad = grouped_dgrad(grad_RA, w_EAB, row_map, False)
    starts = row_map.starts_E.tolist()
    for row, pair in enumerate(row_map.pair_R.tolist()):
        if pair >= 0:
            expert = max(e for e, start in enumerate(starts) if start <= row and row_map.counts_E[e])
            x_B = x_TB[pair // row_map.top_k]
            torch.testing.assert_close(forward[row], w_EAB[expert] @ x_B)
            torch.testing.assert_close(dgrad[row], w_EAB[expert].T @ grad_RA[row])
            wgrad[expert] += torch.outer(grad_RA[row], x_B)
    torch.testing.assert_close(grouped_wgrad(grad_RA, x_TB, row_map, False, True), wgrad)


# Together: the routed experts


def loss_and_gradients(function, shape: MoEShape, dtype: torch.dtype, device: torch.device, *more: object):  # type: ignore[no-untyped-def]
    routing = route(shape, device)
    leaves = [  # drawn on the CPU: every device has random numbers of its own
        normal((shape.tokens, shape.hidden), dtype).to(device),
        routing.weights_TK.clone(),
        normal((shape.experts, 2 * shape.width, shape.hidden), dtype, seed=1).to(device) * shape.hidden**-0.5,
        normal((shape.experts, shape.hidden, shape.width), dtype, seed=2).to(device) * shape.width**-0.5,
    ]
    x_TD, weights_TK, gate_up, down = (leaf.requires_grad_() for leaf in leaves)
    out_TD = function(x_TD, routing.indices_TK, weights_TK, routing.counts_E, gate_up, down, *more)
    upstream = normal(tuple(out_TD.shape), dtype, seed=3).to(device)
    return (out_TD, *torch.autograd.grad(out_TD, leaves, upstream))


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_routed_experts_equal_those_of_a_cpu(shape: MoEShape, device: torch.device) -> None:
    found = loss_and_gradients(routed_experts_triton, shape, torch.float32, device, "triton")
    expected = loss_and_gradients(routed_experts, shape, torch.float32, torch.device("cpu"))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-4)


def test_routed_experts_in_bfloat16_are_as_near_float64_as_those_of_a_cpu(device: torch.device) -> None:
    shape = SMALL[1]
    found = loss_and_gradients(routed_experts_triton, shape, torch.bfloat16, device, "triton")
    cpu = torch.device("cpu")
    expected = loss_and_gradients(routed_experts, shape, torch.bfloat16, cpu)
    exact = loss_and_gradients(_in_float64, shape, torch.bfloat16, cpu)
    for mine, theirs, true in zip(found, expected, exact, strict=True):
        true = true.double()
        error = (mine.cpu().double() - true).norm() / true.norm()
        assert error <= 1.2 * (theirs.double() - true).norm() / true.norm()
        assert error < 0.01


def _in_float64(x, indices, weights, counts, gate_up, down):  # type: ignore[no-untyped-def]
    return routed_experts(x.double(), indices, weights.double(), counts, gate_up.double(), down.double())
