"""Attention with fused projection, query-key norm, partial rotary embedding and grouped key-value heads (Ling 2.0
§2.1), and its cache.

Shapes: B batch, S new positions, L cached positions, D hidden, H query heads, K key-value heads, C head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ling_flow.kernels.attention import cached_attention, causal_attention, packed_attention
from ling_flow.kernels.qk_norm_rope import qk_norm_rope
from ling_flow.model.config import ModelConfig
from ling_flow.model.layers import Linear, RMSNorm
from ling_flow.model.packing import Packing


class KVCache:
    """Keys and values of all layers for a batch of left-padded sequences; slot s of row b holds position `s -
    padding_B[b]`."""

    def __init__(self, config: ModelConfig, padding_B: Tensor, capacity: int, dtype: torch.dtype) -> None:
        shape = (config.num_hidden_layers, len(padding_B), config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=padding_B.device)
        self.values = torch.zeros(shape, dtype=dtype, device=padding_B.device)
        self.padding_B = padding_B
        self.length = 0

    @property
    def capacity(self) -> int:
        """Slots per sequence."""
        return self.keys.shape[3]

    def grow(self, slots: int) -> None:
        """Give each sequence this many slots more."""
        self.keys = functional.pad(self.keys, (0, 0, 0, slots))
        self.values = functional.pad(self.values, (0, 0, 0, slots))

    def keep(self, rows: Tensor) -> None:
        """The batch becomes these rows of it, in this order; a row may come several times."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.padding_B = self.padding_B[rows]


class CacheView(NamedTuple):
    """What one layer needs of the cache in one step. `visible_B1SL`: which slots each new position attends to."""

    keys_BKLC: Tensor
    values_BKLC: Tensor
    start: int
    visible_B1SL: Tensor


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.query_key_value = Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.dense = Linear(self.heads * self.head_dim, config.hidden_size)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: CacheView | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        query_BHSC, key_BKSC, value_BKSC = qk_norm_rope(
            self.query_key_value(x_BSD), self.query_layernorm.weight, self.key_layernorm.weight, *rotary,
            self.heads, self.kv_heads, self.query_layernorm.eps, positions_first=packing is not None,
        )  # fmt: skip
        if packing is not None:
            query_THC, key_TKC, value_TKC = (
                part.transpose(1, 2).flatten(0, 1) for part in (query_BHSC, key_BKSC, value_BKSC)
            )
            out_THC = packed_attention(query_THC, key_TKC, value_TKC, packing.lengths, packing.bounds_N1)
            return self.dense(out_THC.flatten(1).unflatten(0, x_BSD.shape[:2]))
        if cache is None:
            out_BHSC = causal_attention(query_BHSC, key_BKSC, value_BKSC)
        else:
            end = cache.start + x_BSD.shape[1]
            cache.keys_BKLC[:, :, cache.start : end] = key_BKSC
            cache.values_BKLC[:, :, cache.start : end] = value_BKSC
            out_BHSC = cached_attention(
                query_BHSC, cache.keys_BKLC[:, :, :end], cache.values_BKLC[:, :, :end], cache.visible_B1SL
            )
        return self.dense(out_BHSC.transpose(1, 2).flatten(2))
