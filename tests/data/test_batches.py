"""Batches: a pure function of the step, whatever the batch size, the restart or the stage before."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_flow.data.batches import Batches, BatchSizes, Packing
from ling_flow.data.corpus import Corpus
from ling_flow.data.drawn import Drawn
from ling_flow.data.stream import DocumentStream
from ling_flow.errors import UserError
from tests.data.test_mixture import NAMES, WEIGHTS

PACKINGS = st.sampled_from(["windows", "stream", "masked_stream", "best_fit"])


@settings(max_examples=60, deadline=None)
@given(
    mixture=WEIGHTS,
    sequence_length=st.integers(1, 40),
    size=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    before=st.integers(0, 50_000),
    step=st.integers(0, 10**6),
    packing=PACKINGS,
)
def test_a_batch_is_a_pure_function_of_its_arguments(
    corpus: Corpus,
    mixture: dict[str, float],
    sequence_length: int,
    size: int,
    seed: int,
    before: int,
    step: int,
    packing: Packing,
) -> None:
    if packing == "best_fit":
        step %= 50  # epochs are packed one after the other

    def fresh(sizes: int) -> Batches:
        def begun(**earlier: Drawn) -> Batches:
            return Batches(corpus, mixture, sequence_length, sizes, seed, packing=packing, drawn_before=earlier)

        orders = {name: drawn.order for name, drawn in begun().drawn(0).items()}
        return begun(**{name: Drawn(tokens=before, order=orders.get(name, "")) for name in NAMES})

    batches = fresh(size)
    expected = batches.batch(step)
    assert expected.tokens.shape == (size, sequence_length + 1) and expected.tokens.dtype == torch.int64
    assert (expected.documents is None) == (packing in ("windows", "stream"))
    batches.batch(step + 1)  # what was read before leaves no trace
    assert torch.equal(batches.batch(step).tokens, expected.tokens)
    # The same sequences in batches of another size: their numbers, not steps, decide.
    rows = [fresh(1).row(step * size + row) for row in range(size)]
    assert [row.tokens.tolist() for _, row in rows] == expected.tokens.tolist()
    assert expected.sources is not None and [source for source, _ in rows] == expected.sources.tolist()


@settings(max_examples=25, deadline=None)
@given(mixture=WEIGHTS, sequence_length=st.integers(20, 60), seed=st.integers(0, 1000))
def test_an_epoch_predicts_no_token_twice(
    corpus: Corpus, mixture: dict[str, float], sequence_length: int, seed: int
) -> None:
    batches = Batches(corpus, mixture, sequence_length, 1, seed, packing="stream")
    total = sum(mixture.values())
    lengths = {name: len(corpus.tokens(name)) for name in batches.sources}
    largest = max(batches.sources, key=lambda name: mixture[name] / lengths[name])
    read: dict[str, list[int]] = {name: [] for name in batches.sources}
    for sequence in range(int(lengths[largest] / sequence_length * total / mixture[largest]) + 1):
        source, row = batches.row(sequence)
        read[batches.sources[source]] += row.tokens[:-1].tolist()  # the last is the first of the lane's next draw
    for name, tokens in read.items():
        there = Counter(np.asarray(corpus.tokens(name)).tolist())
        # Where an epoch is through, lanes begin the next one, each with at most one sequence before all are.
        allowed = sum((Counter(tokens) - there).values())
        assert allowed <= max(0, len(tokens) - lengths[name]) + 64 * sequence_length


def test_a_later_stage_with_longer_sequences_sees_nothing_again(corpus: Corpus) -> None:
    mixture = {"code": 1.0, "sums": 2.0}
    first = Batches(corpus, mixture, 16, 4, seed=3, packing="stream")
    drawn = first.drawn(20)
    assert all(count.tokens % 16 == 0 for count in drawn.values())
    assert sum(count.tokens for count in drawn.values()) >= 20 * 4 * 16
    later = Batches(corpus, mixture, 48, 4, seed=3, packing="stream", drawn_before=drawn)
    stream = DocumentStream(corpus.tokens("sums"), corpus.document_offsets("sums"), "3/sums")
    for turn in range(2):
        rows = [row for source, row in map(later.row, range(200)) if later.sources[source] == "sums"]
        row = rows[turn * stream.lanes]
        expected = stream.read(0, drawn["sums"].tokens // stream.lanes + 48 * turn, 49)
        assert row.tokens.tolist() == expected.tokens.tolist()


def test_a_source_in_another_order_begins_anew(corpus: Corpus) -> None:
    mixture = {"code": 1.0, "sums": 2.0}
    drawn = Batches(corpus, mixture, 16, 4, seed=3, packing="stream").drawn(20)
    again = Batches(corpus, mixture, 32, 4, seed=3, packing="masked_stream", drawn_before=drawn)
    assert again.begun_anew == [] and again.drawn(0) == drawn
    for changed in (
        Batches(corpus, mixture, 32, 4, seed=4, packing="stream", drawn_before=drawn),
        Batches(corpus, mixture, 32, 4, seed=3, packing="best_fit", drawn_before=drawn),
    ):
        assert changed.begun_anew == ["code", "sums"]
        assert all(found.tokens == 0 for found in changed.drawn(0).values())
    other = {**drawn, "sums": drawn["sums"].model_copy(update={"order": "another shard"})}
    changed = Batches(corpus, mixture, 16, 4, seed=3, packing="stream", drawn_before=other)
    assert changed.begun_anew == ["sums"]
    first = Batches(corpus, mixture, 16, 4, seed=3, packing="stream")
    of_sums = [
        next(row.tokens.tolist() for source, row in map(batches.row, range(9)) if batches.sources[source] == "sums")
        for batches in (changed, first)
    ]
    assert of_sums[0] == of_sums[1]


def test_no_row_meets_itself_where_the_source_is_long_enough() -> None:
    tokens = np.arange(20_000, dtype=np.uint16)
    offsets = np.arange(0, 20_001, 50)
    stream = DocumentStream(tokens, offsets, "0/words", longest=9_001)
    assert stream.lanes == 2
    read = np.concatenate([stream.read(lane, 0, 9_000).tokens for lane in range(2)])
    assert len(np.unique(read)) == len(read)


def test_documents_of_a_row_are_told_apart(corpus: Corpus) -> None:
    eos = corpus.tokenizer.eos_id
    for packing in ("masked_stream", "best_fit"):
        batch = Batches(corpus, {"sums": 1.0}, 64, 8, seed=0, packing=packing).batch(3)
        assert batch.documents is not None
        for tokens, documents in zip(batch.tokens.tolist(), batch.documents.tolist(), strict=True):
            for at in range(len(tokens) - 1):
                if documents[at] != -1 and tokens[at] == eos:
                    assert documents[at + 1] != documents[at]
        assert batch.targets() < batch.tokens[:, 1:].numel()
        assert sum(part.targets() for part in batch.split(3)) == batch.targets()


@settings(max_examples=60, deadline=None)
@given(start=st.integers(1, 9), sequences=st.integers(1, 30), ramp=st.integers(1, 12), step=st.integers(0, 40))
def test_batches_grow_to_their_size(start: int, sequences: int, ramp: int, step: int) -> None:
    sizes = BatchSizes(sequences, start, ramp)
    assert sizes.of(0) == start
    assert sizes.of(ramp) == sequences
    assert sizes.before(step) == sum(sizes.of(earlier) for earlier in range(step))
    low, high = min(start, sequences), max(start, sequences)
    assert low <= sizes.of(step) <= high


def test_growing_batches_hold_the_same_sequences(corpus: Corpus) -> None:
    mixture = {"code": 1.0, "sums": 2.0}
    growing, plain = Batches(corpus, mixture, 16, BatchSizes(8, 2, 4), seed=3), Batches(corpus, mixture, 16, 1, seed=3)
    rows = torch.cat([growing.batch(step).tokens for step in range(6)])
    assert torch.equal(rows, torch.cat([plain.batch(step).tokens for step in range(len(rows))]))


def test_seed_and_split_matter(corpus: Corpus) -> None:
    def first(**fields: object) -> torch.Tensor:
        return Batches(corpus, {"sums": 1.0}, 16, 8, **{"seed": 0, **fields}).batch(0).tokens  # type: ignore[arg-type]

    assert not torch.equal(first(), first(seed=1))
    held = set(np.asarray(corpus.tokens("sums", "validation")).tolist())
    assert set(first(split="validation").flatten().tolist()) <= held


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
