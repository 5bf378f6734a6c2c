"""Wind tunnel: many small trials over model size, learning rate and batch, from which the scaling law is fitted."""

from __future__ import annotations

import time
from typing import Self

from pydantic import Field, model_validator

from ling_flow.config import StrictModel, context_field
from ling_flow.errors import UserError
from ling_flow.flow.component import Dataset, Input, Metrics, Output, Resources, Step, component
from ling_flow.model.config import ModelConfig
from ling_flow.scaling.design import (
    TRIALS_FOLDER,
    Sweep,
    SweepDesign,
    TrialResult,
    TrialSpec,
    finished_trial,
    plan_trials,
)
from ling_flow.training.settings import OptimizerSettings


class WindTunnelConfig(StrictModel):
    """A family of models, and the trials to run on it."""

    model: ModelConfig = Field(description="member of the family; the trials are the same model at other widths")
    design: SweepDesign = Field(description="ladder of sizes and budgets, and the grid on each rung")
    mixture: dict[str, float] = Field(min_length=1, description="sampling weight of each corpus source, in any unit")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of matrices")
    gradient_clip: float = Field(1.0, gt=0, description="largest global L2 norm of the gradient")
    expert_bias_update_rate: float = Field(1e-3, ge=0, description="change of an expert's bias per step")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of initial weights and data order, the same for all trials")
    workers: int | None = context_field(
        None,
        gt=0,
        why="how many trials run at a time does not change any of them",
        description="trials at a time on a local Ray; null: one per core",
    )
    gpus_per_trial: float = context_field(
        0, ge=0, why="where a trial runs does not change the method", description="GPUs of one trial; 0: one CPU"
    )

    @model_validator(mode="after")
    def _trials_can_run(self) -> Self:
        if self.model.torch_dtype != "float32":
            raise ValueError(
                f"model.torch_dtype must be 'float32', got {self.model.torch_dtype!r}: "
                "bfloat16 weights are too coarse for the optimizer's steps"
            )
        longest = self.model.max_position_embeddings
        if self.design.sequence_length > longest:
            raise ValueError(
                f"design.sequence_length must be at most model.max_position_embeddings ({longest}), "
                f"got {self.design.sequence_length}"
            )
        if any(weight < 0 for weight in self.mixture.values()) or not sum(self.mixture.values()) > 0:
            raise ValueError(f"mixture: weights must be 0 or more and not all 0, got {self.mixture}")
        try:
            self.trials()
        except UserError as error:
            raise ValueError(str(error)) from None
        return self

    def trials(self) -> list[TrialSpec]:
        """What is run, largest first."""
        # The grid gives each trial its learning rate; this one is only there because the settings want one.
        optimizer = OptimizerSettings(
            learning_rate=self.design.learning_rates[0],
            weight_decay=self.weight_decay,
            gradient_clip=self.gradient_clip,
        )
        return plan_trials(self.model, self.design, optimizer, self.expert_bias_update_rate, self.mixture, self.seed)


class WindTunnelResult(StrictModel):
    """What the sweep cost and reached."""

    trial_count: int = Field(description="trials")
    diverged: int = Field(description="trials without a finite loss at their end")
    compute_total_flops: float = Field(description="training FLOPs of all trials")
    best_validation_loss: float = Field(description="lowest loss at the end of a trial, nats per token")
    seconds: float = Field(description="time of all trials together, seconds of one worker")


@component(version=3, resources=Resources(cpus=2, memory_gib=4), resumable=True, runs_on="ray")
def wind_tunnel(
    config: WindTunnelConfig, corpus: Input[Dataset], trials: Output[Metrics], step: Step
) -> WindTunnelResult:
    """Train many small models in parallel and record their losses; a killed sweep keeps its finished trials."""
    if config.model.vocab_size < corpus.contract.get("vocab_size", 0):
        raise UserError(
            f"wind_tunnel.model.vocab_size: must be at least that of the corpus ({corpus.contract['vocab_size']}), "
            f"got {config.model.vocab_size}"
        )
    specs = config.trials()
    folder = trials.path / TRIALS_FOLDER
    folder.mkdir(exist_ok=True)
    fingerprints = [spec.fingerprint(corpus.fingerprint) for spec in specs]
    finished = {key: kept for key in fingerprints if (kept := finished_trial(folder, key)) is not None}
    if finished:
        step.log(f"{len(finished)} of {len(specs)} trials were finished before")
    for kept in finished.values():  # the record of the try that made them is not this one's
        report(step, kept)

    from components.ray_cluster import check_gpus, ray_running
    from components.wind_tunnel.sweep import Task, run_tasks

    def on_done(result: TrialResult) -> None:
        result.save(folder)
        finished[result.fingerprint] = result
        report(step, result)
        reached = [trial.loss for trial in finished.values() if trial.loss is not None]
        best = {"best_validation_loss": min(reached)} if reached else {}
        step.progress(len(finished), len(specs), f"{result.name} in {result.seconds:.0f} s", **best)

    tasks = [
        Task(spec, key, corpus.path, config.gpus_per_trial)
        for spec, key in zip(specs, fingerprints, strict=True)
        if key not in finished
    ]
    started = time.monotonic()
    if tasks:
        step.progress(len(finished), len(specs), "starting Ray")
        with ray_running(config.workers):
            check_gpus(config.gpus_per_trial)
            run_tasks(tasks, on_done)
        step.log(f"{len(tasks)} trials in {time.monotonic() - started:.0f} s")
    results = [finished[key] for key in fingerprints]
    losses = [result.loss for result in results if result.loss is not None]
    if not losses:
        raise UserError("wind_tunnel.design.learning_rates: every trial diverged; lower them")
    Sweep(trials=tuple(results)).save(trials.path)
    trials.contract.update(corpus.contract)
    return WindTunnelResult(
        trial_count=len(results),
        diverged=len(results) - len(losses),
        compute_total_flops=sum(result.compute_flops for result in results),
        best_validation_loss=min(losses),
        seconds=sum(result.seconds for result in results),
    )


def report(step: Step, result: TrialResult) -> None:
    """The trial's curve over tokens, and a run of its own under the step's."""
    for reading in result.readings:
        if reading.loss is not None:
            step.metrics({f"validation_loss/{result.name}": reading.loss}, step=reading.tokens)
    metrics = {"compute_flops": result.compute_flops, "seconds": result.seconds}
    if result.loss is not None:
        metrics["validation_loss"] = result.loss
    step.tracker.trial(
        result.name,
        {
            "hidden_size": result.hidden_size,
            "learning_rate": result.learning_rate,
            "batch_tokens": result.batch_tokens,
            "tokens": result.readings[-1].tokens,
        },
        metrics,
    )
