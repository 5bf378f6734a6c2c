"""Fit scaling laws: from the trials of the wind tunnel to learning rate, batch and expected loss of a target run."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from ling_flow.config import StrictModel
from ling_flow.flow.component import HTML, Input, Metrics, Output, Resources, Step, component
from ling_flow.model.config import ModelConfig
from ling_flow.model.flops import training_flops_per_token
from ling_flow.scaling.design import Sweep


class FitScalingLawsConfig(StrictModel):
    """The target, and how the laws are fitted."""

    model: ModelConfig = Field(description="architecture of the target")
    tokens: int = Field(gt=0, description="training tokens of the target, over all stages")
    sequence_length: int = Field(gt=0, description="sequence length at which the target's compute is counted, tokens")
    batch_multiple_tokens: int = Field(128, gt=0, description="the recommended batch is a multiple of this, tokens")
    near_optimal: float = Field(
        0.15, gt=0, description="readings up to this fraction above the best of their size and compute are fitted"
    )
    huber_delta: float = Field(
        1e-3, gt=0, description="where the Huber loss of log residuals turns from square to linear"
    )
    bootstrap_samples: int = Field(100, ge=20, description="refits from which the intervals are taken")
    allow_extrapolation_factor: float = Field(
        100.0, ge=1, description="largest compute of the target, in units of the largest trial's"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the bootstrap")

    @model_validator(mode="after")
    def _sequences_fit(self) -> Self:
        longest = self.model.max_position_embeddings
        if self.sequence_length > longest:
            raise ValueError(
                f"sequence_length must be at most model.max_position_embeddings ({longest}), got {self.sequence_length}"
            )
        return self


class FitScalingLawsResult(StrictModel):
    """The recommendation, and what it rests on."""

    learning_rate: float = Field(description="recommended learning rate")
    batch_tokens: int = Field(description="recommended tokens per step")
    predicted_loss: float = Field(description="validation loss expected of the target, nats per token")
    predicted_loss_low: float = Field(description="lower end of its 90 % interval, nats per token")
    predicted_loss_high: float = Field(description="upper end of its 90 % interval, nats per token")
    loss_exponent: float = Field(description="-d log loss / d log compute at the largest trial")
    learning_rate_exponent: float = Field(description="exponent of compute in the best learning rate")
    batch_exponent: float = Field(description="exponent of compute in the best batch")
    residual: float = Field(description="mean absolute residual of log loss")
    extrapolation_factor: float = Field(description="target's compute over the largest trial's")
    clamped: int = Field(description="how many of learning rate and batch were moved into the explored range")


@component(version=2, resources=Resources(cpus=1, memory_gib=1))
def fit_scaling_laws(
    config: FitScalingLawsConfig,
    trials: Input[Metrics],
    scaling_law: Output[Metrics],
    report: Output[HTML],
    step: Step,
) -> FitScalingLawsResult:
    """Fit loss, learning rate and batch against compute, and recommend them for the target."""
    from ling_flow.scaling.fit import fit_scaling_law
    from ling_flow.scaling.plots import report_html
    from ling_flow.scaling.target import Target

    sweep = Sweep.load(trials.path)
    flops = training_flops_per_token(config.model, config.sequence_length).non_embedding
    law = fit_scaling_law(
        sweep.trials,
        Target(float(flops), config.tokens),
        huber_delta=config.huber_delta,
        bootstrap_samples=config.bootstrap_samples,
        seed=config.seed,
        near_optimal=config.near_optimal,
        batch_multiple_tokens=config.batch_multiple_tokens,
        allow_extrapolation_factor=config.allow_extrapolation_factor,
        progress=step.progress,
    )
    law.save(scaling_law.path)
    scaling_law.contract.update(trials.contract)
    (report.path / "index.html").write_text(report_html(law, sweep.trials))
    chosen, powers = law.recommendation, law.hyper_parameters
    step.log(law.loss.reason)
    if chosen.size_factor is not None and chosen.tokens_factor is not None:
        step.log(
            f"target: {chosen.size_factor:.2g} times the FLOPs per token of the largest trial, "
            f"{chosen.tokens_factor:.2g} times the most tokens of one"
        )
    for name in chosen.clamped:
        wanted = getattr(powers, name).at(chosen.target_compute_flops)
        step.log(
            f"{name}: fitted optimum {wanted:.3g} is outside the explored range, {getattr(chosen, name):.3g} taken"
        )
    return FitScalingLawsResult(
        learning_rate=chosen.learning_rate,
        batch_tokens=chosen.batch_tokens,
        predicted_loss=chosen.predicted_loss,
        predicted_loss_low=chosen.predicted_loss_interval.low,
        predicted_loss_high=chosen.predicted_loss_interval.high,
        loss_exponent=law.loss.exponent,
        learning_rate_exponent=powers.learning_rate.exponent,
        batch_exponent=powers.batch_tokens.exponent,
        residual=law.residual,
        extrapolation_factor=chosen.extrapolation_factor,
        clamped=len(chosen.clamped),
    )
