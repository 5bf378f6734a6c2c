"""RMSNorm: kernels against the CPU's definition and its gradient in float64; with FP8, against composing the two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ling_flow.kernels import fp8, rms_norm
from ling_flow.kernels.shapes import normal

SIZES = [(5, 2048), (300, 128), (9, 7), (3, 300), (1, 4100), (2, 16384), (70, 16), (0, 128)]
EPS = 1e-6


def exact(x_ND: Tensor, weight_D: Tensor, grad_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in float64, and its gradients."""
    x_ND, weight_D = x_ND.double().requires_grad_(), weight_D.double().requires_grad_()
    y_ND = x_ND / (x_ND.square().mean(-1, keepdim=True) + EPS).sqrt() * weight_D
    return y_ND.detach(), *torch.autograd.grad(y_ND, (x_ND, weight_D), grad_ND.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x_ND, grad_ND = normal(size, dtype, device) * 3, normal(size, dtype, device, seed=1)
    weight_D = normal(size[1:], dtype, device, seed=2)
    found, rstd_N, _ = rms_norm.rms_norm_triton(x_ND, weight_D, EPS, quantize=False)
    # Two roundings to the narrow type, as on a CPU.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    expected, expected_x, expected_weight = exact(x_ND, weight_D, grad_ND)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(found, rms_norm.rms_norm(x_ND.cpu(), weight_D.cpu(), EPS).to(device), rtol=tolerance,
                               atol=1e-6)  # fmt: skip
    found_x, found_weight = rms_norm.rms_norm_backward_triton(grad_ND, x_ND, weight_D, rstd_N)
    torch.testing.assert_close(found_x.double(), expected_x, rtol=tolerance, atol=1e-5)
    torch.testing.assert_close(found_weight.double(), expected_weight, rtol=tolerance, atol=1e-5 * max(size[0], 1))


def test_rounds_where_the_cpu_does(device: torch.device) -> None:
    """The normalised row is narrowed before the weight: with a constant row it is exactly ±1."""
    x_ND = torch.full((2, 256), -300.0, dtype=torch.bfloat16, device=device)
    weight_D = normal((256,), torch.bfloat16, device)
    found, _, _ = rms_norm.rms_norm_triton(x_ND, weight_D, EPS, quantize=False)
    assert torch.equal(found, -weight_D.expand(2, -1))


@pytest.mark.parametrize("size", [(5, 2048), (40, 128), (3, 300), (4, 80), (2, 3, 4100), (0, 128)])
def test_quantised_is_quantising_what_is_normalised(size: tuple[int, ...], device: torch.device) -> None:
    x_ND, weight_D = normal(size, torch.bfloat16, device), normal(size[-1:], torch.bfloat16, device, seed=2)
    y_ND, _, _ = rms_norm.rms_norm_triton(x_ND, weight_D, EPS, quantize=False)
    found, _, quantized = rms_norm.rms_norm_triton(x_ND, weight_D, EPS, quantize=True)
    expected = fp8.quantize_rows_reference(y_ND.view(-1, size[-1]))
    assert torch.equal(found, y_ND)
    assert quantized is not None
    assert torch.equal(quantized.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(quantized.scales, expected.scales)
    nothing, _, alone = rms_norm.rms_norm_triton(x_ND, weight_D, EPS, quantize=True, keep=False)
    assert nothing.numel() == 0
    assert alone is not None
    assert torch.equal(alone.values.view(torch.uint8), quantized.values.view(torch.uint8))
    assert torch.equal(alone.scales, quantized.scales)


def test_spans_of_rows_add_up(device: torch.device) -> None:
    for rows in (1, 7, 100, 129):
        x_ND, grad_ND = normal((rows, 130), torch.float32, device), normal((rows, 130), torch.float32, device, seed=1)
        weight_D = normal((130,), torch.float32, device, seed=2)
        _, rstd_N, _ = rms_norm.rms_norm_triton(x_ND, weight_D, EPS, quantize=False)
        found = rms_norm.rms_norm_backward_triton(grad_ND, x_ND, weight_D, rstd_N, (2048, 16, 2, 3))
        _, *expected = exact(x_ND, weight_D, grad_ND)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("rows", "first"), [(5, 2), (600, 299), (300, 300), (1, 1)])
def test_sum_rows(rows: int, first: int, device: torch.device) -> None:
    x_ND = normal((rows, 40), torch.float32, device)
    for dtype in (torch.float32, torch.bfloat16):
        ours = rms_norm.sum_rows(x_ND, first, dtype)
        tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-6
        for found, part_ND in zip(ours, (x_ND[:first], x_ND[first:]), strict=True):
            assert found.dtype == dtype
            if len(part_ND):
                torch.testing.assert_close(found.double(), part_ND.double().sum(0), rtol=tolerance, atol=1e-4)


def test_the_gradient_passes_through_the_normalised_rows_only(device: torch.device) -> None:
    x_ND = normal((2, 3, 200), torch.float32, device).requires_grad_()
    weight_D = normal((200,), torch.float32, device, seed=2).requires_grad_()
    grad_ND = normal((2, 3, 200), torch.float32, device, seed=1)
    y_ND, quantized = rms_norm.rms_norm_quantize(x_ND, weight_D, EPS)
    assert not quantized.values.requires_grad and not quantized.scales.requires_grad
    assert quantized.values.shape == (6, 200) and quantized.scales.shape == (2, 6)
    y_ND.backward(grad_ND)
    _, expected_x, expected_weight = exact(x_ND.detach(), weight_D.detach(), grad_ND)
    torch.testing.assert_close(x_ND.grad.double(), expected_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight_D.grad.double(), expected_weight, rtol=1e-5, atol=1e-5)
