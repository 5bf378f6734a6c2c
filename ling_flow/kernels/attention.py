"""Causal attention with grouped key-value heads, softmax in float32, scale 1/sqrt(head width).

Shapes: B batch, S queries, L keys, T tokens of all documents, H query heads, K key-value heads, C head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ling_flow.kernels.products import slow


def causal_attention(query_BHSC: Tensor, key_BKSC: Tensor, value_BKSC: Tensor) -> Tensor:
    """Attention (B, H, S, C) of every position to itself and those before it."""
    if slow(query_BHSC):  # keeps the bfloat16 operands, and is done again for the backward pass
        out: Tensor = checkpoint(
            _wide_attention, query_BHSC, key_BKSC, value_BKSC, use_reentrant=False, preserve_rng_state=False
        )
        return out
    return functional.scaled_dot_product_attention(query_BHSC, key_BKSC, value_BKSC, is_causal=True, enable_gqa=True)


def _wide_attention(query_BHSC: Tensor, key_BKSC: Tensor, value_BKSC: Tensor) -> Tensor:
    wide = causal_attention(query_BHSC.float(), key_BKSC.float(), value_BKSC.float())
    return wide.to(query_BHSC.dtype)


def packed_attention(query_THC: Tensor, key_TKC: Tensor, value_TKC: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attention (T, H, C) of every token to itself and those before it in its document.

    Args:
        lengths: tokens of each document, in order; they sum to T.
    """
    if query_THC.is_cuda and query_THC.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=query_THC.device)
        longest = max(lengths)
        repeat = query_THC.shape[1] // key_TKC.shape[1]  # torch 2.11's has no grouped heads
        key_THC, value_THC = key_TKC.repeat_interleave(repeat, 1), value_TKC.repeat_interleave(repeat, 1)
        out_THC = varlen_attn(query_THC, key_THC, value_THC, starts, starts, longest, longest, window_size=(-1, 0))
        assert isinstance(out_THC, Tensor)
        return out_THC
    # Elsewhere one call per document: its work is the sum of the squares of the lengths, that of a mask over the row
    # the square of the sum.
    parts = zip(query_THC.split(lengths), key_TKC.split(lengths), value_TKC.split(lengths), strict=True)
    out = [
        causal_attention(*(x.transpose(0, 1).unsqueeze(0) for x in part)).squeeze(0).transpose(0, 1) for part in parts
    ]
    return torch.cat(out)


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
