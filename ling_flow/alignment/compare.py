"""Compare two policies by the reward of their answers to the same held-out questions.

The length reward ranks the samples of one group, so it says nothing across groups: a policy whose answers are all
equally long would look brief. Both policies' answers to a question are therefore scored as one group: the same
shortest and longest length, the same difficulty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from ling_flow.alignment.rewards import RewardSettings, evo_cot_rewards
from ling_flow.alignment.rollouts import outcome
from ling_flow.evaluation.tasks import Answer


@dataclass(frozen=True)
class Comparison:
    """Mean rewards per answer; the standard error is that of their difference, paired by prompt, over problems: the
    prompts of one problem, with thinking and without, are no independent readings."""

    before: float
    after: float
    standard_error: float

    @property
    def gain(self) -> float:
        """How much better `after` is."""
        return self.after - self.before


def compare(
    before: Sequence[Sequence[Answer]], after: Sequence[Sequence[Answer]], settings: RewardSettings
) -> Comparison:
    """Score two policies' answers to the same prompts: one inner sequence per prompt, in the same order."""
    means = []
    gains: dict[str, list[float]] = {}
    for old, new in zip(before, after, strict=True):
        totals = [reward.total for reward in evo_cot_rewards([outcome(answer) for answer in (*old, *new)], settings)]
        means.append((sum(totals[: len(old)]) / len(old), sum(totals[len(old) :]) / len(new)))
        gains.setdefault(old[0].question.problem.question, []).append(means[-1][1] - means[-1][0])
    mean_before, mean_after = (fmean(side) for side in zip(*means, strict=True))
    error = stdev(map(fmean, gains.values())) / len(gains) ** 0.5
    return Comparison(before=mean_before, after=mean_after, standard_error=error)
