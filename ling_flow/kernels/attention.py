"""Causal attention with grouped key-value heads, softmax in float32, scale 1/sqrt(head width).

Shapes: B batch, S queries, L keys, H query heads, K key-value heads, C head width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def causal_attention(query_BHSC: Tensor, key_BKSC: Tensor, value_BKSC: Tensor) -> Tensor:
    """Attention (B, H, S, C) of every position to itself and those before it."""
    return functional.scaled_dot_product_attention(query_BHSC, key_BKSC, value_BKSC, is_causal=True, enable_gqa=True)


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
