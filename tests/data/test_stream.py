"""A source's shuffled documents, as a stream and packed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_flow.data.stream import PADDING, DocumentStream, PackedDocuments, best_fit

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=25)


def source(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that are all different, and the documents' offsets."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(offsets[-1], dtype=np.uint16), offsets


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, cuts=st.lists(st.integers(1, 17), min_size=1, max_size=5))
def test_an_epoch_holds_every_document_once_whole(lengths: list[int], cuts: list[int]) -> None:
    tokens, offsets = source(lengths)
    stream = DocumentStream(tokens, offsets, "0/code", 1000)
    whole = stream.read(0, 2 * len(tokens))
    for epoch in (whole.tokens[: len(tokens)], whole.tokens[len(tokens) :]):
        assert sorted(epoch) == tokens.tolist()
    for number in range(whole.documents.max() + 1):
        run = whole.tokens[whole.documents == number]
        begin = offsets.tolist().index(run[0])
        assert run.tolist() == list(range(offsets[begin], offsets[begin + 1]))
    # Any cuts give the same stream: where to go on is one integer.
    at, parts = 0, []
    while at < 2 * len(tokens):
        count = min(cuts[len(parts) % len(cuts)], 2 * len(tokens) - at)
        parts.append(stream.read(at, count))
        assert parts[-1].documents[0] == 0
        assert (np.diff(parts[-1].documents) == np.diff(whole.documents[at : at + count])).all()
        at += count
    assert np.concatenate([part.tokens for part in parts]).tolist() == whole.tokens.tolist()


def test_epochs_and_keys_have_their_own_order() -> None:
    tokens, offsets = source([3] * 20)
    stream, other = DocumentStream(tokens, offsets, "0/code", 1000), DocumentStream(tokens, offsets, "1/code", 1000)
    first, second = stream.read(0, 60).tokens.tolist(), stream.read(60, 60).tokens.tolist()
    assert first != second
    assert first != other.read(0, 60).tokens.tolist()
    assert stream.read(60 * 1_000_000 + 7, 5).tokens.tolist() == stream.read(60 * 1_000_000 + 7, 5).tokens.tolist()


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, piece=st.integers(1, 12))
def test_long_documents_come_in_pieces(lengths: list[int], piece: int) -> None:
    tokens, offsets = source(lengths)
    epoch = DocumentStream(tokens, offsets, "0/code", piece).read(0, len(tokens))
    assert sorted(epoch.tokens) == tokens.tolist()
    for number in range(epoch.documents.max() + 1):
        run = epoch.tokens[epoch.documents == number].tolist()
        assert run == list(range(run[0], run[0] + len(run)))
        document = int(np.searchsorted(offsets, run[0], side="right")) - 1
        assert (run[0] - offsets[document]) % piece == 0
        assert len(run) == min(piece, offsets[document + 1] - run[0])


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


@pytest.mark.parametrize("position", [0, 5, 10**9])
def test_reading_nothing_of_the_past_is_kept(position: int) -> None:
    tokens, offsets = source([7, 2, 9, 1])
    used = DocumentStream(tokens, offsets, "0/a", 4)
    used.read(3, 50)
    assert (
        used.read(position, 40).tokens.tolist()
        == DocumentStream(tokens, offsets, "0/a", 4).read(position, 40).tokens.tolist()
    )
