"""AdamW with 8-bit moments: kernel against definition to the bit, the codes by themselves, and the way it trains."""

from __future__ import annotations

import pytest
import torch

from ling_flow.kernels import adamw8
from ling_flow.kernels.adamw8 import BLOCK, Moments, Rates, new_moments
from ling_flow.kernels.shapes import normal

RATES = Rates(step=1, learning_rate=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 256), (7, 100), (1,), (0,), (11, 256)])
def test_the_kernel_is_the_definition(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    parameter = normal(shape, torch.float32, device, seed=9)
    expected, moments = parameter.clone(), new_moments(parameter)
    moments_expected = new_moments(parameter)
    copy = torch.empty(shape, dtype=torch.bfloat16, device=device)
    copy_expected = copy.clone()
    for step in range(1, 4):
        spread = (normal(shape, torch.float32, device, seed=step + 10) * 4).exp().to(dtype)  # ten orders of magnitude
        grad = normal(shape, dtype, device, seed=step) * spread * (step != 2)
        rates = RATES._replace(step=step)
        adamw8.adamw8_triton_(parameter, grad, moments, rates, copy)
        adamw8.adamw8_reference_(expected, grad, moments_expected, rates, copy_expected)
    if device.type == "cpu":
        torch.testing.assert_close(parameter, expected, rtol=0, atol=0)
        assert torch.equal(copy, copy_expected)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(moments, moments_expected, strict=True))
    else:  # a GPU fuses products and sums: the last bit, and so the rounding of a few codes
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
        for mine, theirs in zip(moments, moments_expected, strict=True):
            close = torch.isclose(mine.float(), theirs.float(), rtol=1e-5, atol=1.0)
            assert close.all()


def test_a_step_from_nothing_is_that_of_adamw() -> None:
    parameter = normal((5, 300), torch.float32)
    theirs = parameter.clone().requires_grad_()
    theirs.grad = normal((5, 300), torch.float32, seed=1)
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer.step()
    moments = new_moments(parameter)
    adamw8.adamw8_reference_(parameter, theirs.grad, moments, RATES)
    torch.testing.assert_close(parameter, theirs.detach())
    state = optimizer.state[theirs]
    average = adamw8.exp_avg(moments).flatten()[:1500].view(5, 300)
    root = adamw8.exp_avg_sq_root(moments).flatten()[:1500].view(5, 300)
    torch.testing.assert_close(average, state["exp_avg"], rtol=2**-3, atol=float(average.abs().max()) * 2**-15)
    torch.testing.assert_close(root, state["exp_avg_sq"].sqrt(), rtol=2**-4, atol=float(root.max()) * 2**-15)


@pytest.mark.parametrize(("fraction", "bits"), [(3, 7), (4, 8)])
def test_codes_are_the_grid_and_rounding_is_right_on_average(fraction: int, bits: int) -> None:
    codes = torch.arange(1, 1 << bits, dtype=torch.int32)
    values = adamw8._decode(codes, fraction, bits)
    assert values[-1] == 1.0
    assert (values.diff() > 0).all()
    assert (values.diff() / values[:-1]).max() <= 2**-fraction
    # What lies on the grid stays, whatever the noise.
    row = torch.zeros(1, BLOCK)
    row[0, : len(values)] = values[-BLOCK:]
    for noise in (0, (1 << 23 - fraction) - 1):
        found, scale = adamw8._encode(row, torch.full_like(row, noise, dtype=torch.int64), fraction)
        assert scale.item() == 1.0
        assert torch.equal(found[0, : len(values)].int(), codes)
    # Between two neighbours, as often up as it is near.
    row = torch.full((1, BLOCK * 256), 1.1)
    row[0, 0] = 2.0
    noise = adamw8._noise(row, seed=12345) >> 9 + fraction
    mean = 2 * adamw8._decode(adamw8._encode(row, noise, fraction)[0].int(), fraction, bits)[0, 1:].double().mean()
    assert mean.item() == pytest.approx(1.1, rel=1e-3)


def test_moments_of_zero_stay_zero_and_lost_roots_divide_nothing() -> None:
    parameter = normal((1, 512), torch.float32)
    before, moments = parameter.clone(), new_moments(parameter)
    grad = torch.zeros(1, 512)
    grad[0, :2] = torch.tensor([1.0, 1e-9])  # the second is below what its block can hold
    for step in range(1, 6):
        adamw8.adamw8_reference_(parameter, grad, moments, RATES._replace(step=step, weight_decay=0.0))
    change = (parameter - before).abs()
    assert change[0, 2:].max() == 0
    assert change.max() <= 5 * RATES.learning_rate * 1.2
    assert moments.exp_avg_scale[1] == 0


def test_a_second_moment_does_not_stick_to_the_grid() -> None:
    """Each step shrinks it by 0.05%, a hundredth of the grid's spacing, while another element holds the scale."""
    rates, steps = RATES._replace(betas=(0.9, 0.999)), 300
    parameter, grad = torch.zeros(1, BLOCK), normal((1, BLOCK), torch.float32).clamp(-0.9, 0.9)
    moments, exact = new_moments(parameter), torch.zeros(1, BLOCK)
    for step in range(1, steps + 1):
        grad = grad * (step == 1)
        grad[0, 0] = 1.0
        exact = 0.999 * exact + 0.001 * grad.square()
        adamw8.adamw8_reference_(parameter, grad, moments, rates._replace(step=step))
    there = exact[0] > 1e-6
    assert there.sum() > 200
    found = adamw8.exp_avg_sq_root(moments)[0, there] / exact[0, there].sqrt()
    assert found.mean().item() == pytest.approx(1, abs=0.02)


def regression(step_of: str, beta2: float, steps: int = 300) -> float:
    """Mean loss of the last 30 steps of a small network that learns a random one, from inputs of very unlike sizes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    teacher, weights = (random(256, 64, scale=0.3), random(64, 256, scale=0.1)), (random(256, 64, scale=0.1),)
    weights = (*weights, random(64, 256, scale=0.1))
    sizes, losses = torch.logspace(-2, 1, 64), []
    parameters = [weight.requires_grad_() for weight in weights]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, beta2), weight_decay=0.1)
    moments = [new_moments(weight) for weight in parameters]
    for step in range(1, steps + 1):
        x = random(64, 64) * sizes
        found, wanted = (torch.tanh(x @ first.T) @ second.T for first, second in (parameters, teacher))
        loss = (found - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step_of == "float32":
            optimizer.step()
        else:
            for weight, moment in zip(parameters, moments, strict=True):
                assert weight.grad is not None
                rates = Rates(step, 3e-3, (0.9, beta2), 1e-8, 0.1)
                adamw8.adamw8_(weight, weight.grad, moment, rates)
    return sum(losses[-30:]) / 30


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_training_follows_float32_moments(beta2: float) -> None:
    assert regression("8 bits", beta2) == pytest.approx(regression("float32", beta2), rel=3e-3)


def test_moments_are_a_quarter_of_float32() -> None:
    moments: Moments = new_moments(torch.empty(512, 512))
    assert sum(part.nbytes for part in moments) == 2 * 512 * 512 * (1 + 4 / BLOCK)
