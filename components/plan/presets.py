"""Presets of the whole lifecycle: Python functions that return a typed config. What to train, never where to run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from components.capability_pass import CapabilityPassConfig
from components.deploy import DeployConfig
from components.evaluate import EvaluateConfig
from components.fit_scaling_laws import FitScalingLawsConfig
from components.merge_checkpoints import MergeCheckpointsConfig
from components.preference_pass import PreferencePassConfig
from components.prepare_data import PrepareDataConfig, default_sources
from components.pretrain import PretrainConfig
from components.register import RegisterConfig
from components.wind_tunnel import WindTunnelConfig
from ling_flow.evaluation.gate import Gate
from ling_flow.model.config import ModelConfig
from ling_flow.model.presets import model_preset
from ling_flow.scaling.design import Rung, SweepDesign
from ling_flow.training.curriculum import stage_configs
from ling_flow.training.guard import GuardSettings

if TYPE_CHECKING:
    from components.plan import LifecycleConfig

BIAS_RATE = 1e-2
"""Ten times Ling 2.0's: a run of two thousand steps must balance its experts in a hundred (docs/log.md, 2026-11-23)."""

SCALED = {"short": ("general",), "mid": ("reasoning", "long_context"), "long": ("chain_of_thought",)}
"""Stages of `tiny` and `small` → the published ones that each stands for. The two in the middle have one mixture; the
first gives `mid` its share of reasoning, the second its longer context. The extension to 128K, which is not trained,
has no counterpart: no document of these presets is longer than their last stage reads."""

SHORT_MIXTURE = {
    "python_code": 0.2,
    "python_prose": 0.2,
    "reasoning_plain": 0.3,
    "reasoning_cot": 0.2,
    "reasoning_chat": 0.1,
}
MID_MIXTURE = {
    "python_code": 0.12,
    "python_prose": 0.12,
    "reasoning_plain": 0.16,
    "reasoning_cot": 0.3,
    "reasoning_chat": 0.3,
}
LONG_MIXTURE = {
    "python_code": 0.08,
    "python_prose": 0.08,
    "reasoning_plain": 0.09,
    "reasoning_cot": 0.25,
    "reasoning_chat": 0.5,
}


def _stages(
    model: ModelConfig, tokens: dict[str, int], lengths: tuple[int, int, int], seed: int, threads: int | None
) -> dict[str, PretrainConfig]:
    """The published curriculum, scaled (`SCALED`): one constant-rate run in which context and rotary base grow, the
    shares of reasoning and of chains of thought rise, and the last stage keeps the checkpoints that are merged."""
    shapes = (
        (SHORT_MIXTURE, 1e4, 8, 2),
        (MID_MIXTURE, 3e4, 5, 2),
        (LONG_MIXTURE, 1e5, 16, 10),
    )
    return {
        f"pretrain_{name}": PretrainConfig(
            stage=name,
            model=model,
            tokens=tokens[name],
            sequence_length=length,
            rope_theta=rope_theta,
            mixture=mixture,
            expert_bias_update_rate=BIAS_RATE,
            guard=GuardSettings(factor=None),  # hundreds of steps that fall steeply: what is a spike is not yet known
            checkpoints_saved=saved,
            checkpoints_kept=kept,
            seed=seed,
            threads=threads,
        )
        for name, (mixture, rope_theta, saved, kept), length in zip(SCALED, shapes, lengths, strict=True)
    }


def curriculum(member: str, seed: int) -> dict[str, PretrainConfig]:
    """The published stages of mini, flash or one_t, by name and in order (`ling_flow/training/curriculum.py`)."""
    return {stage["stage"]: PretrainConfig(**stage, seed=seed) for stage in stage_configs(member)}


def tiny(seed: int) -> LifecycleConfig:
    """Every phase for real in minutes on two CPU cores: 0.5 M active parameters, 2.2 M tokens."""
    from components.plan import LifecycleConfig

    # A model this small is as fast on one thread as on two, whatever else the machine does (docs/log.md): threads=1.
    model = model_preset("tiny")
    tokens = {"short": 900_000, "mid": 600_000, "long": 700_000}
    return LifecycleConfig(
        prepare_data=PrepareDataConfig(seed=seed),
        wind_tunnel=WindTunnelConfig(
            model=model,
            design=SweepDesign(
                rungs=(
                    Rung(hidden_size=48, compute_flops=6e10),
                    Rung(hidden_size=96, compute_flops=1.6e11),
                    Rung(hidden_size=144, compute_flops=3e11),
                ),
                learning_rates=(1e-3, 2.5e-3, 6.25e-3),
                batch_tokens=(768, 1536, 3072),
                sequence_length=128,
                warmup_tokens=8192,
                validation_tokens=4096,
            ),
            mixture=SHORT_MIXTURE,
            expert_bias_update_rate=BIAS_RATE,
            seed=seed,
        ),
        fit_scaling_laws=FitScalingLawsConfig(model=model, tokens=sum(tokens.values()), sequence_length=128, seed=seed),
        **_stages(model, tokens, (128, 192, 256), seed, threads=1),
        merge_checkpoints=MergeCheckpointsConfig(last_k=10, validation_tokens=4096, threads=1),
        capability_pass=CapabilityPassConfig(seed=seed, threads=1),
        preference_pass=PreferencePassConfig(seed=seed, threads=1),
        evaluate=EvaluateConfig(seed=seed + 1, threads=1),
        register=RegisterConfig(
            model_name="ling-tiny",
            gates=(
                Gate(metric="well_formed", threshold=0.9, min_change=-0.05),
                Gate(metric="thinking_switch_obeyed", threshold=0.95, min_change=-0.05),
                Gate(metric="exact_match_easiest", threshold=0.3, min_change=-0.1),
            ),
        ),
        deploy=DeployConfig(seed=seed),
    )


def small(seed: int) -> LifecycleConfig:
    """Ten times the active parameters of `tiny` and a larger vocabulary; for hours of a CPU, not yet run whole."""
    from components.plan import LifecycleConfig

    model = model_preset("small")
    tokens = {"short": 2_400_000, "mid": 1_400_000, "long": 1_200_000}

    sources = [
        source.model_copy(update={"documents": 20_000})
        if source.kind == "reasoning"
        else source.model_copy(update={"max_characters": 6_000_000})
        for source in default_sources()
    ]
    base = tiny(seed)
    return LifecycleConfig(
        prepare_data=PrepareDataConfig(sources=sources, vocab_size=4096, tokenizer_characters=4_000_000, seed=seed),
        wind_tunnel=WindTunnelConfig(
            model=model,
            design=SweepDesign(
                rungs=(
                    Rung(hidden_size=128, compute_flops=1.5e12),
                    Rung(hidden_size=256, compute_flops=4e12),
                    Rung(hidden_size=384, compute_flops=8e12),
                ),
                learning_rates=(5e-4, 1.25e-3, 3e-3),
                batch_tokens=(1024, 2048, 4096),
                sequence_length=256,
                warmup_tokens=8192,
                validation_tokens=8192,
            ),
            mixture=SHORT_MIXTURE,
            expert_bias_update_rate=BIAS_RATE,
            seed=seed,
        ),
        fit_scaling_laws=FitScalingLawsConfig(model=model, tokens=sum(tokens.values()), sequence_length=256, seed=seed),
        **_stages(model, tokens, (256, 384, 512), seed, threads=None),
        merge_checkpoints=MergeCheckpointsConfig(last_k=10),
        capability_pass=CapabilityPassConfig(seed=seed),
        preference_pass=PreferencePassConfig(seed=seed),
        evaluate=EvaluateConfig(seed=seed + 1),
        register=base.register.model_copy(update={"model_name": "ling-small"}),
        deploy=DeployConfig(seed=seed),
    )


PRESETS: dict[str, Callable[[int], LifecycleConfig]] = {"tiny": tiny, "small": small}
