"""Which checkpoints of a stage stay on disk. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pydantic import Field

from ling_flow.config import StrictModel


class Retention(StrictModel):
    """What stays. Planned checkpoints are the evenly spaced ones; all others only shorten what a failure costs."""

    window: int = Field(gt=0, description="newest planned checkpoints, which a merge takes")
    every: int = Field(0, ge=0, description="every n-th planned checkpoint, counted from the first, stays too; 0: none")
    resume: int = Field(
        2, gt=0, description="newest checkpoints, and newest planned ones, with training state while the stage runs"
    )


class Kept(NamedTuple):
    """Steps whose checkpoint stays, and those of them whose training state does."""

    checkpoints: set[int]
    training_states: set[int]


def kept(saved: Mapping[int, int | None], retention: Retention, finished: bool = False) -> Kept:
    """What stays of the checkpoints there are.

    Args:
        saved: step → its number in the plan (1, 2, …), or None for one that was saved beside it.
        finished: the stage is through: only the newest can be gone on from, and what was beside the plan goes.
    """
    steps = sorted(saved)
    planned = [step for step in steps if saved[step] is not None]
    # A rollback goes to a planned checkpoint, so that its bits do not depend on when another was saved.
    resumable = {*steps[-retention.resume :], *planned[-retention.resume :]}
    training_states = set(steps[-1:]) if finished else resumable
    milestones = {step for step in planned if retention.every and (saved[step] or 0) % retention.every == 0}
    return Kept(training_states | milestones | {*planned[-retention.window :]}, training_states)
