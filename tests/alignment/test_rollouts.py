import itertools
from dataclasses import replace

import pytest
import torch

from ling_flow.alignment.compare import compare
from ling_flow.alignment.lpo import collate, lpo_loss
from ling_flow.alignment.policy import _rate_factor, align, response_logprobs
from ling_flow.alignment.rewards import Reward, RewardSettings
from ling_flow.alignment.rollouts import Group, minibatches, sample_groups
from ling_flow.alignment.settings import LpoSettings
from ling_flow.evaluation.graders import Grade
from ling_flow.evaluation.tasks import Answer, Question
from tests.alignment.micro import easy_problems, model, tokenizer

SETTINGS = LpoSettings(
    rollouts=2, questions_per_rollout=4, group_size=4, groups_per_minibatch=2, learning_rate=1e-3, max_new_tokens=12
)


def answer(length: int, correct: bool = False, obeyed: bool = True, problem: int = 0) -> Answer:
    return Answer(
        question=Question(easy_problems(problem + 1)[problem], thinking=False),
        prompt=[1, 2],
        tokens=[3] * length,
        logprobs=[-1.0] * length,
        text="",
        finished=True,
        grade=Grade(correct=correct, obeyed=obeyed, well_formed=correct, answer=""),
    )


def groups(network):
    questions = [Question(problem, thinking=index % 2 == 0) for index, problem in enumerate(easy_problems(4))]
    return sample_groups(
        network, tokenizer(), questions, 4, RewardSettings(), max_new_tokens=12, seed=3, sequences_per_batch=8
    )


def test_groups_hold_one_question_each_and_repeat_with_the_seed() -> None:
    network = model()
    first, second = groups(network), groups(network)
    assert [len(group.answers) for group in first] == [4] * 4
    assert all(item.question is group.answers[0].question for group in first for item in group.answers)
    assert [item.tokens for group in first for item in group.answers] == [
        item.tokens for group in second for item in group.answers
    ]
    assert len({tuple(item.tokens) for item in first[0].answers}) > 1


def test_the_engines_logprobs_are_those_of_the_network_that_learns() -> None:
    network = model()
    parts = minibatches([_with_rewards(group.answers) for group in groups(network)], tokenizer(), 4)
    batch = collate(parts[0])
    logprob_BR = response_logprobs(network, batch)
    assert torch.allclose(logprob_BR, batch.old_logprob_BR, atol=1e-4)
    assert lpo_loss(logprob_BR, batch, clip=0.03).drift < 1e-4


def _with_rewards(answers: list[Answer]) -> Group:
    """Rewards as if the first answer were right."""
    return Group(answers, [Reward(float(index == 0), 0.0, 0.0) for index in range(len(answers))])


def test_minibatches_hold_whole_groups_that_teach() -> None:
    right = _with_rewards([answer(5, True), answer(7)])
    same = Group([answer(5), answer(5)], [Reward(0.0, 0.0, 0.0)] * 2)
    only_length = Group([answer(5), answer(9)], [Reward(0.0, 0.0, 0.0), Reward(0.0, -0.02, 0.0)])
    only_format = Group([answer(5), answer(9)], [Reward(0.0, 0.0, 0.0), Reward(0.0, 0.0, -0.5)])
    parts = minibatches([right, same, only_length, only_format, right], tokenizer(), 2)
    assert [[len(item.tokens) for item in part] for part in parts] == [[5, 7], [5, 9, 5, 7]]
    # 1 / (tokens of the group · groups of the minibatch)
    assert [item.weight for item in parts[1]] == pytest.approx([1 / 28, 1 / 28, 1 / 24, 1 / 24])
    assert [item.advantage for item in parts[1]] == pytest.approx([1, -1, 1, -1], abs=1e-4)
    assert minibatches([same, only_length], tokenizer(), 2) == []


def test_compare_scores_both_sides_in_one_group() -> None:
    # Equal lengths on each side: scored apart, both would look equally brief.
    before = [[answer(10, True, problem=problem)] * 2 for problem in range(2)]
    after = [[answer(4, True)] * 2, [answer(10, right, problem=1) for right in (True, False)]]
    found = compare(before, after, RewardSettings())
    # First prompt: 0.75 against 1.25. Second, pass rate 3/4, no spread in length: 1.25 against (1.25 + 0)/2.
    assert found.before == pytest.approx((0.75 + 1.25) / 2)
    assert found.after == pytest.approx((1.25 + 0.625) / 2)
    assert found.gain == pytest.approx(-0.0625)
    # Differences +0.5 and -0.625: standard deviation 0.7955, over √2.
    assert found.standard_error == pytest.approx(0.5625)
    # Both again, with thinking: no more problems, so no more certainty.
    twice = [
        [*side, *([replace(each, question=replace(each.question, thinking=True)) for each in group] for group in side)]
        for side in (before, after)
    ]
    assert compare(*twice, RewardSettings()) == found


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.1])
def test_align_is_deterministic_moves_the_ratios_and_leaves_the_bias_alone(kl_coefficient: float) -> None:
    def run():
        network = model()
        told: list[dict[str, float]] = []
        settings = SETTINGS.model_copy(update={"kl_coefficient": kl_coefficient})
        align(
            network, tokenizer(), easy_problems(8), settings, seed=1, on_rollout=lambda _, numbers: told.append(numbers)
        )
        return network, told

    (one, told), (other, told_again) = run(), run()
    before = model()
    assert told == told_again
    assert len(told) == 2
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, before.lm_head.weight)
    assert ("kl" in told[0]) == (kl_coefficient > 0)
    assert all(torch.equal(a.expert_bias, b.expert_bias) for a, b in zip(one.gates(), before.gates(), strict=True))
    assert all(int(gate.expert_counts.sum()) == 0 for gate in one.gates())


def test_aligning_a_format_raises_its_reward() -> None:
    # A model that writes at random: opening or closing a block where none was asked for costs half a point, so it
    # goes away.
    network = model()
    think = tokenizer().token_id("<think>")
    with torch.no_grad():
        network.lm_head.weight[think] = network.lm_head.weight.mean(0) + 0.02
    rewards: list[float] = []
    settings = SETTINGS.model_copy(update={"rollouts": 12, "questions_per_rollout": 16, "groups_per_minibatch": 4})
    align(
        network, tokenizer(), easy_problems(192), settings, seed=0, on_rollout=lambda _, n: rewards.append(n["reward"])
    )
    assert sum(rewards[-3:]) > sum(rewards[:3])


@pytest.mark.parametrize(("rollouts", "rising"), [(1, 1), (2, 1), (10, 1), (11, 2), (28, 3), (100, 10)])
def test_the_learning_rate_reaches_its_peak_and_falls(rollouts: int, rising: int) -> None:
    factors = [_rate_factor(rollout, rollouts) for rollout in range(rollouts)]
    assert factors[:rising] == [(index + 1) / rising for index in range(rising)]
    assert all(before > after > 0 for before, after in itertools.pairwise(factors[rising:]))
    assert max(factors) == 1
