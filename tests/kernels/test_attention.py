import itertools

import pytest
import torch
from torch.nn import functional

from ling_flow.kernels.attention import causal_attention, packed_attention, repeatable


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@torch.library.custom_op("ling_flow_tests::attn", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    """An operation made as `varlen_attn` is."""
    return 2 * x


doubled.register_autograd(
    lambda ctx, grad: 2 * grad * ctx.saved_tensors[0] / ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize("lengths", [[5], [1, 4, 2], [3, 3, 1, 1, 6]])
def test_packed_attention_and_its_gradients_equal_a_mask_over_the_row(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    query, key, value = (
        torch.randn(tokens, heads, 8, dtype=torch.float64, generator=generator).requires_grad_() for heads in (4, 2, 2)
    )
    numbers = torch.tensor(list(itertools.chain(*([i] * length for i, length in enumerate(lengths)))))
    visible = (numbers[:, None] == numbers) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    expected = functional.scaled_dot_product_attention(
        *(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)), attn_mask=visible, enable_gqa=True
    )
    expected = expected.squeeze(0).transpose(0, 1)
    ours = packed_attention(query, key, value, lengths, bounds(lengths))
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    mine = torch.autograd.grad(ours, (query, key, value), upstream)
    theirs = torch.autograd.grad(expected, (query, key, value), upstream)
    for ours_grad, their_grad in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours_grad, their_grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_packed_attention_on_a_gpu_equals_that_on_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [100, 1, 27]
    qkv = [torch.randn(128, heads, 64, dtype=torch.bfloat16, generator=generator) for heads in (4, 2, 2)]
    on_cpu = [x.float().requires_grad_() for x in qkv]
    on_gpu = [x.cuda().requires_grad_() for x in qkv]
    expected = packed_attention(*on_cpu, lengths, bounds(lengths))
    ours = packed_attention(*on_gpu, lengths, bounds(lengths).cuda())
    torch.testing.assert_close(ours.cpu().float(), expected, atol=0.02, rtol=0.02)
    expected.sum().backward()
    ours.sum().backward()
    for mine, theirs in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(mine.grad.cpu().float(), theirs.grad, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("fused", ["sdpa", "custom operation"])
def test_deterministic_algorithms_are_on_for_the_backward_pass_of_attention_alone(fused: str) -> None:
    leaf = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    modes: list[tuple[str, int]] = []

    def told(name: str) -> torch.autograd.graph.saved_tensors_hooks:
        """Says the mode when the operation inside reads what it kept: while its backward pass runs."""
        return torch.autograd.graph.saved_tensors_hooks(
            lambda kept: kept, lambda kept: (modes.append((name, torch.get_deterministic_debug_mode())), kept)[1]
        )

    with told("before"):
        x = leaf.sin()
    with told("attention"):
        y = functional.scaled_dot_product_attention(x, x, x, is_causal=True) if fused == "sdpa" else doubled(x)
        y = repeatable(y)
    with told("after"):
        loss = y.square().sum()
    for _ in range(2):
        modes.clear()
        loss.backward(retain_graph=True)
        assert set(modes) == {("after", 0), ("attention", 2), ("before", 0)}
    assert torch.get_deterministic_debug_mode() == 0


def test_what_is_not_fused_is_left_as_it_is() -> None:
    x = torch.ones(2, 2).requires_grad_()
    repeatable(x @ x).sum().backward()
    assert repeatable(x) is x
    with torch.no_grad():
        repeatable(x @ x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_on_a_gpu_are_the_same_bits_twice(packed: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = [2000, 1, 1000, 1095]
    qkv = [
        torch.randn(4096, heads, 64, device="cuda", generator=generator).to(dtype).requires_grad_()
        for heads in (16, 4, 4)
    ]
    upstream = torch.randn(4096, 16, 64, device="cuda", generator=generator).to(dtype)

    def run() -> tuple[torch.Tensor, ...]:
        if packed:
            out = packed_attention(*qkv, lengths, bounds(lengths).cuda())
        else:
            out = causal_attention(*(x.transpose(0, 1).unsqueeze(0) for x in qkv)).squeeze(0).transpose(0, 1)
        return (out, *torch.autograd.grad(out, qkv, upstream))

    first = run()
    for _ in range(3):
        for mine, again in zip(first, run(), strict=True):
            assert torch.equal(mine, again)
    assert torch.get_deterministic_debug_mode() == 0
