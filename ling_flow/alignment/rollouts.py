"""Rollouts: groups of sampled answers to one question, with their rewards, cut into minibatches to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ling_flow.alignment.lpo import LpoResponse, group_advantages, sentence_of_token, token_pieces
from ling_flow.alignment.rewards import Outcome, Reward, RewardSettings, evo_cot_rewards
from ling_flow.data.tokenizer import Tokenizer
from ling_flow.evaluation.tasks import Answer, Question, ask
from ling_flow.model.transformer import BailingMoeV2ForCausalLM


@dataclass(frozen=True)
class Group:
    """Answers of one policy to one question, and what they are worth."""

    answers: list[Answer]
    rewards: list[Reward]


def outcome(answer: Answer) -> Outcome:
    """What the reward looks at. An answer that never stopped is as long as it was let."""
    return Outcome(correct=answer.grade.correct, obeyed=answer.grade.obeyed, length=len(answer.tokens))


def sample_groups(
    model: BailingMoeV2ForCausalLM,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    group_size: int,
    rewards: RewardSettings,
    *,
    max_new_tokens: int,
    seed: int,
    sequences_per_batch: int,
) -> list[Group]:
    """`group_size` answers to each question, at temperature 1: sampled from the policy that gave their logprobs."""
    repeated = [question for question in questions for _ in range(group_size)]
    answers = ask(
        model,
        tokenizer,
        repeated,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        seed=seed,
        sequences_per_batch=sequences_per_batch,
    )
    groups = [answers[first : first + group_size] for first in range(0, len(answers), group_size)]
    return [Group(group, evo_cot_rewards([outcome(answer) for answer in group], rewards)) for group in groups]


def minibatches(groups: Sequence[Group], tokenizer: Tokenizer, groups_per_minibatch: int) -> list[list[LpoResponse]]:
    """Whole groups in their order, at most `groups_per_minibatch` at a time.

    Groups that teach nothing are dropped first: those whose rewards are all the same, and those that differ in
    length alone while nothing is right. Advantages are standardised, so the latter would teach brevity, and nothing
    else, at full force.
    """
    taught = [
        (group, advantages)
        for group in groups
        if (any(reward.correct for reward in group.rewards) or len({reward.format for reward in group.rewards}) > 1)
        and (advantages := group_advantages([reward.total for reward in group.rewards])) is not None
    ]
    # As equal as can be: a small rest would be the noisiest step of all.
    count = -(-len(taught) // groups_per_minibatch)
    cut = [taught[len(taught) * part // count : len(taught) * (part + 1) // count] for part in range(count)]
    return [
        [
            LpoResponse(
                prompt=answer.prompt,
                tokens=answer.tokens,
                logprobs=answer.logprobs,
                sentences=sentence_of_token(token_pieces(tokenizer.decode, answer.tokens)),
                advantage=advantage,
                weight=1 / (len(part) * sum(len(other.tokens) for other in group.answers)),
            )
            for group, advantages in part
            for answer, advantage in zip(group.answers, advantages, strict=True)
        ]
        for part in cut
    ]
