"""Which source each sequence is drawn from."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_flow.data.mixture import LONGEST_PERIOD, Interleaving, interleave, mixture_periods
from ling_flow.errors import UserError

NAMES = ["code", "sums", "chat"]
WEIGHTS = st.fixed_dictionaries(
    {name: st.sampled_from([0.0, 0.1, 1 / 3, 0.37, 1.0, 2.5, 7.0]) for name in NAMES}
).filter(lambda mixture: sum(mixture.values()) > 0)


@settings(max_examples=60, deadline=None)
@given(mixture=WEIGHTS)
def test_every_prefix_is_within_one_sequence_of_the_mixture(mixture: dict[str, float]) -> None:
    pattern = Interleaving(mixture)
    drawn: Counter[str] = Counter()
    total = sum(mixture.values())
    for sequence in range(300):
        source, before = pattern.place(sequence)
        assert before == drawn[pattern.sources[source]]
        drawn[pattern.sources[source]] += 1
        for name, weight in mixture.items():
            assert abs(drawn[name] - (sequence + 1) * weight / total) < 1
        assert pattern.drawn(sequence + 1) == {name: drawn[name] for name in pattern.sources}


@settings(max_examples=60, deadline=None)
@given(start=WEIGHTS, end=WEIGHTS, sequences=st.integers(12, 900))
def test_a_moving_mixture_is_met_at_every_prefix_and_over_the_stage(
    start: dict[str, float], end: dict[str, float], sequences: int
) -> None:
    pattern = Interleaving(start, end, sequences)
    drawn, wanted = Counter[str](), Counter[str]()
    for sequence in range(sequences):
        source, before = pattern.place(sequence)
        assert before == drawn[pattern.sources[source]]
        drawn[pattern.sources[source]] += 1
        for name, share in pattern.shares(sequence).items():
            wanted[name] += share
        assert all(abs(drawn[name] - wanted[name]) < 1 + 1e-9 for name in pattern.sources)
        assert pattern.drawn(sequence + 1) == {name: drawn[name] for name in pattern.sources}
    # Moving linearly, a stage draws the mean of both mixtures; rounding in a period costs a few sequences.
    for name in NAMES:
        ideal = sequences * (start[name] / sum(start.values()) + end[name] / sum(end.values())) / 2
        assert abs(drawn[name] - ideal) <= 2 + 0.06 * sequences


def test_shares_move_from_start_to_end() -> None:
    pattern = Interleaving({"general": 68, "reasoning": 32}, {"general": 54, "reasoning": 46}, 100_000)
    assert pattern.shares(0)["reasoning"] == pytest.approx(0.32, abs=0.003)
    assert pattern.shares(50_000)["reasoning"] == pytest.approx(0.39, abs=0.003)
    assert pattern.shares(99_999)["reasoning"] == pytest.approx(0.46, abs=0.003)
    assert pattern.shares(10**9)["reasoning"] == pytest.approx(0.46, abs=0.003)
    assert pattern.drawn(100_000)["reasoning"] == pytest.approx(39_000, abs=30)


def test_shares_move_through_a_stage_of_any_length() -> None:
    for sequences in (2**20, 2**20 + 1, 1_600_000, 3_100_000):
        pattern = Interleaving({"general": 1}, {"reasoning": 1}, sequences)
        for part in (0.25, 0.5, 0.75):
            assert pattern.shares(int(part * sequences))["reasoning"] == pytest.approx(part, abs=0.01)
        assert pattern.drawn(sequences)["reasoning"] == pytest.approx(sequences / 2, rel=1e-3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_interleave_is_within_one_of_every_share(counts: list[int]) -> None:
    source_at, rank_at = interleave(counts)
    period = sum(counts)
    drawn = [0] * len(counts)
    for slot, source in enumerate(source_at):
        assert rank_at[slot] == drawn[source]
        drawn[source] += 1
        assert all(abs(n - Fraction((slot + 1) * count, period)) < 1 for n, count in zip(drawn, counts, strict=True))
    assert drawn == counts


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=6))
def test_any_weights_become_shares_of_a_short_period(weights: list[float]) -> None:
    names, counts = mixture_periods({str(at): weight for at, weight in enumerate(weights)})
    period = sum(counts)
    assert len(names) == len(weights) and period <= LONGEST_PERIOD
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count / period - weight / sum(weights)) <= 1 / LONGEST_PERIOD


@pytest.mark.parametrize(
    ("start", "end", "sequences", "complaint"),
    [
        ({"a": 1.0}, {"a": 0.0}, 100, "mixture_end: at least one source must have a weight above 0"),
        ({"a": 1.0}, {"b": -1.0}, 100, "mixture_end.b: weight must be a finite number, 0 or more"),
        ({"a": 1.0}, {"b": 1.0}, 7, "mixture_end: 7 sequences are too few to move a mixture of 2 sources"),
        ({"a": 1.0}, {"b": 1.0}, None, "mixture_end: None sequences are too few"),
    ],
)
def test_mixtures_that_cannot_move_are_refused(
    start: dict[str, float], end: dict[str, float], sequences: int | None, complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        Interleaving(start, end, sequences)
