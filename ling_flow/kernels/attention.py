"""Causal attention with grouped key-value heads, softmax in float32, scale 1/sqrt(head width).

On CUDA the backward pass of torch's fused attention adds up with atomics, in another order every time, unless
deterministic algorithms are on when it runs (a warning alone leaves it so). They are turned on for that one operation:
everywhere they would make cuBLAS raise without CUBLAS_WORKSPACE_CONFIG, and fill every new tensor. cuDNN's attention
has no such algorithm in torch, and is not taken.

Shapes: B batch, S queries, L keys, T tokens of all documents, N documents, H query heads, K key-value heads, C head
width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ling_flow.kernels.products import slow

REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def causal_attention(query_BHSC: Tensor, key_BKSC: Tensor, value_BKSC: Tensor) -> Tensor:
    """Attention (B, H, S, C) of every position to itself and those before it."""
    if slow(query_BHSC):  # keeps the bfloat16 operands, and is done again for the backward pass
        out: Tensor = checkpoint(
            _wide_attention, query_BHSC, key_BKSC, value_BKSC, use_reentrant=False, preserve_rng_state=False
        )
        return out
    attend = functools.partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    if not query_BHSC.is_cuda:
        return attend(query_BHSC, key_BKSC, value_BKSC)
    with sdpa_kernel(REPEATABLE):
        return repeatable(attend(query_BHSC, key_BKSC, value_BKSC))


def repeatable(out: Tensor) -> Tensor:
    """The output of fused attention, whose backward pass will run with deterministic algorithms."""
    node = out.grad_fn
    if node is not None and node.name().startswith("Slice"):  # heads were widened to a multiple of 8
        node = node.next_functions[0][0]
    if node is None or not any(part in node.name() for part in ("Attention", "attn")):  # plain products repeat
        return out
    before: list[int] = []

    def enter(*_: object) -> None:
        before.append(torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("error")

    def leave(*_: object) -> None:
        torch.set_deterministic_debug_mode(before.pop())

    node.register_prehook(enter)
    node.register_hook(leave)
    return out


def _wide_attention(query_BHSC: Tensor, key_BKSC: Tensor, value_BKSC: Tensor) -> Tensor:
    wide = causal_attention(query_BHSC.float(), key_BKSC.float(), value_BKSC.float())
    return wide.to(query_BHSC.dtype)


def packed_attention(
    query_THC: Tensor, key_TKC: Tensor, value_TKC: Tensor, lengths: Sequence[int], bounds_N1: Tensor
) -> Tensor:
    """Attention (T, H, C) of every token to itself and those before it in its document.

    Args:
        lengths: tokens of each document, in order; they sum to T.
        bounds_N1: int32, where each document begins, and T; on the device, so that no layer waits for it.
    """
    if query_THC.is_cuda and query_THC.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        grouped: dict[str, Any] = {"enable_gqa": True} if _takes_grouped_heads() else {}
        if not grouped:
            repeat = query_THC.shape[1] // key_TKC.shape[1]
            key_TKC, value_TKC = key_TKC.repeat_interleave(repeat, 1), value_TKC.repeat_interleave(repeat, 1)
        longest = max(lengths)
        out_THC = varlen_attn(
            query_THC, key_TKC, value_TKC, bounds_N1, bounds_N1, longest, longest, window_size=(-1, 0), **grouped
        )
        assert isinstance(out_THC, Tensor)
        return repeatable(out_THC)
    # Elsewhere one call per document: its work is the sum of the squares of the lengths, that of a mask over the row
    # the square of the sum.
    parts = zip(query_THC.split(lengths), key_TKC.split(lengths), value_TKC.split(lengths), strict=True)
    out = [
        causal_attention(*(x.transpose(0, 1).unsqueeze(0) for x in part)).squeeze(0).transpose(0, 1) for part in parts
    ]
    return torch.cat(out)


@functools.cache
def _takes_grouped_heads() -> bool:
    """torch 2.11's does not."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def cached_attention(query_BHSC: Tensor, key_BKLC: Tensor, value_BKLC: Tensor, visible_B1SL: Tensor) -> Tensor:
    """Attention (B, H, S, C) of new positions to the cached ones where `visible` is true. No gradient is needed."""
    batch, heads, queries, width = query_BHSC.shape
    kv_heads = key_BKLC.shape[1]
    if queries == 1:  # the query heads of one key-value head act as its queries: nothing is repeated
        grouped = query_BHSC.reshape(batch, kv_heads, heads // kv_heads, width)
        return functional.scaled_dot_product_attention(grouped, key_BKLC, value_BKLC, attn_mask=visible_B1SL).reshape(
            query_BHSC.shape
        )
    return functional.scaled_dot_product_attention(
        query_BHSC, key_BKLC, value_BKLC, attn_mask=visible_B1SL, enable_gqa=True
    )
