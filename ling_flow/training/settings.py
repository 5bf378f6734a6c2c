"""What a training run is told: optimizer, one stage, and the record a stage leaves behind. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ling_flow.config import StrictModel, parse
from ling_flow.data.drawn import Drawn
from ling_flow.errors import UserError
from ling_flow.model.config import RouterLoss
from ling_flow.training.guard import GuardSettings, GuardState
from ling_flow.training.retention import Retention

INDEX_FILE = "checkpoints.json"

OptimizerKind = Literal["adamw", "adamw8bit", "muon"]

Precision = Literal["float32", "bfloat16", "fp8"]
"""Of activations and products in training. Weights, router, loss and optimizer are float32 in each."""


class OptimizerSettings(StrictModel):
    """AdamW as Ling 2.0 trains with it (§3.2); eps is that of Ling-1, since the report does not state it. With Muon,
    learning rate and weight decay are the same two numbers: its updates have about the size of AdamW's."""

    learning_rate: float = Field(gt=0, description="peak learning rate, per step")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of the first and second moment, per step")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of matrices, per unit of learning rate")
    gradient_clip: float = Field(1.0, gt=0, description="largest global L2 norm of the gradient")
    optimizer: OptimizerKind = Field(
        "adamw",
        description="adamw8bit keeps both moments of matrices in 8 bits, with a float32 scale per block of 256; muon "
        "orthogonalises the updates of hidden matrices and leaves embedding, head, router and vectors to AdamW",
    )

    @model_validator(mode="after")
    def _betas_in_range(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        return self


class FP8Settings(StrictModel):
    """The FP8 recipe's switches; without effect in another precision."""

    bfloat16_layers: tuple[int, ...] = Field(
        (), description="layers that stay in bfloat16, from 0; negative from the end, where the MTP layers are"
    )
    watch_every: int = Field(
        0,
        ge=0,
        description="steps between two passes in which every operation is compared with high precision; 0: none",
    )
    underflow_warning: float = Field(0.02, ge=0, le=1, description="share of elements that may become 0")
    cosine_warning: float = Field(0.99, ge=0, le=1, description="least cosine between high precision and FP8")


class BatchRamp(StrictModel):
    """Batches that grow linearly over the first steps of a stage (Ling 2.0 §3.2)."""

    sequences_at_start: int = Field(gt=0, description="sequences of the first step")
    steps: int = Field(gt=0, description="steps after which the batch has its full size")


class StageSettings(StrictModel):
    """One stage of a constant-rate run."""

    stage: str = Field(min_length=1, description="name of the stage")
    steps: int = Field(gt=0, description="optimizer steps of this stage")
    sequence_length: int = Field(gt=1, description="tokens per sequence")
    sequences_per_batch: int = Field(gt=0, description="sequences per optimizer step")
    batch_ramp: BatchRamp | None = Field(None, description="how the batch grows; null: full from the first step")
    sequences_per_forward: int = Field(
        gt=0, description="sequences per forward pass; the rest by gradient accumulation"
    )
    optimizer: OptimizerSettings = Field(description="how weights are updated")
    warmup_steps: int = Field(ge=0, description="steps of linear warm-up at the very start of the run")
    expert_bias_update_rate: float = Field(ge=0, description="change of an expert's bias per step")
    router_loss: RouterLoss = Field(RouterLoss(), description="optional losses on the routers")
    precision: Precision = Field("float32", description="of activations and products")
    fp8: FP8Settings = Field(FP8Settings(), description="switches of the FP8 recipe")
    guard: GuardSettings = Field(GuardSettings(), description="which steps are not taken")
    checkpoints_saved: int = Field(gt=0, description="checkpoints written, evenly spaced, the last at the end")
    retention: Retention = Field(description="which checkpoints stay")

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step, once the batch has its full size."""
        return self.sequence_length * self.sequences_per_batch

    def save_number(self, done: int) -> int | None:
        """Which planned checkpoint, from 1, comes after `done` steps of the stage; None: none. Number i comes after
        i/n of the steps, rounded; n is `checkpoints_saved`, or the steps where they are fewer."""
        return number_at(done, self.steps, self.checkpoints_saved)


def number_at(done: int, steps: int, count: int) -> int | None:
    """Which of `count` points that divide `steps` evenly, from 1 to the end, lies at `done`; None: none."""
    count = min(count, steps)
    number = (2 * done * count + steps) // (2 * steps)  # the nearest
    return number if number > 0 and (2 * number * steps + count) // (2 * count) == done else None


class TrainingState(StrictModel):
    """Where a run stands; with weights and moments, all it takes to go on as if never interrupted."""

    stage: str = Field(description="stage in which this was saved")
    step: int = Field(ge=0, description="optimizer steps done since the start of the run, over all stages")
    stage_start: int = Field(ge=0, description="value of `step` at which the stage began")
    tokens: int = Field(ge=0, description="tokens seen since the start of the run")
    tokens_before: int = Field(ge=0, description="value of `tokens` at which the stage began")
    drawn_before: dict[str, Drawn] = Field(description="what was through of each source when the stage began")
    drawn: dict[str, Drawn] = Field(description="what is through of each source so far, over all stages")
    tokens_at: dict[int, int] = Field({}, description="`tokens` at each planned checkpoint of this stage, by its step")
    skipped_steps: int = Field(ge=0, description="steps of this stage without an update: spikes of loss or gradient")
    seconds: float = Field(ge=0, description="time spent in this stage's steps, seconds")
    load_violation: float = Field(
        description="max/mean - 1 of the experts' token counts in the last step, mean of layers"
    )
    guard: GuardState = Field(GuardState(), description="what the guard against spikes remembers")
    settings: StageSettings = Field(description="what the stage was told")


class CheckpointEntry(StrictModel):
    """One checkpoint of a stage."""

    directory: str = Field(description="its directory, beside the index")
    step: int = Field(description="optimizer steps since the start of the run")
    tokens: int = Field(description="tokens since the start of the run")


class CheckpointIndex(StrictModel):
    """`checkpoints.json`: what a finished stage leaves to the next stage and to the merge."""

    schema_version: Literal[1] = 1
    stage: str = Field(description="name of the stage")
    latest: str = Field(description="directory of the newest checkpoint, the only one with training state")
    learning_rate: float = Field(description="constant learning rate of the stage")
    batch_tokens: int = Field(description="tokens per optimizer step")
    sequence_length: int = Field(description="tokens per sequence")
    mixture: dict[str, float] = Field(description="sampling weight of each source")
    checkpoints: list[CheckpointEntry] = Field(min_length=1, description="evenly spaced up to the latest, oldest first")
    milestones: list[CheckpointEntry] = Field([], description="earlier ones that were kept, oldest first")

    def save(self, directory: Path) -> None:
        """Write `checkpoints.json` into the existing `directory`."""
        (directory / INDEX_FILE).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> CheckpointIndex:
        """Read `checkpoints.json` of `directory`.

        Raises:
            UserError: the file is missing or wrong; the line names it.
        """
        path = directory / INDEX_FILE
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not the checkpoints of a stage ({error.__class__.__name__})") from None
        return parse(cls, text, str(path))
