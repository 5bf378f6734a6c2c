"""Query-key norm, rotation, split and transpose in one: kernels against float64, the definition against a loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ling_flow.kernels import qk_norm_rope as module
from ling_flow.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference, qk_norm_rope_triton
from ling_flow.kernels.rotary import rotary_frequencies, rotary_tables
from ling_flow.kernels.shapes import normal

EPS = 1e-6
# batch, positions, query heads, key-value heads, head width, rotated elements
SHAPES = [
    (2, 37, 4, 2, 64, 32),
    (1, 16, 8, 4, 128, 64),
    (3, 5, 2, 1, 48, 24),
    (1, 20, 3, 3, 32, 32),
    (2, 1, 6, 2, 16, 8),
]
Shape = tuple[int, int, int, int, int, int]


def made(
    shape: Shape, dtype: torch.dtype, weight_dtype: torch.dtype, packed: bool, device: torch.device
) -> list[Tensor]:
    batch, length, heads, kv_heads, width, rotated = shape
    positions = torch.arange(length)
    if packed:  # positions of documents, others in each row
        positions = torch.stack([(positions + 3 * row) % 7 for row in range(batch)])
    tables = rotary_tables(positions, rotary_frequencies(rotated, 100.0), 1.1)
    return [
        normal((batch, length, (heads + 2 * kv_heads) * width), dtype, device) * 3,
        normal((width,), weight_dtype, device, 1),
        normal((width,), weight_dtype, device, 2),
        *(table.unsqueeze(-2).to(device) for table in tables),
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients(shape: Shape, dtype: torch.dtype, packed: bool, device: torch.device) -> None:
    heads, kv_heads = shape[2:4]
    for weight_dtype in {torch.float32, dtype}:
        inputs = made(shape, dtype, weight_dtype, packed, device)
        leaves = [part.requires_grad_() for part in inputs[:3]]
        exact_leaves = [part.detach().double().requires_grad_() for part in leaves]
        found = qk_norm_rope_triton(*inputs, heads, kv_heads, EPS, positions_first=packed)
        exact = qk_norm_rope_reference(*exact_leaves, *(table.double() for table in inputs[3:]), heads, kv_heads, EPS)
        # Rounded once from float32: half a step of bfloat16.
        rounding, floor = (2**-8, 1e-5) if dtype == torch.bfloat16 else (1e-5, 1e-5)
        for mine, theirs in zip(found, exact, strict=True):
            assert mine.transpose(1, 2).is_contiguous() if packed else mine.is_contiguous()
            torch.testing.assert_close(mine.double(), theirs, rtol=rounding, atol=floor)
        # Gradients in any layout, as attention gives them.
        upstream = [normal(part.shape, dtype, device, 3 + index) for index, part in enumerate(found)]
        upstream[0] = upstream[0].transpose(1, 2).contiguous().transpose(1, 2)
        upstream[1] = upstream[1].mT.contiguous().mT
        mine = torch.autograd.grad(found, leaves, upstream)
        theirs = torch.autograd.grad(exact, exact_leaves, [part.double() for part in upstream])
        for given, expected, leaf in zip(mine, theirs, leaves, strict=True):
            assert given.dtype == leaf.dtype
            tolerance = 2**-8 if given.dtype == torch.bfloat16 else 1e-5
            largest = float(expected.abs().max())
            torch.testing.assert_close(given.double(), expected, rtol=tolerance, atol=largest * 1e-5)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_kernel_is_within_the_roundings_of_the_definition(shape: Shape, device: torch.device) -> None:
    inputs = made(shape, torch.bfloat16, torch.bfloat16, False, device)
    found = qk_norm_rope_triton(*inputs, *shape[2:4], EPS)
    for mine, theirs in zip(found, qk_norm_rope_reference(*inputs, *shape[2:4], EPS), strict=True):
        error = (mine.double() - theirs.double()).norm() / mine.double().norm()
        assert error < 2**-7  # norm, weight, cosine and turn are rounded one by one there


def test_programs_over_many_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs for a long sequence: each walks over several tiles, the last ones ragged or beyond the end."""
    shape = (2, 75, 4, 2, 32, 16)
    inputs = made(shape, torch.float32, torch.float32, False, device)
    leaves = [part.requires_grad_() for part in inputs[:3]]
    out = qk_norm_rope_triton(*inputs, *shape[2:4], EPS)
    upstream = [normal(part.shape, torch.float32, device, 3 + index) for index, part in enumerate(out)]
    expected = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    monkeypatch.setattr(module, "PROGRAMS", 14)
    monkeypatch.setattr(module, "BACKWARD_TILES", ((4, 1, 1, 2),))
    for mine, theirs in zip(torch.autograd.grad(out, leaves, upstream), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def test_no_positions(device: torch.device) -> None:
    inputs = made((2, 0, 4, 2, 64, 32), torch.bfloat16, torch.float32, False, device)
    inputs[1].requires_grad_()
    query, key, value = qk_norm_rope_triton(*inputs, 4, 2, EPS)
    assert query.shape == (2, 4, 0, 64)
    assert key.shape == value.shape == (2, 2, 0, 64)
    assert torch.autograd.grad(query.sum(), inputs[1])[0].eq(0).all()


def test_the_definition_is_a_loop_over_heads() -> None:
    batch, length, heads, kv_heads, width, rotated = shape = (2, 3, 2, 1, 8, 4)
    inputs = made(shape, torch.float32, torch.float32, True, torch.device("cpu"))
    qkv, weights, cos, sin = inputs[0].view(batch, length, 4, width), inputs[1:3], inputs[3], inputs[4]
    query, key, value = qk_norm_rope(*inputs, heads, kv_heads, EPS)
    for b in range(batch):
        for s in range(length):
            for head in range(3):
                x = qkv[b, s, head].tolist()
                scale = 1 / math.sqrt(sum(element**2 for element in x) / width + EPS)
                normed = [scale * a * float(w) for a, w in zip(x, weights[head // heads], strict=True)]
                turned = list(normed)
                for i in range(rotated // 2):
                    c, d = float(cos[b, s, 0, i]), float(sin[b, s, 0, i])
                    turned[i] = normed[i] * c - normed[i + 2] * d
                    turned[i + 2] = normed[i + 2] * c + normed[i] * d
                found = query[b, head, s] if head < heads else key[b, 0, s]
                torch.testing.assert_close(found, torch.tensor(turned), rtol=1e-5, atol=1e-5)
            assert torch.equal(value[b, 0, s], qkv[b, s, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float64_on_a_gpu_is_left_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qk_norm_rope_triton", "qk_norm_rope_reference"):
        monkeypatch.setattr(module, name, lambda *args, name=name: name)
    with FakeTensorMode():  # of a GPU that is not there
        part = torch.empty(8, dtype=dtype, device="cuda")
    took = qk_norm_rope(part, part, part, part, part, 2, 1, EPS)
    assert took == ("qk_norm_rope_reference" if dtype == torch.float64 else "qk_norm_rope_triton")
