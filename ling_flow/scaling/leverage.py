"""The dense model that would reach a mixture of experts' loss, by the efficiency-leverage law (EL §3-4).

At equal tokens, leverage is the ratio of the two models' training FLOPs per token: M_dense = EL·M_moe. The law was
fitted on computes up to 6e20 FLOPs; beyond, it is an extrapolation.
"""

from __future__ import annotations

from dataclasses import dataclass

from ling_flow.errors import UserError
from ling_flow.model.config import ModelConfig
from ling_flow.model.flops import training_flops_per_token
from ling_flow.scaling.law import LING_2_LEVERAGE


@dataclass(frozen=True)
class DenseEquivalent:
    """`leverage` at `compute_flops`, and a dense model with that many times the FLOPs per token."""

    compute_flops: float
    leverage: float
    config: ModelConfig


def leverage_of(config: ModelConfig, compute_flops: float) -> float:
    """EL of `config` when trained with `compute_flops` FLOPs (M·D): how much more compute a dense model needs.

    The law takes E_a/E, routed experts alone, and G = 2·hidden_size/moe_intermediate_size.
    """
    ratio = config.num_experts_per_tok / config.num_experts
    return LING_2_LEVERAGE.at(ratio, 2 * config.hidden_size / config.moe_intermediate_size, compute_flops)


def dense_equivalent(config: ModelConfig, sequence_length: int, tokens: float) -> DenseEquivalent:
    """The dense model of the loss that `config` reaches after `tokens` tokens: shaped like the family.

    Depth to width, heads to width and feed-forward to width are those of `config`, as are the key-value heads, which
    the heads stay a multiple of; the depth then closes on EL·M.

    Raises:
        UserError: `config` has no mixture-of-experts layer.
    """
    if config.first_k_dense_replace == config.num_hidden_layers:
        raise UserError("first_k_dense_replace: leaves no mixture-of-experts layer to compare with a dense model")
    moe = training_flops_per_token(config, sequence_length).non_embedding
    leverage = leverage_of(config, moe * tokens)
    groups = 1  # query heads per key-value head
    while _flops(_dense(config, groups + 1), sequence_length) <= leverage * moe:
        groups += 1
    near = _dense(config, groups)
    per_layer = _flops(near, sequence_length) / near.num_hidden_layers
    chosen = _dense(config, groups, max(1, round(leverage * moe / per_layer)))
    return DenseEquivalent(moe * tokens, leverage, chosen)


def _flops(config: ModelConfig, sequence_length: int) -> int:
    return training_flops_per_token(config, sequence_length).non_embedding


def _dense(config: ModelConfig, groups: int, depth: int | None = None) -> ModelConfig:
    heads = config.num_key_value_heads * groups
    scale = heads / config.num_attention_heads
    layers = depth or max(1, round(config.num_hidden_layers * scale))
    return config.model_copy(
        update={
            "hidden_size": round(config.hidden_size * scale),
            "intermediate_size": round(config.intermediate_size * scale),
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "first_k_dense_replace": layers,
            "num_nextn_predict_layers": 0,
        }
    )
