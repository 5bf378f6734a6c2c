"""Run one trial of a sweep."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ling_flow.data.batches import Batches
from ling_flow.data.corpus import Corpus
from ling_flow.errors import SystemFault
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.scaling.design import Reading, TrialResult, TrialSpec
from ling_flow.training.evaluate import mixture_loss, validation_loss
from ling_flow.training.loop import StepReport, train
from ling_flow.training.optimizer import build_optimizer, warmup_then_constant


def run_trial(
    spec: TrialSpec,
    fingerprint: str,
    corpus_path: Path,
    device: torch.device,
    on_step: Callable[[StepReport], None] | None = None,
) -> TrialResult:
    """Train the model of `spec` from scratch and read its validation loss along the run.

    A run that diverges is a result, not a failure: its remaining readings have no loss.

    Raises:
        UserError: corpus and spec do not fit each other.
    """
    started = time.monotonic()
    corpus = Corpus.open(corpus_path)
    model = BailingMoeV2ForCausalLM(spec.model)
    model.init_weights(spec.seed)
    model.to(device)
    optimizer = build_optimizer(model, spec.optimizer)
    batches = Batches(corpus, spec.mixture, spec.sequence_length, spec.batch_tokens // spec.sequence_length, spec.seed)
    losses: dict[int, float | None] = dict.fromkeys(spec.reading_steps)
    done = 0
    for until in spec.reading_steps:
        try:
            train(
                model,
                optimizer,
                batches,
                steps=until,
                schedule=warmup_then_constant(spec.optimizer.learning_rate, spec.warmup_steps),
                start_step=done,
                gradient_clip=spec.optimizer.gradient_clip,
                expert_bias_update_rate=spec.expert_bias_update_rate,
                on_step=on_step,
            )
        except SystemFault:  # several steps in a row were not finite: diverged
            break
        by_source = validation_loss(
            model, corpus, spec.sequence_length, spec.validation_tokens, sources=batches.sources
        )
        loss = mixture_loss(by_source, spec.mixture)
        losses[until] = loss if math.isfinite(loss) else None
        done = until
    return TrialResult(
        name=spec.name,
        fingerprint=fingerprint,
        hidden_size=spec.model.hidden_size,
        active_parameters=spec.model.parameter_counts().active_non_embedding,
        model_flops_per_token=spec.model_flops_per_token,
        learning_rate=spec.optimizer.learning_rate,
        batch_tokens=spec.batch_tokens,
        readings=tuple(
            Reading(
                step=step,
                tokens=step * spec.batch_tokens,
                compute_flops=step * spec.batch_tokens * spec.model_flops_per_token,
                loss=loss,
            )
            for step, loss in losses.items()
        ),
        seconds=time.monotonic() - started,
    )
