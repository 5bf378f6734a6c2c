"""What keeps one bad batch from spoiling a run: spikes of loss and gradient are not trained on (Ling 2.0 §5.3.5).

A step is a spike where its loss or its gradient's norm is not finite, or exceeds its running mean by `factor` running
standard deviations. It is skipped. Several in a row, or many of the last, are no accident of one batch: the run rolls
back to its last good checkpoint, and passes over the batches that it met since.
"""

from __future__ import annotations

import math

from pydantic import Field

from ling_flow.config import StrictModel


class GuardSettings(StrictModel):
    """When a step is not taken, and how much of that a run bears."""

    factor: float | None = Field(
        6.0, gt=0, description="standard deviations above the running mean; null: only values that are not finite"
    )
    history: int = Field(100, ge=2, description="steps of the running mean, and the least before it counts")
    skips_in_a_row: int = Field(5, ge=1, description="skipped steps after which the run rolls back")
    skipped_share: float = Field(
        0.25, gt=0, le=1, description="share of the last `history` steps that were skipped, above which it rolls back"
    )
    rollbacks: int = Field(2, ge=0, description="rollbacks in a stage after which it ends with an error")


class Running(StrictModel):
    """Exponential mean and variance of accepted values."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def updated(self, value: float, history: int) -> Running:
        """After one more value; a plain mean until `history` values are in."""
        weight = 1 / min(self.count + 1, history)
        difference = value - self.mean
        return Running(
            count=self.count + 1,
            mean=self.mean + weight * difference,
            variance=(1 - weight) * (self.variance + weight * difference * difference),
        )

    def exceeded_by(self, value: float, factor: float) -> bool:
        return value > self.mean + factor * math.sqrt(self.variance)


class GuardState(StrictModel):
    """All that the guard remembers; part of the training state."""

    loss: Running = Running()
    gradient_norm: Running = Running()
    skipped_in_a_row: int = 0
    skipped_share: float = Field(0.0, description="exponential mean over `history` steps of which were skipped")
    rollbacks: int = 0
    batches_passed: int = Field(0, description="batches that rollbacks have passed over")


class SpikeGuard:
    """Judges steps."""

    def __init__(self, settings: GuardSettings, state: GuardState | None = None) -> None:
        self.settings, self.state = settings, state or GuardState()

    def takes(self, loss: float, gradient_norm: float) -> bool:
        """Whether to make the update; remembers the answer."""
        state, settings = self.state, self.settings
        good = math.isfinite(loss) and math.isfinite(gradient_norm)
        if good and settings.factor is not None and state.loss.count >= settings.history:
            good = not (
                state.loss.exceeded_by(loss, settings.factor)
                or state.gradient_norm.exceeded_by(gradient_norm, settings.factor)
            )
        share = state.skipped_share + ((not good) - state.skipped_share) / settings.history
        if good:
            self._set(
                loss=state.loss.updated(loss, settings.history),
                gradient_norm=state.gradient_norm.updated(gradient_norm, settings.history),
                skipped_in_a_row=0,
                skipped_share=share,
            )
        else:
            self._set(skipped_in_a_row=state.skipped_in_a_row + 1, skipped_share=share)
        return good

    @property
    def exhausted(self) -> bool:
        """So many steps were skipped that the weights themselves are in doubt."""
        state, settings = self.state, self.settings
        return state.skipped_in_a_row >= settings.skips_in_a_row or state.skipped_share > settings.skipped_share

    @property
    def skipped(self) -> str:
        """How many, in words."""
        if self.state.skipped_in_a_row >= self.settings.skips_in_a_row:
            return f"for {self.state.skipped_in_a_row} steps in a row"
        return f"in {self.state.skipped_share:.0%} of the last {self.settings.history} steps"

    @property
    def may_roll_back(self) -> bool:
        return self.state.rollbacks < self.settings.rollbacks

    def rolled_back(self, before: GuardState, batches: int) -> None:
        """Take up the state of the checkpoint gone back to, `batches` steps ago, whose batches are now passed over."""
        passed = self.state.batches_passed + batches
        self.state = before.model_copy(
            update={"skipped_in_a_row": 0, "rollbacks": self.state.rollbacks + 1, "batches_passed": passed}
        )

    def _set(self, **changes: object) -> None:
        self.state = self.state.model_copy(update=changes)
