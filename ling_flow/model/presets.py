"""The Ling 2.0 family (Ling 2.0 Table 1; released configurations) and two small members for a CPU. No torch here."""

from __future__ import annotations

from typing import Any

from ling_flow.errors import UserError
from ling_flow.model.config import ModelConfig

_PUBLISHED: dict[str, Any] = {
    "vocab_size": 157184,
    "head_dim": 128,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "eos_token_id": 156892,
    "pad_token_id": 156892,
}


def tiny() -> ModelConfig:
    """A whole life cycle in minutes on two CPU cores."""
    return ModelConfig(
        vocab_size=1024,
        hidden_size=96,
        intermediate_size=192,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=48,
        num_experts=16,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        max_position_embeddings=256,
        initializer_range=0.05,  # about 0.5/sqrt(hidden_size); 0.02 is 0.2 nats behind after 150 steps
        torch_dtype="float32",
    )


def small() -> ModelConfig:
    """About ten times the active parameters of `tiny`: hours on a CPU."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        max_position_embeddings=512,
        initializer_range=0.02,
        torch_dtype="float32",
    )


def mini() -> ModelConfig:
    """Ling-mini-2.0: 16 B parameters, 1.4 B active."""
    return ModelConfig(
        **_PUBLISHED,
        hidden_size=2048,
        intermediate_size=5120,
        moe_intermediate_size=512,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=4,
    )


def flash() -> ModelConfig:
    """Ling-flash-2.0: 103 B parameters, 6.1 B active."""
    return ModelConfig(
        **_PUBLISHED,
        hidden_size=4096,
        intermediate_size=9216,
        moe_intermediate_size=1024,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=4,
    )


def one_t() -> ModelConfig:
    """Ling-1T: 1000 B parameters, 51 B active."""
    return ModelConfig(
        **_PUBLISHED,
        hidden_size=8192,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=80,
        first_k_dense_replace=4,
        num_attention_heads=64,
        num_key_value_heads=8,
    )


MODEL_PRESETS = {"tiny": tiny, "small": small, "mini": mini, "flash": flash, "one_t": one_t}


def model_preset(name: str) -> ModelConfig:
    """The architecture called `name`.

    Raises:
        UserError: no such preset.
    """
    if name not in MODEL_PRESETS:
        raise UserError(f"preset: must be one of {', '.join(MODEL_PRESETS)}, got {name!r}")
    return MODEL_PRESETS[name]()
