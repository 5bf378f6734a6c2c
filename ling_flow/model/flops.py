"""Floating-point operations per token, the unit of compute budgets (EL §2.1 with the exact projection count). No
torch here."""

from __future__ import annotations

from dataclasses import dataclass

from ling_flow.model.config import ModelConfig


@dataclass(frozen=True)
class Flops:
    """FLOPs per token by part of the model."""

    attention: int
    dense: int
    router: int
    experts: int
    head: int
    mtp: int

    @property
    def non_embedding(self) -> int:
        """Without output head and MTP layer: the M of the scaling laws (C = M·D)."""
        return self.attention + self.dense + self.router + self.experts

    @property
    def total(self) -> int:
        """Everything that is computed."""
        return self.non_embedding + self.head + self.mtp


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> Flops:
    """Training FLOPs per token: three times the forward pass; attention scores in full (not halved for causality), as
    the laws count."""
    hidden, width = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    projections = 2 * hidden * (heads + 2 * kv_heads) * width + 2 * heads * width * hidden
    attention = projections + 4 * sequence_length * heads * width
    router = 2 * hidden * config.num_experts
    experts = 6 * hidden * (config.num_experts_per_tok * config.moe_intermediate_size + config.shared_intermediate_size)
    head = 2 * hidden * config.vocab_size
    moe_layers = config.num_hidden_layers - config.first_k_dense_replace
    return Flops(
        attention=3 * config.num_hidden_layers * attention,
        dense=3 * config.first_k_dense_replace * 6 * hidden * config.intermediate_size,
        router=3 * moe_layers * router,
        experts=3 * moe_layers * experts,
        head=3 * head,
        mtp=3 * config.num_nextn_predict_layers * (4 * hidden * hidden + attention + router + experts + head),
    )
