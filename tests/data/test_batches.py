from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_flow.data.batches import LONGEST_PERIOD, Batches, interleave, mixture_periods
from ling_flow.data.corpus import Corpus
from ling_flow.errors import UserError

NAMES = ["code", "sums", "chat"]
WEIGHTS = st.fixed_dictionaries(
    {name: st.sampled_from([0.0, 0.1, 1 / 3, 0.37, 1.0, 2.5, 7.0]) for name in NAMES}
).filter(lambda mixture: sum(mixture.values()) > 0)


@settings(max_examples=60, deadline=None)
@given(
    mixture=WEIGHTS,
    sequence_length=st.integers(1, 40),
    size=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    first=st.integers(0, 500),
    step=st.integers(0, 10**6),
)
def test_a_batch_is_a_pure_function_of_its_arguments(
    corpus: Corpus, mixture: dict[str, float], sequence_length: int, size: int, seed: int, first: int, step: int
) -> None:
    batches = Batches(corpus, mixture, sequence_length, size, seed, first_sequence=first)
    expected = batches.batch(step)
    assert expected.shape == (size, sequence_length + 1) and expected.dtype == torch.int64
    batches.batch(step + 1)  # what was read before leaves no trace
    assert torch.equal(batches.batch(step), expected)
    # The same sequences in batches of another size: sequence numbers, not steps, decide.
    one_by_one = Batches(corpus, mixture, sequence_length, 1, seed, first_sequence=first + step * size)
    assert torch.equal(torch.cat([one_by_one.batch(row) for row in range(size)]), expected)


@settings(max_examples=60, deadline=None)
@given(mixture=WEIGHTS, seed=st.integers(0, 1000))
def test_every_prefix_is_within_one_sequence_of_the_mixture(
    corpus: Corpus, mixture: dict[str, float], seed: int
) -> None:
    batches = Batches(corpus, mixture, 16, 1, seed)
    drawn: Counter[str] = Counter()
    total = sum(mixture.values())
    for sequence in range(300):
        drawn[batches.place(sequence)[0]] += 1
        for name, weight in mixture.items():
            assert abs(drawn[name] - (sequence + 1) * weight / total) < 1


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


@settings(max_examples=25, deadline=None)
@given(mixture=WEIGHTS, sequence_length=st.integers(20, 60), seed=st.integers(0, 1000), epoch=st.integers(0, 3))
def test_no_window_twice_in_an_epoch(
    corpus: Corpus, mixture: dict[str, float], sequence_length: int, seed: int, epoch: int
) -> None:
    batches = Batches(corpus, mixture, sequence_length, 1, seed)
    windows = {name: (len(corpus.tokens(name)) - 1) // sequence_length for name in NAMES}
    drawn = defaultdict(list)
    total, largest = sum(mixture.values()), max(NAMES, key=lambda name: mixture[name] / windows[name])
    for sequence in range(int((epoch + 1) * windows[largest] * total / mixture[largest]) + 1):
        name, window = batches.place(sequence)
        drawn[name].append(window)
    for name, order in drawn.items():
        epochs = [order[begin : begin + windows[name]] for begin in range(0, len(order), windows[name])]
        for visited in epochs:
            assert len(set(visited)) == len(visited)
        for complete in epochs[: len(order) // windows[name]]:
            assert sorted(complete) == list(range(windows[name]))
    first, second = (drawn[largest][n * windows[largest] : (n + 1) * windows[largest]] for n in (0, 1))
    assert epoch == 0 or first != second


def test_rows_are_windows_of_the_stream_and_an_epoch_predicts_each_token_once(corpus: Corpus) -> None:
    stream = np.asarray(corpus.tokens("sums"), dtype=np.int64)
    batches = Batches(corpus, {"sums": 1.0}, 32, 4, seed=7)
    windows = (len(stream) - 1) // 32
    predicted = np.zeros(len(stream), dtype=int)
    for step in range(windows // 4):
        for row, tokens in enumerate(batches.batch(step)):
            source, window = batches.place(step * 4 + row)
            assert source == "sums"
            assert tokens.tolist() == stream[window * 32 : window * 32 + 33].tolist()
            predicted[window * 32 + 1 : window * 32 + 33] += 1
    assert predicted.max() == 1
    assert predicted.sum() == windows // 4 * 4 * 32


def test_a_later_stage_goes_on_where_an_earlier_one_ended(corpus: Corpus) -> None:
    mixture = {"code": 1.0, "sums": 2.0}
    whole = Batches(corpus, mixture, 16, 4, seed=3)
    later = Batches(corpus, mixture, 16, 4, seed=3, first_sequence=20)
    assert torch.equal(later.batch(2), whole.batch(7))


def test_seed_and_split_matter(corpus: Corpus) -> None:
    def first(**fields: object) -> torch.Tensor:
        return Batches(corpus, {"sums": 1.0}, 16, 8, **{"seed": 0, **fields}).batch(0)  # type: ignore[arg-type]

    assert not torch.equal(first(), first(seed=1))
    held = corpus.tokens("sums", "validation").tobytes()
    for row in first(split="validation"):
        assert row.numpy().astype("<u2").tobytes() in held


@pytest.mark.parametrize(
    ("mixture", "sequence_length", "complaint"),
    [
        ({"wiki": 1.0}, 16, "has no source 'wiki'; it has code, sums, chat"),
        ({"wiki": 0.0, "sums": 1.0}, 16, "has no source 'wiki'"),
        ({"sums": 0.0, "code": 0.0}, 16, "mixture: at least one source must have a weight above 0"),
        ({}, 16, "mixture: at least one source must have a weight above 0"),
        ({"sums": -1.0, "code": 2.0}, 16, "mixture.sums: weight must be a finite number, 0 or more"),
        ({"sums": float("nan")}, 16, "mixture.sums: weight must be a finite number"),
        ({"sums": 1.0, "code": 1e-9}, 16, "mixture.code: its share is below 1/16384"),
        (
            {"sums": 1.0},
            10**6,
            r"sequence_length: 1000000 \+ 1 tokens do not fit in source 'sums', which has \d+ train",
        ),
    ],
)
def test_bad_arguments_are_refused(
    corpus: Corpus, mixture: dict[str, float], sequence_length: int, complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        Batches(corpus, mixture, sequence_length, 4, seed=0)
