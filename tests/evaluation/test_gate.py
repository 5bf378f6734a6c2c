import math

import pytest
from pydantic import ValidationError

from ling_flow.errors import UserError
from ling_flow.evaluation.gate import Gate, judge


@pytest.mark.parametrize(
    ("comparison", "value", "passed"),
    [(">=", 0.5, True), (">", 0.5, False), ("<=", 0.5, True), ("<", 0.5, False), (">=", 0.49, False), ("<", 0.4, True)],
)
def test_threshold(comparison: str, value: float, passed: bool) -> None:
    gate = Gate(metric="m", comparison=comparison, threshold=0.5)
    (verdict,) = judge([gate], {"m": value})
    assert verdict.passed is passed
    assert verdict.sentence.startswith("passed: m is" if passed else "failed: m is")


def test_must_beat_the_champion_in_the_direction_of_the_comparison() -> None:
    accuracy = Gate(metric="accuracy", comparison=">=", threshold=0.1, min_change=0.05)
    loss = Gate(metric="loss", comparison="<=", threshold=9.0, min_change=0.05)
    champion = {"accuracy": 0.5, "loss": 2.0}
    better = judge([accuracy, loss], {"accuracy": 0.56, "loss": 1.9}, champion)
    worse = judge([accuracy, loss], {"accuracy": 0.54, "loss": 2.1}, champion)
    assert [verdict.passed for verdict in better] == [True, True]
    assert [verdict.passed for verdict in worse] == [False, False]
    assert worse[1].champion == 2.0
    assert "-0.1 better than the champion's 2" in worse[1].sentence


def test_negative_min_change_tolerates_a_small_loss() -> None:
    gate = Gate(metric="m", threshold=0.0, min_change=-0.02)
    assert judge([gate], {"m": 0.49}, {"m": 0.5})[0].passed
    assert not judge([gate], {"m": 0.47}, {"m": 0.5})[0].passed
    exactly = Gate(metric="m", threshold=0.5, min_change=-0.1)
    assert judge([exactly], {"m": 0.7}, {"m": 0.8})[0].passed  # 0.7 - 0.8 < -0.1 in binary


def test_no_champion_yet_asks_no_change() -> None:
    gate = Gate(metric="m", threshold=0.1, min_change=0.5)
    assert judge([gate], {"m": 0.2})[0].passed
    assert judge([gate], {"m": 0.2}, {"another": 1.0})[0].passed


def test_a_comparison_that_cannot_be_made_is_told() -> None:
    gate = Gate(metric="m", threshold=0.1, min_change=0.5)
    for champion, why in (
        ({"another": 1.0}, "its evaluation reports no m"),
        ({"m": math.nan}, "its m is nan, not a finite number"),
    ):
        (verdict,) = judge([gate], {"m": 0.2}, champion)
        assert (verdict.passed, verdict.champion) == (True, None)
        assert verdict.sentence == f"passed: m is 0.2, asked >= 0.1; not compared with the champion: {why}"
    assert "champion" not in judge([Gate(metric="m", threshold=0.1)], {"m": 0.2}, {})[0].sentence
    assert "champion" not in judge([gate], {"m": 0.2})[0].sentence


def test_a_comparison_with_another_evaluation_is_made_and_told() -> None:
    (verdict,) = judge(
        [Gate(metric="m", threshold=0.1, min_change=-0.1)], {"m": 0.2}, {"m": 0.9}, "which was asked less"
    )
    assert (verdict.passed, verdict.champion) == (False, 0.9)
    assert verdict.sentence.endswith("-0.7 better than the champion's 0.9, asked at least -0.1 (which was asked less)")


def test_a_metric_that_is_not_finite_fails() -> None:
    (verdict,) = judge([Gate(metric="m", comparison="<=", threshold=1.0)], {"m": math.nan})
    assert not verdict.passed
    assert verdict.value is None


def test_unknown_metric_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"gates\.1\.metric: no metric 'exact'; the evaluation reports exact_match"):
        judge([Gate(metric="exact_match", threshold=0), Gate(metric="exact", threshold=0)], {"exact_match": 1.0})


def test_unknown_comparison_is_refused() -> None:
    with pytest.raises(ValidationError):
        Gate(metric="m", comparison="==", threshold=0)
