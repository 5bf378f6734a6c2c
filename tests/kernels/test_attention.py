import itertools

import pytest
import torch
from torch.nn import functional

from ling_flow.kernels.attention import packed_attention


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
    ours = packed_attention(query, key, value, lengths)
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
    expected, ours = packed_attention(*on_cpu, lengths), packed_attention(*on_gpu, lengths)
    torch.testing.assert_close(ours.cpu().float(), expected, atol=0.02, rtol=0.02)
    expected.sum().backward()
    ours.sum().backward()
    for mine, theirs in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(mine.grad.cpu().float(), theirs.grad, atol=0.05, rtol=0.05)
