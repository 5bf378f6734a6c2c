"""The published curriculum as stages of pre-training, and `tiny` as the same curriculum, scaled."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from components.plan.presets import PRESETS, SCALED, curriculum
from components.pretrain import PretrainConfig, stage_model, stage_settings
from ling_flow.config import parse
from ling_flow.model.config import ModelConfig
from ling_flow.model.family import FAMILY
from ling_flow.scaling.law import Interval, Recommendation
from ling_flow.training.curriculum import EXTENSION
from tests.conftest import Called

# arXiv 2510.22115: §3.2.1-3.2.2 and Fig. 5 (tokens, context, share of math and code), §3.2.1 (expert bias).
PUBLISHED = {
    "general": (10e12, 4096, 0.32, 1e-3),
    "reasoning": (10e12, 4096, 0.46, 1e-3),
    "long_context": (150e9, 32768, 0.46, 1e-4),
    "chain_of_thought": (600e9, 32768, 0.45, 1e-4),
}
TABLE_1 = {"mini": (3.36e-4, 4400), "flash": (2.61e-4, 8352), "one_t": (1.86e-4, 18144)}
NOT_GENERAL = ("reasoning", "chain_of_thought")


@pytest.mark.parametrize("member", FAMILY)
def test_the_stages_are_the_published_ones(member: str) -> None:
    stages = curriculum(member, seed=0)
    assert list(stages) == list(PUBLISHED)
    learning_rate, sequences = TABLE_1[member]
    for name, (tokens, length, reasoning, bias_rate) in PUBLISHED.items():
        stage = stages[name]
        assert (stage.tokens, stage.sequence_length, stage.expert_bias_update_rate) == (tokens, length, bias_rate)
        assert (stage.learning_rate, stage.batch_tokens) == (learning_rate, sequences * 4096)
        assert (stage.rope_theta, stage.precision) == ({4096: 1e4, 32768: 6e5}[length], "fp8")
        assert (stage.weight_decay, stage.gradient_clip, stage.warmup_steps) == (0.1, 1.0, 2000)
        assert sum(stage.mixture.values()) == pytest.approx(1)
        long_documents = stage.mixture.get("long_documents", 0)
        share = sum(stage.mixture.get(source, 0) for source in NOT_GENERAL) / (1 - long_documents)
        assert share == pytest.approx(reasoning)
        assert long_documents == (0.2 if name == "long_context" else 0)  # §3.2.2
        assert ("chain_of_thought" in stage.mixture) == (name == "chain_of_thought")
    assert stages["general"].batch_tokens_start == 3024 * 4096  # §3.2.1, with the next line
    assert [stage.batch_ramp_tokens for stage in stages.values()] == [500e9, 0, 0, 0]
    assert stages["chain_of_thought"].checkpoints_kept == 32  # §3.2.3: merged
    assert EXTENSION.factor * EXTENSION.original_max_position_embeddings == 131072


def recommendation() -> Recommendation:
    """Of a law that must not be asked: the stages say all themselves."""
    anything = Interval(low=1, high=1)
    return Recommendation(
        target_compute_flops=1, target_tokens=1, learning_rate=1, learning_rate_interval=anything, batch_tokens=1,
        batch_tokens_interval=anything, predicted_loss=1, predicted_loss_interval=anything, extrapolation_factor=1,
        clamped=(),
    )  # fmt: skip


@pytest.mark.parametrize("member", FAMILY)
def test_pre_training_takes_them_one_after_the_other(member: str) -> None:
    steps: list[int] = []
    before: ModelConfig | None = None
    law = recommendation()
    for config in curriculum(member, seed=0).values():
        settings = stage_settings(config, law)
        assert settings.optimizer.learning_rate == TABLE_1[member][0]
        assert settings.steps * settings.batch_tokens >= config.tokens - 2 * settings.batch_tokens
        if config.checkpoints_kept_every:
            every = config.checkpoints_kept_every * settings.steps / settings.checkpoints_saved * settings.batch_tokens
            assert every == pytest.approx(5e12, rel=0.05)  # README: base models after 5T, 10T, 15T, 20T
        steps.append(settings.steps)
        before = stage_model(config, vocab_size=157184, eos_id=156892, before=before)
        assert before.max_position_embeddings == config.sequence_length
    assert steps[1] == 10_000_000_000_000 // (TABLE_1[member][1] * 4096)
    assert steps[0] > steps[1]  # batches grow in the first


def test_plan_shows_them_as_configs_that_pre_training_takes(call: Callable[..., Called]) -> None:
    found = call("plan", "--preset", "mini", "--json").json["curriculum"]
    stages = [parse(PretrainConfig, stage, "stage") for stage in found["stages"]]
    assert stages == list(curriculum("mini", seed=0).values())
    assert found["extension"] == {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}
    table = call("plan", "--preset", "mini").out
    lines = {line[:26].strip(): line for line in table.splitlines()}
    assert "10 T × 4,096, 32%" in lines["general"]
    assert "600 B × 32,768, 45%" in lines["chain of thought"]
    assert "YaRN to 131,072" in lines["extension, not trained"]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_small_presets_are_the_same_list_scaled(preset: str) -> None:
    lifecycle = PRESETS[preset](0)
    assert [name for joined in SCALED.values() for name in joined] == list(PUBLISHED)  # all, once, in order
    stages = [getattr(lifecycle, f"pretrain_{name}") for name in SCALED]
    assert [stage.stage for stage in stages] == list(SCALED)

    def share(stage: PretrainConfig, prefix: str) -> float:
        return sum(weight for source, weight in stage.mixture.items() if source.startswith(prefix))

    plain = [stage.mixture["reasoning_plain"] for stage in stages]
    reasoning = [share(stage, "reasoning_") for stage in stages]
    thought = [all_of - some for all_of, some in zip(reasoning, plain, strict=True)]
    assert reasoning == sorted(set(reasoning))
    assert thought == sorted(set(thought))
    lengths = [stage.sequence_length for stage in stages]
    assert lengths == sorted(set(lengths))
    assert [stage.rope_theta for stage in stages] == sorted({stage.rope_theta for stage in stages})
    assert {stage.learning_rate for stage in stages} == {None}  # one constant rate: that of the scaling law
    assert stages[-1].checkpoints_kept == lifecycle.merge_checkpoints.last_k
