"""Floating-point operations per token by part, the unit of compute budgets (EL §2.1 with the exact projection count).

A multiply-add is two operations; norms, rotary embedding, softmax and activations are left out, as the laws do. No
torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from ling_flow.model.config import ModelConfig

Scores = Literal["full", "causal"]
"""`full`: every position attends to the whole sequence, as the scaling laws count. `causal`: to itself and those before
it, (S+1)/2 on average, as an attention kernel computes."""


@dataclass(frozen=True)
class Flops:
    """FLOPs per token by part of the model. `mtp_layers` are the MTP layers with their input projection, `mtp_heads`
    their applications of the shared output head."""

    attention_projections: int
    attention_scores: int
    dense: int
    router: int
    routed_experts: int
    shared_experts: int
    head: int
    mtp_layers: int
    mtp_heads: int

    @property
    def attention(self) -> int:
        """Projections and scores."""
        return self.attention_projections + self.attention_scores

    @property
    def experts(self) -> int:
        """Routed and shared."""
        return self.routed_experts + self.shared_experts

    @property
    def mtp(self) -> int:
        """All that the MTP layers add."""
        return self.mtp_layers + self.mtp_heads

    @property
    def non_embedding(self) -> int:
        """Without output head and MTP layers: the M of the scaling laws (C = M·D)."""
        return self.attention + self.dense + self.router + self.experts

    @property
    def total(self) -> int:
        """Everything that is computed."""
        return self.non_embedding + self.head + self.mtp


def forward_flops_per_token(config: ModelConfig, sequence_length: int, scores: Scores = "full") -> Flops:
    """FLOPs of one forward pass with the MTP layers, per token of sequences of `sequence_length` tokens."""
    hidden, width = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layers, moe_layers = config.num_hidden_layers, config.num_hidden_layers - config.first_k_dense_replace
    projections = 2 * hidden * (heads + 2 * kv_heads) * width + 2 * heads * width * hidden
    # Twice the keys that a token sees: 2·S, or S+1 on average over the positions.
    attended = heads * width * 2 * (2 * sequence_length if scores == "full" else sequence_length + 1)
    router = 2 * hidden * config.num_experts
    routed = 6 * hidden * config.num_experts_per_tok * config.moe_intermediate_size
    shared = 6 * hidden * config.shared_intermediate_size
    head = 2 * hidden * config.vocab_size
    mtp_layer = 4 * hidden * hidden + projections + attended + router + routed + shared
    return Flops(
        attention_projections=layers * projections,
        attention_scores=layers * attended,
        dense=config.first_k_dense_replace * 6 * hidden * config.intermediate_size,
        router=moe_layers * router,
        routed_experts=moe_layers * routed,
        shared_experts=moe_layers * shared,
        head=head,
        mtp_layers=config.num_nextn_predict_layers * mtp_layer,
        mtp_heads=config.num_nextn_predict_layers * head,
    )


def training_flops_per_token(
    config: ModelConfig, sequence_length: int, scores: Scores = "full", recompute: bool = False
) -> Flops:
    """Training FLOPs per token: three times the forward pass.

    Args:
        recompute: the layers' forward pass runs a second time in the backward pass (four times in all); the output
            head, whose loss computes its gradient at once, stays at three. A utilisation (MFU) counts without it.
    """
    forward = forward_flops_per_token(config, sequence_length, scores)
    heads = ("head", "mtp_heads")
    return Flops(
        **{
            part.name: (4 if recompute and part.name not in heads else 3) * getattr(forward, part.name)
            for part in fields(Flops)
        }
    )
