import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_flow.training.interval import SaveClock, best_interval, expected_loss
from ling_flow.training.retention import Retention, kept
from ling_flow.training.settings import number_at
from tests.training.micro import stage_settings


def test_as_many_checkpoints_as_asked_for_evenly_spaced_and_the_last_at_the_end():
    numbers = {done: stage_settings(steps=7, checkpoints_saved=2).save_number(done) for done in range(1, 8)}
    assert {done: number for done, number in numbers.items() if number} == {4: 1, 7: 2}
    assert [stage_settings(steps=3, checkpoints_saved=8).save_number(done) for done in (1, 2, 3)] == [1, 2, 3]


@given(steps=st.integers(1, 3000), count=st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_points_are_whole_steps_nearest_to_even(steps, count):
    found = {done: number for done in range(steps + 1) if (number := number_at(done, steps, count)) is not None}
    count = min(count, steps)
    assert list(found.values()) == list(range(1, count + 1))
    assert max(found) == steps
    assert all(abs(done - number * steps / count) <= 0.5 for done, number in found.items())


PLAN = {10: 1, 20: 2, 30: 3, 40: 4, 50: 5, 60: 6}


@pytest.mark.parametrize(
    ("saved", "retention", "checkpoints", "training_states"),
    [
        (PLAN, Retention(window=3), {40, 50, 60}, {50, 60}),
        (PLAN, Retention(window=1), {50, 60}, {50, 60}),  # one to fall back on, though the merge wants it not
        (PLAN, Retention(window=1, resume=1), {60}, {60}),
        (PLAN, Retention(window=1, resume=1, every=2), {20, 40, 60}, {60}),
        (PLAN, Retention(window=2, resume=4), {30, 40, 50, 60}, {30, 40, 50, 60}),
        (PLAN, Retention(window=100), set(PLAN), {50, 60}),
        ({}, Retention(window=2), set(), set()),
        # Beside the plan: the newest two to resume from; the planned ones stay, the newest two with training state.
        (PLAN | {61: None, 64: None, 67: None}, Retention(window=3), {40, 50, 60, 64, 67}, {50, 60, 64, 67}),
        (PLAN | {47: None, 57: None}, Retention(window=3), {40, 50, 60, 57}, {50, 57, 60}),
    ],
)
def test_which_checkpoints_stay(saved, retention, checkpoints, training_states):
    assert kept(saved, retention) == (checkpoints, training_states)


def test_a_finished_stage_keeps_what_the_plan_says_and_one_training_state():
    saved = PLAN | {47: None, 57: None}
    assert kept(saved, Retention(window=2, every=3), finished=True) == ({30, 50, 60}, {60})


def test_the_best_interval_is_the_published_one():
    assert best_interval(0.8 * 60, failures_per_day=1) == pytest.approx(48 * 60)  # Ling 2.0, appendix A
    assert best_interval(1.6 * 60, failures_per_day=2) == pytest.approx(48 * 60)
    assert best_interval(3.0, failures_per_day=24) == pytest.approx(60 * math.sqrt(2880 * 0.05 / 24))


@pytest.mark.parametrize(("cost", "failures"), [(48, 1), (0.2, 300), (30, 0.1)])
def test_no_other_interval_loses_less(cost, failures):
    best = best_interval(cost, failures)
    least = expected_loss(best, cost, failures)
    assert least < min(expected_loss(best * factor, cost, failures) for factor in (0.5, 0.9, 1.1, 2))
    assert expected_loss(best / 2, cost, failures) == pytest.approx(1.25 * least)  # (½ + 2) / 2
    assert expected_loss(best, cost, failures, restart_seconds=20) == pytest.approx(least + 20 * failures)


def clock_of(now: list[float]) -> SaveClock:
    """A clock at `now[0]` that has seen steps of a second."""
    clock = SaveClock(24, clock=lambda: now[0])
    for _ in range(5):
        clock.stepped(1.0, writing=False)
    return clock


def test_the_clock_asks_for_one_save_to_know_its_cost_and_then_at_the_best_interval():
    now = [0.0]
    clock = clock_of(now)
    assert clock.due()
    clock.saved()
    now[0] = 10_000.0
    assert not clock.due()  # still being written
    clock.measured(stall_seconds=3.0, seconds=5.0)
    assert clock.due()
    clock.saved()
    now[0] += best_interval(3.0, 24) - 1
    assert not clock.due()
    now[0] += 2
    assert clock.due()
    clock.measured(stall_seconds=3.0, seconds=10_000.0)
    assert not clock.due()  # not more often than can be written
    now[0] += 10_000
    assert clock.due()


def test_steps_made_slower_by_writing_are_part_of_the_cost():
    clock = clock_of([0.0])
    clock.saved()
    for _ in range(4):
        clock.stepped(1.5, writing=True)
    clock.measured(stall_seconds=0.25, seconds=6.0)
    assert clock.cost == pytest.approx(0.25 + 4 * 0.5)
    clock.saved()
    clock.stepped(0.9, writing=True)
    clock.measured(stall_seconds=0.25, seconds=6.0)
    assert clock.cost == pytest.approx(0.25)  # of the last save, and writing makes nothing faster


def test_a_cost_is_not_known_before_some_steps_beside_which_nothing_was_written():
    clock = SaveClock(24, clock=lambda: 1e9)
    clock.stepped(9.0, writing=False)  # the first, slow for other reasons
    clock.saved()
    clock.stepped(1.5, writing=True)
    clock.measured(stall_seconds=0.25, seconds=6.0)
    for _ in range(2):
        assert clock.cost is None and not clock.due()
        clock.stepped(1.0, writing=False)
    assert clock.cost == pytest.approx(0.75)


def test_without_a_rate_of_failures_nothing_is_saved_beside_the_plan():
    clock = SaveClock(None)
    assert not clock.due()
    clock.saved()
    clock.measured(stall_seconds=1e-9, seconds=0)
    assert not clock.due()
