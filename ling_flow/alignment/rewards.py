"""Evo-CoT reward (Ling 2.0 §4): correctness + length, by how hard the problem is + format.

    R = R_correct + R_length + R_format
    p(l) = 0.5 − (l − l_min) / (l_max − l_min + 1e-9)     over the group of samples of one problem
    R_length = α · (p if correct else min(p, 0))
    R_format = −penalty where the <think> block disagrees with the mode that was asked for

Unpublished, and ours: α by buckets of the group's pass rate, from 0.5 (easy) to 0.05 (hard); only the direction is
published. The paper aligns the instant mode alone, where a <think> block costs 0.5; with thinking asked for, a
missing or broken block costs the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Self

from pydantic import Field, model_validator

from ling_flow.config import StrictModel


class LengthWeight(StrictModel):
    """One bucket of difficulty."""

    pass_rate_from: float = Field(ge=0, le=1, description="least share of correct samples in the group for this bucket")
    weight: float = Field(ge=0, description="α, the weight of the length reward in this bucket")


class RewardSettings(StrictModel):
    """Weights of the Evo-CoT reward. A correct answer counts 1."""

    length_weights: tuple[LengthWeight, ...] = Field(
        default=(
            LengthWeight(pass_rate_from=0.75, weight=0.5),
            LengthWeight(pass_rate_from=0.5, weight=0.3),
            LengthWeight(pass_rate_from=0.25, weight=0.15),
            LengthWeight(pass_rate_from=0.0, weight=0.05),
        ),
        description="α by the group's pass rate, easiest bucket first, last one from 0",
    )
    format_penalty: float = Field(
        default=0.5, ge=0, description="taken off where the <think> block disagrees with the mode asked for"
    )

    @model_validator(mode="after")
    def _buckets_cover_all_rates(self) -> Self:
        rates = [bucket.pass_rate_from for bucket in self.length_weights]
        if not rates or rates[-1] != 0 or any(low >= high for high, low in pairwise(rates)):
            raise ValueError("length_weights must fall in pass_rate_from and end at 0")
        return self

    def length_weight(self, pass_rate: float) -> float:
        """α of the bucket that `pass_rate` (0…1) falls into."""
        return next(bucket.weight for bucket in self.length_weights if pass_rate >= bucket.pass_rate_from)


class Outcome(NamedTuple):
    """What the reward looks at in one sample."""

    correct: bool
    obeyed: bool
    length: int  # tokens of the response, stop token included


class Reward(NamedTuple):
    """The parts of one sample's reward."""

    correct: float
    length: float
    format: float

    @property
    def total(self) -> float:
        """The reward itself."""
        return self.correct + self.length + self.format


def evo_cot_rewards(group: Sequence[Outcome], settings: RewardSettings) -> list[Reward]:
    """Rewards of one problem's samples, in order.

    The length reward is relative to the group, so rewards of different groups are comparable only where the groups
    were formed alike: to compare two models, score their samples of one problem as one group.
    """
    lengths = [outcome.length for outcome in group]
    shortest, span = min(lengths), max(lengths) - min(lengths) + 1e-9
    weight = settings.length_weight(sum(outcome.correct for outcome in group) / len(group))
    rewards = []
    for outcome in group:
        brevity = 0.5 - (outcome.length - shortest) / span
        rewards.append(
            Reward(
                correct=float(outcome.correct),
                length=weight * (brevity if outcome.correct else min(brevity, 0.0)),
                format=0.0 if outcome.obeyed else -settings.format_penalty,
            )
        )
    return rewards
