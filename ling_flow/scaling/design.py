"""The design of a wind-tunnel sweep: which trials are run, and the record each leaves. No torch here.

A ladder of models that differ by one dial (width) is climbed, each rung with its own compute budget C = M·D (Ling 2.0
§2.3.3 and the ladder of the Ling scaling laws). On each rung half of the learning rate × batch grid is run, like the
squares of one colour on a chessboard, and the next rung takes the other colour: half the cost, and the surface of
surface.py is still determined. Trials keep a constant learning rate after warm-up, so the loss read along a run is the
loss of a shorter run (WSM §3.1) and one trial gives several compute points.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from ling_flow.config import StrictModel, canonical_json, identity_of, parse
from ling_flow.errors import UserError
from ling_flow.model.config import ModelConfig
from ling_flow.model.flops import training_flops_per_token
from ling_flow.training.settings import OptimizerSettings

TRIALS_FILE = "trials.json"
TRIALS_FOLDER = "trials"
WIDTH_MULTIPLE = 8  # feed-forward widths are rounded to this
SCALED_FIELDS = ("hidden_size", "num_attention_heads", "intermediate_size", "moe_intermediate_size")
"""What differs between the models of one family, besides the MTP layer."""


class Rung(StrictModel):
    """One model size of the ladder and the compute each of its trials gets."""

    hidden_size: int = Field(
        gt=0, description="Width of the model, elements; the other widths and the query heads follow"
    )
    compute_flops: float = Field(gt=0, description="Training compute of one trial, FLOPs")


class SweepDesign(StrictModel):
    """Ladder, grid and how a trial is read."""

    rungs: tuple[Rung, ...] = Field(min_length=1, description="Ladder of sizes and budgets")
    learning_rates: tuple[float, ...] = Field(
        min_length=2, description="Learning rates of the grid, ascending, usually factors of 2"
    )
    batch_tokens: tuple[int, ...] = Field(
        min_length=2, description="Batches of the grid, tokens per step, ascending, usually factors of 2"
    )
    sequence_length: int = Field(gt=0, description="Tokens per sequence; divides every batch")
    read_at: tuple[float, ...] = Field(
        (0.25, 0.5, 1.0), min_length=1, description="Fractions of the budget at which the loss is read; the last is 1"
    )
    warmup_tokens: int = Field(ge=0, description="Tokens of linear warm-up, the same for every trial")
    validation_tokens: int = Field(gt=0, description="Validation tokens of one reading, per source")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("learning_rates", "batch_tokens", "read_at"):
            values = getattr(self, name)
            if values[0] <= 0 or any(low >= high for low, high in itertools.pairwise(values)):
                raise ValueError(f"{name} must be positive and ascending, got {values}")
        if self.read_at[-1] != 1:
            raise ValueError(f"read_at must end with 1, got {self.read_at}")
        if len({rung.hidden_size for rung in self.rungs}) < len(self.rungs):
            raise ValueError("rungs must each have their own hidden_size")
        for batch in self.batch_tokens:
            if batch % self.sequence_length:
                raise ValueError(
                    f"batch_tokens must be multiples of sequence_length ({self.sequence_length}), got {batch}"
                )
        return self


class TrialSpec(StrictModel):
    """Everything that decides what one trial measures, but for the corpus."""

    model: ModelConfig = Field(description="Architecture")
    model_flops_per_token: float = Field(gt=0, description="M: training FLOPs per token without embedding and logits")
    optimizer: OptimizerSettings = Field(description="AdamW; its learning rate is the one after warm-up")
    expert_bias_update_rate: float = Field(ge=0, description="Change of an expert's bias per step")
    batch_tokens: int = Field(gt=0, description="Tokens per step")
    sequence_length: int = Field(gt=0, description="Tokens per sequence")
    reading_steps: tuple[int, ...] = Field(
        min_length=1, description="Steps after which the loss is read; the last ends the trial"
    )
    warmup_steps: int = Field(ge=0, description="Steps of linear warm-up")
    validation_tokens: int = Field(gt=0, description="Validation tokens of one reading, per source")
    mixture: dict[str, float] = Field(description="Share of each corpus source in a batch")
    seed: int = Field(description="Seed of initial weights and data order, the same for all trials")

    @property
    def name(self) -> str:
        return f"h{self.model.hidden_size}_lr{self.optimizer.learning_rate:.4g}_b{self.batch_tokens}"

    @property
    def steps(self) -> int:
        return self.reading_steps[-1]

    @property
    def compute_flops(self) -> float:
        return self.model_flops_per_token * self.steps * self.batch_tokens

    def fingerprint(self, corpus_fingerprint: str) -> str:
        """Identity of the trial's result: of this spec and of the corpus it is run on."""
        identity = canonical_json({"trial": identity_of(self), "corpus": corpus_fingerprint})
        return hashlib.sha256(identity.encode()).hexdigest()[:16]


class Reading(StrictModel):
    """Validation loss at one point of a trial."""

    step: int = Field(description="Optimizer steps done")
    tokens: int = Field(description="Tokens trained on")
    compute_flops: float = Field(description="Training FLOPs spent")
    loss: float | None = Field(
        gt=0, description="Mixture-weighted validation loss, nats per token; none: not a finite number"
    )


class TrialResult(StrictModel):
    """Record of a finished trial: `trials/<fingerprint>.json`."""

    name: str = Field(description="Size, learning rate and batch")
    fingerprint: str = Field(description="Identity of spec and corpus")
    hidden_size: int = Field(description="Width of the model, elements")
    active_parameters: int = Field(description="Parameters one token uses, without embeddings")
    model_flops_per_token: float = Field(description="M: training FLOPs per token without embedding and logits")
    learning_rate: float = Field(description="Learning rate after warm-up")
    batch_tokens: int = Field(description="Tokens per step")
    readings: tuple[Reading, ...] = Field(min_length=1, description="Loss along the run, in order")
    seconds: float = Field(description="Time the trial took, seconds")

    @property
    def loss(self) -> float | None:
        """Validation loss at the end; none if the trial diverged."""
        return self.readings[-1].loss

    @property
    def compute_flops(self) -> float:
        return self.readings[-1].compute_flops

    def save(self, directory: Path) -> None:
        """Write `<directory>/<fingerprint>.json`, whole or not at all."""
        path = directory / f"{self.fingerprint}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(self.model_dump_json(indent=2) + "\n")
        partial.replace(path)


class Sweep(StrictModel):
    """The artifact `trials.json`: every trial of a finished sweep."""

    trials: tuple[TrialResult, ...] = Field(description="Finished trials, in the order of the design")

    def save(self, directory: Path) -> None:
        """Write `trials.json` into the existing `directory`."""
        (directory / TRIALS_FILE).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Sweep:
        """Read `trials.json` from `directory`.

        Raises:
            UserError: the file is missing or is not a sweep; the line names the file.
        """
        path = Path(directory) / TRIALS_FILE
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: no readable trials there ({error.__class__.__name__})") from None
        return parse(cls, text, str(path))


def finished_trial(directory: Path, fingerprint: str) -> TrialResult | None:
    """The trial that an earlier, killed sweep left in `directory`; none if nothing readable, so it is run again."""
    path = directory / f"{fingerprint}.json"
    try:
        result = parse(TrialResult, path.read_text(), str(path))
    except (OSError, UnicodeDecodeError, UserError):
        return None
    return result if result.fingerprint == fingerprint else None


def scaled_model(base: ModelConfig, hidden_size: int) -> ModelConfig:
    """`base` at another width: feed-forwards and query heads follow; layers, experts, head width, key-value heads stay.

    The MTP layer is left out: neither C nor the loss that is read counts it, and it would cost a third of the sweep.

    Raises:
        UserError: the width does not give whole heads.
    """
    ratio = hidden_size / base.hidden_size
    heads, rest = divmod(base.num_attention_heads * hidden_size, base.hidden_size)
    if rest or not heads or heads % base.num_key_value_heads:
        per_group = base.hidden_size * base.num_key_value_heads
        unit = per_group // math.gcd(base.num_attention_heads, per_group)
        raise UserError(
            f"design.rungs.hidden_size: {hidden_size} gives no whole number of query heads per key-value head; "
            f"use a multiple of {unit}"
        )

    def scaled(width: int) -> int:
        return max(round(width * ratio / WIDTH_MULTIPLE), 1) * WIDTH_MULTIPLE

    return ModelConfig.model_validate(
        {
            **base.model_dump(),
            "num_nextn_predict_layers": 0,
            "hidden_size": hidden_size,
            "num_attention_heads": heads,
            "intermediate_size": scaled(base.intermediate_size),
            "moe_intermediate_size": scaled(base.moe_intermediate_size),
        }
    )


def plan_trials(
    base: ModelConfig,
    design: SweepDesign,
    optimizer: OptimizerSettings,
    expert_bias_update_rate: float,
    mixture: dict[str, float],
    seed: int,
) -> list[TrialSpec]:
    """The trials of `design` for the family of `base`, largest first (so that parallel workers end together).

    Args:
        optimizer: of every trial, but for the learning rate.

    Raises:
        UserError: a width that does not fit `base`, a budget of less than one step per reading, or a warm-up that is
            longer than a trial's first part.
    """
    trials = []
    for index, rung in enumerate(design.rungs):
        model = scaled_model(base, rung.hidden_size)
        flops = float(training_flops_per_token(model, design.sequence_length).non_embedding)
        for row, learning_rate in enumerate(design.learning_rates):
            for column, batch in enumerate(design.batch_tokens):
                if (row + column + index) % 2:
                    continue
                steps = rung.compute_flops / flops / batch
                reading_steps = tuple(round(steps * fraction) for fraction in design.read_at)
                if reading_steps[0] < 1 or len(set(reading_steps)) < len(reading_steps):
                    raise UserError(
                        f"design.rungs.{index}.compute_flops: {rung.compute_flops:.3g} are {steps:.1f} steps "
                        f"of {batch} tokens, too few for {len(reading_steps)} readings"
                    )
                warmup_steps = round(design.warmup_tokens / batch)
                if warmup_steps > reading_steps[0]:
                    raise UserError(
                        f"design.warmup_tokens: {design.warmup_tokens:,} are {warmup_steps} steps of {batch} tokens, "
                        f"but rung {index} is read after {reading_steps[0]}; the learning rate must be reached before"
                    )
                trials.append(
                    TrialSpec(
                        model=model,
                        model_flops_per_token=flops,
                        optimizer=optimizer.model_copy(update={"learning_rate": learning_rate}),
                        expert_bias_update_rate=expert_bias_update_rate,
                        batch_tokens=batch,
                        sequence_length=design.sequence_length,
                        reading_steps=reading_steps,
                        warmup_steps=warmup_steps,
                        validation_tokens=design.validation_tokens,
                        mixture=mixture,
                        seed=seed,
                    )
                )
    return sorted(trials, key=lambda trial: -trial.steps * trial.batch_tokens * trial.model_flops_per_token)
