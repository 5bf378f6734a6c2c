import pytest
from pydantic import ValidationError

from ling_flow.alignment.rewards import LengthWeight, Outcome, RewardSettings, evo_cot_rewards

SETTINGS = RewardSettings()


def outcome(correct: bool, length: int, obeyed: bool = True) -> Outcome:
    return Outcome(correct=correct, obeyed=obeyed, length=length)


def test_formula_by_hand() -> None:
    # Pass rate 1/2: α = 0.3. Lengths 10…30: p = 0.5, 0, −0.5, 0.5.
    group = [outcome(True, 10), outcome(True, 20), outcome(False, 30), outcome(False, 10)]
    rewards = evo_cot_rewards(group, SETTINGS)
    assert [reward.length for reward in rewards] == pytest.approx([0.15, 0.0, -0.15, 0.0], abs=1e-6)
    assert [reward.total for reward in rewards] == pytest.approx([1.15, 1.0, -0.15, 0.0], abs=1e-6)


def test_brevity_matters_more_for_easy_problems() -> None:
    easy = evo_cot_rewards([outcome(True, 10), outcome(True, 30)], SETTINGS)
    hard = evo_cot_rewards([outcome(True, 10), outcome(True, 30), *[outcome(False, 20)] * 14], SETTINGS)
    assert easy[0].length - easy[1].length == pytest.approx(0.5, abs=1e-6)
    assert hard[0].length - hard[1].length == pytest.approx(0.05, abs=1e-6)


def test_short_wrong_answer_earns_nothing() -> None:
    short, long = evo_cot_rewards([outcome(False, 2), outcome(False, 40)], SETTINGS)
    assert short.total == 0.0
    assert long.total < 0.0


def test_disagreeing_with_the_mode_costs_half_a_point() -> None:
    obeyed, disobeyed = evo_cot_rewards([outcome(True, 5), outcome(True, 5, obeyed=False)], SETTINGS)
    assert obeyed.total - disobeyed.total == pytest.approx(0.5)


def test_equal_lengths_do_not_divide_by_zero() -> None:
    rewards = evo_cot_rewards([outcome(True, 7), outcome(True, 7)], SETTINGS)
    assert [reward.length for reward in rewards] == [0.25, 0.25]


@pytest.mark.parametrize("rates", [(), (0.5,), (0.0, 0.5), (0.5, 0.5, 0.0)])
def test_buckets_must_cover_all_pass_rates(rates: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="length_weights must fall"):
        RewardSettings(length_weights=tuple(LengthWeight(pass_rate_from=rate, weight=0.1) for rate in rates))
