"""Scaling laws as typed artifacts: power laws with intervals, the recommendation they make, and the published laws.

Compute C is *training* FLOPs: C = M·D with M the training FLOPs per token without embedding and logits (3 × forward,
full attention scores) and D tokens. The published coefficients close only in this convention (Ling scaling laws §2.1,
Eq. 3). This module imports no torch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ling_flow.config import StrictModel, parse
from ling_flow.errors import UserError

LAW_FILE = "law.json"


class Interval(StrictModel):
    """A bootstrap interval of the law's `confidence`."""

    low: float = Field(description="Lower end")
    high: float = Field(description="Upper end")


class PowerLaw(StrictModel):
    """y = coefficient · C^exponent, C in training FLOPs."""

    coefficient: float = Field(gt=0, description="Value at C = 1, in the unit of the quantity")
    exponent: float = Field(description="Slope in log-log")
    exponent_interval: Interval | None = Field(None, description="Interval of the exponent; none for published laws")

    def at(self, compute_flops: float) -> float:
        return math.exp(math.log(self.coefficient) + self.exponent * math.log(compute_flops))


class HyperParameterLaw(StrictModel):
    """Best learning rate and batch (tokens) as power laws of training compute."""

    learning_rate: PowerLaw = Field(description="Peak learning rate of AdamW")
    batch_tokens: PowerLaw = Field(description="Tokens per optimizer step")


LING_2_LAW = HyperParameterLaw(
    learning_rate=PowerLaw(coefficient=1.1576, exponent=-0.1529),
    batch_tokens=PowerLaw(coefficient=0.0694, exponent=0.3644),
)
"""Ling scaling laws, Eq. 3 (64 experts, 4 active, 1 shared; C from 3e17 to 3e20)."""


class ComputeForm(StrictModel):
    """L = coefficient · C^-exponent: loss falls with compute alone, however it is split between size and tokens."""

    kind: Literal["compute"] = "compute"
    coefficient: float = Field(gt=0, description="Loss at C = 1, nats per token")
    exponent: float = Field(description="Loss exponent in compute")

    def at(self, model_flops_per_token: float, tokens: float) -> float:
        return math.exp(math.log(self.coefficient) - self.exponent * math.log(model_flops_per_token * tokens))


class SizeAndTokensForm(StrictModel):
    """L = irreducible + size_coefficient · M^-size_exponent + tokens_coefficient · D^-tokens_exponent (Chinchilla)."""

    kind: Literal["size_and_tokens"] = "size_and_tokens"
    irreducible: float = Field(ge=0, description="Loss that neither size nor tokens remove, nats per token")
    size_coefficient: float = Field(gt=0, description="Size term at M = 1, nats per token")
    size_exponent: float = Field(description="Exponent of M, training FLOPs per token")
    tokens_coefficient: float = Field(gt=0, description="Tokens term at D = 1, nats per token")
    tokens_exponent: float = Field(description="Exponent of D, tokens")

    def at(self, model_flops_per_token: float, tokens: float) -> float:
        size = math.exp(math.log(self.size_coefficient) - self.size_exponent * math.log(model_flops_per_token))
        data = math.exp(math.log(self.tokens_coefficient) - self.tokens_exponent * math.log(tokens))
        return self.irreducible + size + data


class LossFit(StrictModel):
    """The loss reached at the best learning rate and batch."""

    form: Annotated[ComputeForm | SizeAndTokensForm, Field(discriminator="kind")] = Field(description="The chosen form")
    exponent: float = Field(
        description="-d log L / d log C at the largest trial compute, size and tokens growing alike"
    )
    exponent_interval: Interval = Field(description="Interval of that slope")
    held_out_error: dict[str, float] = Field(
        description="Mean absolute log error of each form on the largest computes when fitted without them"
    )
    reason: str = Field(description="Why this form was chosen")


class Recommendation(StrictModel):
    """What to train the target with."""

    target_compute_flops: float = Field(gt=0, description="Training compute of the target, FLOPs")
    target_tokens: int = Field(gt=0, description="Training tokens of the target")
    learning_rate: float = Field(gt=0, description="Recommended learning rate, inside the explored range")
    learning_rate_interval: Interval = Field(description="Interval of the fitted optimum, before clamping")
    batch_tokens: int = Field(gt=0, description="Recommended batch, tokens per step, inside the explored range")
    batch_tokens_interval: Interval = Field(description="Interval of the fitted optimum, before clamping")
    predicted_loss: float = Field(gt=0, description="Validation loss predicted for the target, nats per token")
    predicted_loss_interval: Interval = Field(
        description="Interval of the predicted loss, given that the fitted form holds up to the target"
    )
    extrapolation_factor: float = Field(gt=0, description="Target compute over the largest compute of a trial")
    size_factor: float | None = Field(
        None, gt=0, description="Target's M over the largest of a trial; null where the form asks for compute alone"
    )
    tokens_factor: float | None = Field(
        None, gt=0, description="Target's tokens over the most of a trial; null where the form asks for compute alone"
    )
    clamped: tuple[Literal["learning_rate", "batch_tokens"], ...] = Field(
        description="Which optima lay outside the explored range and were moved to its edge"
    )


class ScalingLaw(StrictModel):
    """The typed artifact `law.json`: fitted laws, where they are valid, and the recommendation for one target."""

    schema_version: Literal[1] = 1
    loss: LossFit = Field(description="Loss against size, tokens and compute")
    hyper_parameters: HyperParameterLaw = Field(description="Best learning rate and batch against compute")
    learning_rate_curvature: float = Field(description="d² log L / d (log learning rate)² at the optimum")
    batch_curvature: float = Field(description="d² log L / d (log batch)² at the optimum")
    residual: float = Field(ge=0, description="Mean absolute residual of log loss")
    trials: int = Field(gt=0, description="Trials used")
    readings: int = Field(gt=0, description="Loss readings used, several per trial")
    dropped_trials: int = Field(ge=0, description="Trials without a usable reading (diverged, or far from the best)")
    confidence: float = Field(gt=0, lt=1, description="Coverage the intervals aim at")
    compute_range: Interval = Field(description="Training compute explored, FLOPs")
    size_range: Interval | None = Field(
        None, description="M explored, training FLOPs per token; null where the form asks for compute alone"
    )
    tokens_range: Interval | None = Field(
        None, description="Training tokens explored; null where the form asks for compute alone"
    )
    learning_rate_range: Interval = Field(description="Learning rates explored")
    batch_tokens_range: Interval = Field(description="Batches explored, tokens")
    recommendation: Recommendation = Field(description="For the target asked for")

    def save(self, directory: Path) -> None:
        """Write `law.json` into the existing `directory`."""
        (directory / LAW_FILE).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> ScalingLaw:
        """Read `law.json` from `directory`.

        Raises:
            UserError: the file is missing or is not a scaling law; the line names the file.
        """
        path = Path(directory) / LAW_FILE
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: no readable scaling law there ({error.__class__.__name__})") from None
        return parse(cls, text, str(path))


class EfficiencyLeverage(StrictModel):
    """EL(A, G, C) = Â^(a + d·log10 C + γ·(log2 G)² + β·log2 G): dense over MoE compute at equal loss (EL §4, Table 2).

    The bases of the logarithms are not printed; these are the only pair that reproduces the paper's own numbers. A is
    activated over routable experts (E_a/E) and G = 2·d_model/d_expert.
    """

    a: float = Field(1.23, description="Exponent at C = 1, G = 1")
    d: float = Field(-7.61e-2, description="Change of the exponent per decade of compute")
    gamma: float = Field(1.67e-2, description="Quadratic term in log2 G")
    beta: float = Field(-1.17e-1, description="Linear term in log2 G")
    a_start: float = Field(1.63e-2, description="Saturation of the activation ratio from below")
    a_max: float = Field(5.28e16, description="Saturation of the activation ratio from above")

    def at(self, activation_ratio: float, granularity: float, compute_flops: float) -> float:
        """Leverage of a MoE with `activation_ratio` in (0, 1] and `granularity` > 0 at `compute_flops`."""
        if not 0 < activation_ratio <= 1:
            raise UserError(f"activation_ratio: must be in (0, 1], got {activation_ratio}")
        start = 1 / (1 / self.a_start - 1 / self.a_max)
        saturated = 1 / (1 / (activation_ratio + start) + 1 / self.a_max)
        log_g = math.log2(granularity)
        return saturated ** (self.a + self.d * math.log10(compute_flops) + self.gamma * log_g**2 + self.beta * log_g)

    @property
    def best_granularity(self) -> float:
        """The granularity of highest leverage, the same at every compute: 2^(-β/2γ)."""
        return 2 ** (-self.beta / (2 * self.gamma))


LING_2_LEVERAGE = EfficiencyLeverage()
"""The published joint law (EL Table 2)."""
