"""The published curriculum of the Ling 2.0 family: 4K general text, 4K with more reasoning, 32K, 32K with chains of
thought, and 128K by YaRN. Each number says where it is from; those that nobody published are ours and say so. No torch
here.

"Report" is arXiv 2510.22115, "scripts" are `examples/pretrain` of inclusionAI/Ling-V2, "Ling-1" is arXiv 2503.05139.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ling_flow.model.config import ModelConfig, Yarn
from ling_flow.model.family import FAMILY
from ling_flow.model.presets import model_preset

SEQUENCES_AT_START = 3024
"""Of 4,096 tokens, in the first batch: the report's example (§3.2.1), for no member by name."""
RAMP_TOKENS = 500_000_000_000
"""Tokens over which the batch grows (report §3.2.1); that it grows linearly is ours."""
COT_SHARE = 0.15
"""Chains of thought in the last stage. Ours: published is only that they are in its 45 % of reasoning (§3.2.2)."""
SAVE_EVERY_TOKENS = 25_000_000_000
"""WSM's study (arXiv 2507.17634 §4) saves at this interval; what the family's runs did is not published."""
EXTENSION = Yarn(factor=4, original_max_position_embeddings=32768)
"""128K (report §3.2.2, README): a setting of the finished model. No tokens are published for it, so no stage is."""


@dataclass(frozen=True)
class CurriculumStage:
    """One stage under the names of `components.pretrain`'s config. `mixture` names sources by what they hold: a corpus
    for it has sources of these names."""

    stage: str
    tokens: int
    sequence_length: int
    mixture: dict[str, float]
    rope_theta: float
    learning_rate: float
    batch_tokens: int
    expert_bias_update_rate: float
    checkpoints_saved: int
    checkpoints_kept: int
    checkpoints_kept_every: int
    batch_tokens_start: int | None
    batch_ramp_tokens: int
    warmup_steps: int = 2000  # report §3.2.1
    weight_decay: float = 0.1  # report §3.2.1
    gradient_clip: float = 1.0  # report §3.2.1
    optimizer: Literal["adamw"] = "adamw"  # report §3.2.1
    precision: Literal["fp8"] = "fp8"  # report §5.1
    packing: Literal["stream"] = "stream"  # ours: a later and longer stage then reads nothing again


def curriculum(member: str) -> list[CurriculumStage]:
    """The stages that train `member` of the family (mini, flash, one_t), in order."""
    published = FAMILY[member]
    general = CurriculumStage(
        stage="general",
        tokens=10_000_000_000_000,  # report §3.2.1
        sequence_length=4096,  # report §3.2.1
        mixture={"general": 0.68, "reasoning": 0.32},  # report Fig. 5
        rope_theta=1e4,  # scripts, 4K
        learning_rate=published.learning_rate,  # constant to the end
        batch_tokens=published.batch_sequences * 4096,  # that it keeps its tokens at 32K is ours
        batch_tokens_start=SEQUENCES_AT_START * 4096,
        batch_ramp_tokens=RAMP_TOKENS,
        expert_bias_update_rate=1e-3,  # report §3.2.1
        checkpoints_saved=10_000_000_000_000 // SAVE_EVERY_TOKENS,
        checkpoints_kept=1,
        checkpoints_kept_every=5_000_000_000_000 // SAVE_EVERY_TOKENS,  # README: a base model every 5T tokens
    )
    reasoning = replace(
        general,
        stage="reasoning",
        mixture={"general": 0.54, "reasoning": 0.46},  # report Fig. 5
        batch_tokens_start=None,
        batch_ramp_tokens=0,
    )
    long_context = replace(
        reasoning,
        stage="long_context",
        tokens=150_000_000_000,  # report §3.2.2
        sequence_length=32768,  # report §3.2.2
        # Report §3.2.2: a fifth of the sequences are texts of 32K, the others as before.
        mixture={"long_documents": 0.2, "general": 0.8 * 0.54, "reasoning": 0.8 * 0.46},
        rope_theta=6e5,  # scripts, 32K; Ling-1 §3.4.2 makes the same move
        expert_bias_update_rate=1e-4,  # report §3.2.2: from the context extension on
        checkpoints_saved=150_000_000_000 // SAVE_EVERY_TOKENS,
        checkpoints_kept_every=0,
    )
    chain_of_thought = replace(
        long_context,
        stage="chain_of_thought",
        tokens=600_000_000_000,  # report §3.2.2
        mixture={"general": 0.55, "reasoning": 0.45 - COT_SHARE, "chain_of_thought": COT_SHARE},  # report §3.2.2
        checkpoints_saved=32,  # so many are merged (report §3.2.3); their interval is not published
        checkpoints_kept=32,
    )
    return [general, reasoning, long_context, chain_of_thought]


def stage_model_of(member: str) -> ModelConfig:
    """The member's architecture as training takes it: float32 weights, and room for the context after `EXTENSION`."""
    reach = int(EXTENSION.factor * EXTENSION.original_max_position_embeddings)
    return model_preset(member).model_copy(update={"torch_dtype": "float32", "max_position_embeddings": reach})


def stage_configs(member: str) -> list[dict[str, Any]]:
    """The stages as JSON data that `components.pretrain` takes as its config."""
    model = stage_model_of(member).model_dump(mode="json")
    return [{"model": model, **asdict(stage)} for stage in curriculum(member)]
