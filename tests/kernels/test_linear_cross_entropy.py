from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ling_flow.kernels import linear_cross_entropy as module
from ling_flow.kernels.linear_cross_entropy import linear_cross_entropy, linear_logprobs
from ling_flow.kernels.shapes import normal

TOKENS, HIDDEN, VOCABULARY = 11, 6, 13


@pytest.fixture(autouse=True)
def ragged_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", 4 * VOCABULARY)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()
    head = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()
    return hidden, head, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def check(ours: torch.Tensor, expected: torch.Tensor, leaves: tuple[torch.Tensor, ...], upstream: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_cross_entropy_and_gradients(inputs: tuple[torch.Tensor, ...]) -> None:
    hidden, head, targets = inputs
    expected = functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
    check(linear_cross_entropy(hidden, head, targets), expected, (hidden, head), torch.tensor(0.3, dtype=torch.float64))
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, head, targets), expected.detach())


def test_a_factor_keeps_its_digits_in_bfloat16() -> None:
    hidden = normal((256, 32), torch.bfloat16).requires_grad_()
    loss = linear_cross_entropy(hidden, normal((64, 32), torch.bfloat16), torch.zeros(256, dtype=torch.long))
    (whole,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (part,) = torch.autograd.grad(loss / 700, hidden)
    expected = whole.float() / 700  # 1/700 in bfloat16 is 0.15 % off
    assert float(part.float().norm() / expected.norm()) == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_loss_alone_takes_one_product_a_chunk_and_has_the_same_bits(
    mode: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head = (normal(shape, torch.float32).requires_grad_() for shape in [(8, HIDDEN), (VOCABULARY, HIDDEN)])
    targets = torch.zeros(8, dtype=torch.long)
    expected = linear_cross_entropy(hidden, head, targets, 1e-2)
    products: list[None] = []
    matmul = module.matmul
    monkeypatch.setattr(module, "matmul", lambda a, b: (products.append(None), matmul(a, b))[1])
    with mode():
        found = linear_cross_entropy(hidden, head, targets, 1e-2)
    assert torch.equal(found, expected)
    assert len(products) == 2  # chunks; with gradients there would be three in each


def test_a_gradient_is_scaled_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    saved, factor = normal((300, 7), torch.bfloat16), torch.tensor(1 / 700)
    expected = (saved.float() * factor).bfloat16()
    monkeypatch.setattr(module, "SCALED_ELEMENTS", 64)
    wide: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                wide.append(out.numel())
            return out

    with Watch():
        found = module._scaled(saved, factor)
    assert torch.equal(found, expected)
    assert max(wide) <= 64


def test_float64_on_a_gpu_is_left_to_torch() -> None:
    with FakeTensorMode():  # of a GPU that is not there
        hidden = torch.empty(5, 4, device="cuda")
        assert module._in_kernel(hidden) and not module._in_kernel(hidden.double())


def test_logprobs_and_gradients(inputs: tuple[torch.Tensor, ...]) -> None:
    hidden, head, targets = inputs
    expected = torch.log_softmax(hidden @ head.T, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    upstream = torch.randn(TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check(linear_logprobs(hidden, head, targets), expected, (hidden, head), upstream)


def test_an_impossible_target_costs_its_logit_and_not_infinity() -> None:
    hidden, head = torch.tensor([[200.0]]).requires_grad_(), torch.tensor([[1.0], [-1.0]])
    assert linear_cross_entropy(hidden, head, torch.tensor([1])).item() == pytest.approx(400.0)


@pytest.mark.parametrize("z", [1e-2, 1.0])
def test_z_loss_and_gradients(inputs: tuple[torch.Tensor, ...], z: float) -> None:
    hidden, head, targets = inputs
    logits = hidden @ head.T
    expected = functional.cross_entropy(logits, targets, reduction="sum") + z * logits.logsumexp(-1).square().sum()
    upstream = torch.tensor(0.3, dtype=torch.float64)
    check(linear_cross_entropy(hidden, head, targets, z), expected, (hidden, head), upstream)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, head, targets, z), expected.detach())


# The kernel that turns a chunk of logits into its gradient


@pytest.mark.parametrize("z", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 13), (3, 1000), (4, 33000), (1, 1), (0, 100)])
def test_the_kernel_is_the_definition(
    shape: tuple[int, int], dtype: torch.dtype, z: float, device: torch.device
) -> None:
    logits = normal(shape, dtype, device) * 5
    targets = torch.randint(shape[1], shape[:1], generator=torch.Generator().manual_seed(0)).to(device)
    scale = normal(shape[:1], torch.float32, device, seed=1)
    logprobs, lse, grad = module.cross_entropy_reference(logits.double(), targets, z)
    found = logits.clone()
    # Float32 sums of up to 33 000 terms.
    for mine, theirs in zip(module.cross_entropy_triton_(found, targets, z), (logprobs, lse), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-5)
    assert torch.equal(found, logits)
    for mine, theirs in zip(module.cross_entropy_triton_(found, targets, z, True), (logprobs, lse), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-5)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5  # once, to nearest
    torch.testing.assert_close(found.double(), grad, rtol=rounding, atol=1e-6)

    found = logits.clone()
    module.cross_entropy_gradient_triton_(found, targets, lse.float(), scale)
    grad = module.cross_entropy_reference(logits.double(), targets, 0.0, scale.double())[2]
    torch.testing.assert_close(found.double(), grad, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("columns", [256, 301, 1030])
@pytest.mark.parametrize("tile", [(64, 1, 2, 3), (256, 1, 1, 1), (128, 1, 3, 0)], ids=str)
def test_blocks_kept_in_registers(
    tile: tuple[int, int, int, int], columns: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest logit and the target each in turn in a kept block, in one read again, and in the last part."""
    monkeypatch.setattr(module, "GRADIENT_TILES", (tile,))
    logits = normal((3, columns), torch.bfloat16, device) * 5
    targets = torch.tensor([7, columns // 2, columns - 1], device=device)
    for row, largest in enumerate([columns - 2, 3, columns // 2 + 1]):
        logits[row, largest] = 60.0
    logprobs, lse, grad = module.cross_entropy_reference(logits.double(), targets, 1e-2)
    found = module.cross_entropy_triton_(logits, targets, 1e-2, gradient=True)
    for mine, theirs in zip(found, (logprobs, lse), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits.double(), grad, rtol=2**-8, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_the_kernel_keeps_large_logits_and_shows_bad_ones(device: torch.device) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, float("nan"), 1.0], [float("inf"), 0.0, 0.0]], device=device)
    targets = torch.tensor([1, 0, 1], device=device)
    logprobs, _ = module.cross_entropy_triton_(logits, targets, gradient=True)
    assert logprobs[0].item() == -2e4
    assert logits[0].tolist() == [1.0, -1.0, 0.0]
    assert not logprobs[1:].isfinite().any()
    assert logits[1:].isnan().any(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_on_a_gpu(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the CPU has it from the same numbers; on a CPU this is that path against itself in float64."""
    monkeypatch.setitem(module.CHUNK_ELEMENTS, device.type, 40 * 512)
    leaves = [normal(shape, dtype, device, seed).requires_grad_() for seed, shape in enumerate([(100, 64), (512, 64)])]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    targets = torch.randint(512, (100,), generator=torch.Generator().manual_seed(0)).to(device)
    upstream = normal((100,), torch.float32, device)
    logits = exact[0] @ exact[1].T
    expected = functional.cross_entropy(logits, targets, reduction="sum") + 1e-3 * logits.logsumexp(-1).square().sum()
    logprobs = torch.log_softmax(logits, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4  # logits and gradients of bfloat16
    for found, theirs, grad in (
        (linear_cross_entropy(*leaves, targets, 1e-3), expected, torch.ones((), device=device)),
        (linear_logprobs(*leaves, targets), logprobs, upstream),
    ):
        assert (found.double() - theirs).norm() <= tolerance * theirs.norm()
        for mine, exactly in zip(
            torch.autograd.grad(found, leaves, grad),
            torch.autograd.grad(theirs, exact, grad.double(), True),
            strict=True,
        ):
            assert (mine.double() - exactly).norm() <= tolerance * exactly.norm()
