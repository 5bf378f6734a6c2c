"""A source's shuffled documents, as a stream and packed."""

import functools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_flow.data import stream as stream_module
from ling_flow.data.stream import PADDING, DocumentStream, PackedDocuments, best_fit

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=25)


def source(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that are all different, and the documents' offsets."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(offsets[-1], dtype=np.uint16), offsets


@pytest.fixture(autouse=True, scope="module")
def short_lanes() -> Iterator[None]:
    """So that sources of a few tokens have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "LANE_TOKENS", 30)
        yield


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, cuts=st.lists(st.integers(1, 17), min_size=1, max_size=5))
def test_the_lanes_of_an_epoch_hold_every_token_once(lengths: list[int], cuts: list[int]) -> None:
    tokens, offsets = source(lengths)
    stream = DocumentStream(tokens, offsets, "0/code")
    assert stream.lanes == max(1, len(tokens) // 30)
    whole = [stream.read(lane, 0, 2 * stream.lane_tokens) for lane in range(stream.lanes)]
    for half in (slice(0, stream.lane_tokens), slice(stream.lane_tokens, None)):
        epoch = np.concatenate([lane.tokens[half] for lane in whole])
        assert len(set(epoch)) == len(epoch) > len(tokens) - stream.lanes
    for lane in whole:
        for number in range(lane.documents.max() + 1):
            run = lane.tokens[lane.documents == number].tolist()
            assert run == list(range(run[0], run[0] + len(run)))
            document = int(np.searchsorted(offsets, run[0], side="right")) - 1
            assert run[-1] < offsets[document + 1]
    # Any cuts give the same lane: where to go on is one integer.
    at, parts = 0, []
    while at < 2 * stream.lane_tokens:
        count = min(cuts[len(parts) % len(cuts)], 2 * stream.lane_tokens - at)
        parts.append(stream.read(0, at, count))
        assert parts[-1].documents[0] == 0
        assert (np.diff(parts[-1].documents) == np.diff(whole[0].documents[at : at + count])).all()
        at += count
    assert np.concatenate([part.tokens for part in parts]).tolist() == whole[0].tokens.tolist()


def test_a_document_within_a_lane_comes_whole() -> None:
    tokens, offsets = source([5] * 60)
    stream = DocumentStream(tokens, offsets, "0/code")
    assert stream.lanes == 10
    lane = stream.read(3, 0, stream.lane_tokens)
    assert [int((lane.documents == number).sum()) for number in range(6)] == [5] * 6


def test_epochs_and_keys_have_their_own_order() -> None:
    tokens, offsets = source([3] * 9)
    stream, other = DocumentStream(tokens, offsets, "0/code"), DocumentStream(tokens, offsets, "1/code")
    first, second = stream.read(0, 0, 27).tokens.tolist(), stream.read(0, 27, 27).tokens.tolist()
    assert first != second
    assert first != other.read(0, 0, 27).tokens.tolist()
    far = 27 * 1_000_000 + 7
    assert stream.read(0, far, 5).tokens.tolist() == stream.read(0, far, 5).tokens.tolist()


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, length=st.integers(4, 20))
def test_packing_keeps_documents_whole_and_loses_nothing(lengths: list[int], length: int) -> None:
    tokens, offsets = source(lengths)
    packed = PackedDocuments(tokens, offsets, "0/chat", length)
    seen: list[int] = []
    number = 0
    while len(seen) < len(tokens):
        row = packed.row(number)
        assert len(row.tokens) == len(row.documents) == length
        for document in range(row.documents.max() + 1):
            run = row.tokens[row.documents == document].tolist()
            assert run == list(range(run[0], run[0] + len(run)))
            at = int(np.searchsorted(offsets, run[0], side="right")) - 1
            if offsets[at + 1] - offsets[at] <= length:
                assert len(run) == offsets[at + 1] - offsets[at]
            seen += run
        assert (row.tokens[row.documents == PADDING] == 0).all()
        number += 1
    assert sorted(seen) == tokens.tolist()
    again = packed.row(number)  # the next epoch begins
    assert again.documents[0] == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 16), max_size=40))
def test_best_fit_fills_rows(lengths: list[int]) -> None:
    rows = best_fit(lengths, 16)
    assert sorted(at for row in rows for at in row) == list(range(len(lengths)))
    used = [sum(lengths[at] for at in row) for row in rows]
    assert all(total <= 16 for total in used)
    # Best-fit decreasing needs at most 11/9 of the least number of rows, and one more.
    assert len(rows) <= 11 / 9 * max(-(-sum(lengths) // 16), 0) * 1.5 + 1


def test_packed_rows_are_nearly_full() -> None:
    rng = np.random.default_rng(0)
    tokens, offsets = source(rng.integers(10, 120, size=300).tolist())
    packed = PackedDocuments(tokens, offsets, "0/chat", 128)
    rows = -(-len(tokens) // 128)
    filled = np.mean([(packed.row(number).documents != PADDING).mean() for number in range(rows)])
    assert filled > 0.94


def test_a_later_epoch_is_packed_once() -> None:
    tokens, offsets = source([7, 2, 9, 1, 12, 5])
    packed, packings = PackedDocuments(tokens, offsets, "0/chat", 16), []
    pack = packed._packed
    packed._epoch = functools.lru_cache(maxsize=2)(lambda epoch: packings.append(epoch) or pack(epoch))
    rows = [packed.row(number) for number in range(30)]
    assert packings == list(range(max(packings) + 1)) and max(packings) > 3
    late = PackedDocuments(tokens, offsets, "0/chat", 16).row(29)  # asked for first
    assert late.tokens.tolist() == rows[29].tokens.tolist()


@pytest.mark.parametrize("position", [0, 5, 10**9])
def test_reading_leaves_no_trace(position: int) -> None:
    tokens, offsets = source([7, 2, 9, 1])
    used, fresh = DocumentStream(tokens, offsets, "0/a"), DocumentStream(tokens, offsets, "0/a")
    used.read(0, 3, 50)
    assert used.read(0, position, 40).tokens.tolist() == fresh.read(0, position, 40).tokens.tolist()
