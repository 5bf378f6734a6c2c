"""What the tests of pretrain and merge_checkpoints start from: a corpus artifact, a law artifact, a micro config."""

from pathlib import Path

from components.prepare_data import PrepareDataConfig, prepare_data
from ling_flow.config import StrictModel
from ling_flow.flow.component import Metrics, Output, Resources, component
from ling_flow.scaling.law import (
    LING_2_LAW,
    ComputeForm,
    Interval,
    LossFit,
    Recommendation,
    ScalingLaw,
)
from tests.training.micro import micro_model, write_texts

ANY = Interval(low=1, high=2)
LAW = ScalingLaw(
    loss=LossFit(
        form=ComputeForm(coefficient=10, exponent=0.1),
        exponent=0.1,
        exponent_interval=ANY,
        held_out_error={},
        reason="test",
    ),
    hyper_parameters=LING_2_LAW,
    learning_rate_curvature=0.1,
    batch_curvature=0.1,
    residual=0.01,
    trials=9,
    readings=9,
    dropped_trials=0,
    confidence=0.8,
    compute_range=ANY,
    learning_rate_range=ANY,
    batch_tokens_range=ANY,
    recommendation=Recommendation(
        target_compute_flops=1e12,
        target_tokens=1000,
        learning_rate=4e-3,
        learning_rate_interval=ANY,
        batch_tokens=70,  # 4.375 sequences of 16
        batch_tokens_interval=ANY,
        predicted_loss=3.0,
        predicted_loss_interval=ANY,
        extrapolation_factor=1.0,
        clamped=(),
    ),
)


class LawConfig(StrictModel):
    """Nothing to say."""


class LawResult(StrictModel):
    """Nothing to say."""


@component(version=1, resources=Resources())
def fitted(config: LawConfig, scaling_law: Output[Metrics]) -> LawResult:
    """A law without a wind tunnel."""
    LAW.save(scaling_law.path)
    return LawResult()


def make_inputs(root: Path, texts: Path, seed: int = 0) -> dict[str, str]:
    """References to a corpus and a law below `root`."""
    sources = [write_texts(texts, "words", seed), write_texts(texts, "numbers", seed + 1)]
    config = PrepareDataConfig(sources=sources, vocab_size=280, validation_share=0.1, tokenizer_characters=5000)
    return {
        "corpus": prepare_data(config, root=root).refs["corpus"],
        "scaling_law": fitted({}, root=root).refs["scaling_law"],
    }


def config(**changes):
    """384 tokens: 6 steps of 4 sequences of 16."""
    fields = {
        "stage": "short",
        "model": micro_model().model_dump(),
        "tokens": 384,
        "sequence_length": 16,
        "mixture": {"words": 3, "numbers": 1},
        "warmup_steps": 2,
        "checkpoints_saved": 3,
        "checkpoints_kept": 2,
        "validation_tokens": 64,
        "threads": 1,
    }
    return {**fields, **changes}
