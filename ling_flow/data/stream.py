"""The tokens of one source, epoch after epoch, each epoch's documents in an order of its own.

An epoch is read in lanes: equal stretches of the shuffled documents, in turn. So sequences in a row come from different
documents, however long these are, and where to go on is one integer, tokens read per lane, whatever lengths they were
read in: a later stage with longer sequences sees none of an epoch again.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

PADDING = -1  # document number of no document; that of `model.packing`


class Row(NamedTuple):
    """Tokens [n] and the number of the document that each belongs to [n], from 0, PADDING for none."""

    tokens: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]


LANES = 64
"""Places at which an epoch is read in turn, unless a lane would be shorter than `LANE_TOKENS` or the longest row."""
LANE_TOKENS = 4096


class _Epoch(NamedTuple):
    order: npt.NDArray[np.int64]  # documents as they come
    ends: npt.NDArray[np.int64]  # end of each in the epoch, tokens


class DocumentStream:
    """One split of a source as endless lanes.

    Args:
        tokens: all its documents, one after the other.
        offsets: where each begins, and the end of the last [documents + 1].
        key: with the epoch, decides the order.
        longest: tokens of the longest row that will be read: in a shorter lane it would meet itself.
    """

    def __init__(
        self, tokens: npt.NDArray[np.unsignedinteger], offsets: npt.NDArray[np.int64], key: str, longest: int = 0
    ) -> None:
        self._tokens, self._offsets, self._key = tokens, np.asarray(offsets), key
        self._lengths = np.diff(self._offsets)
        self.lanes = max(1, min(LANES, len(tokens) // max(LANE_TOKENS, longest)))
        self.lane_tokens = len(tokens) // self.lanes  # of an epoch; up to lanes - 1 tokens at its end are left out
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> _Epoch:
        digest = hashlib.sha256(f"{self._key}/{epoch}".encode()).digest()
        order = np.random.default_rng(int.from_bytes(digest)).permutation(len(self._lengths))
        return _Epoch(order, np.cumsum(self._lengths[order]))

    def read(self, lane: int, position: int, count: int) -> Row:
        """`count` tokens of a lane from `position` on, counted over all epochs."""
        tokens, documents = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        filled = number = 0
        while filled < count:
            epoch, at = divmod(position + filled, self.lane_tokens)
            order, ends = self._epoch(epoch)
            place = int(np.searchsorted(ends, lane * self.lane_tokens + at, side="right"))
            left = int(ends[place]) - lane * self.lane_tokens - at  # of the document
            begin = int(self._offsets[order[place] + 1]) - left
            take = min(count - filled, left, self.lane_tokens - at)
            tokens[filled : filled + take] = self._tokens[begin : begin + take]
            documents[filled : filled + take] = number
            filled, number = filled + take, number + 1
        return Row(tokens, documents)


class Windows:
    """A source as it lies on disk in windows of S+1 tokens that overlap by one, in a new order each epoch."""

    def __init__(self, tokens: npt.NDArray[np.unsignedinteger], key: str, sequence_length: int) -> None:
        self._tokens, self._key, self._length = tokens, key, sequence_length
        self._windows = (len(tokens) - 1) // sequence_length
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        digest = hashlib.sha256(f"{self._key}/{epoch}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest)).permutation(self._windows)

    def row(self, number: int) -> Row:
        """Row `number`, counted over all epochs; counts as one document."""
        epoch, position = divmod(number, self._windows)
        begin = int(self._epoch(epoch)[position]) * self._length
        tokens = self._tokens[begin : begin + self._length + 1].astype(np.int64)
        return Row(tokens, np.zeros(len(tokens), dtype=np.int64))


class _Packed(NamedTuple):
    """The rows of an epoch."""

    begins: npt.NDArray[np.int64]  # of each piece of a document, in the tokens
    sizes: npt.NDArray[np.int64]  # and its tokens
    pieces: npt.NDArray[np.int64]  # row after row
    ends: npt.NDArray[np.int64]  # where each row begins in `pieces`, and the end of the last
    order: npt.NDArray[np.int64]  # of the rows


class PackedDocuments:
    """The same documents in rows of at most `length` tokens, whole wherever they fit (best-fit decreasing packing).

    A longer document is cut into pieces of `length`. Each epoch packs its own order of documents, `GROUP` pieces at a
    time, so that neither the order nor the packing needs more than one pass over lengths. How many rows an epoch has is
    known once it is packed: to go on in the sixth, all before it are packed again.
    """

    GROUP = 4096

    def __init__(
        self, tokens: npt.NDArray[np.unsignedinteger], offsets: npt.NDArray[np.int64], key: str, length: int
    ) -> None:
        self._tokens, self._offsets, self._key, self._length = tokens, np.asarray(offsets), key, length
        self._epoch = functools.lru_cache(maxsize=2)(self._packed)
        self._ends = [0]  # rows before each epoch whose rows have been counted, and after the last of them

    def _packed(self, epoch: int) -> _Packed:
        digest = hashlib.sha256(f"{self._key}/{epoch}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest))
        order = rng.permutation(len(self._offsets) - 1)
        lengths = np.diff(self._offsets)[order]
        cuts = -(-lengths // self._length)  # pieces of each document
        piece = np.arange(cuts.sum()) - np.repeat(np.cumsum(cuts) - cuts, cuts)  # its number in its document
        begins = np.repeat(self._offsets[:-1][order], cuts) + piece * self._length
        sizes = np.minimum(np.repeat(lengths, cuts) - piece * self._length, self._length)
        pieces, ends = np.empty(len(sizes), dtype=np.int64), [0]
        for first in range(0, len(sizes), self.GROUP):
            for row in best_fit(sizes[first : first + self.GROUP].tolist(), self._length):
                pieces[ends[-1] : ends[-1] + len(row)] = first + np.array(row)
                ends.append(ends[-1] + len(row))
        return _Packed(begins, sizes, pieces, np.array(ends), rng.permutation(len(ends) - 1))

    def row(self, number: int) -> Row:
        """Row `number` of `length` tokens, counted over all epochs; the end is padded."""
        while number >= self._ends[-1]:
            self._ends.append(self._ends[-1] + len(self._epoch(len(self._ends) - 1).order))
        epoch = bisect.bisect_right(self._ends, number) - 1
        packed = self._epoch(epoch)
        row = packed.order[number - self._ends[epoch]]
        tokens = np.zeros(self._length, dtype=np.int64)
        documents = np.full(self._length, PADDING, dtype=np.int64)
        filled = 0
        for index, piece in enumerate(packed.pieces[packed.ends[row] : packed.ends[row + 1]]):
            begin, size = packed.begins[piece], packed.sizes[piece]
            tokens[filled : filled + size] = self._tokens[begin : begin + size]
            documents[filled : filled + size] = index
            filled += size
        return Row(tokens, documents)


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `capacity`: longest first, each into the fullest row that has room."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by room left
    rooms = 0  # bit n: there is a row with room for n
    for index in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        length = lengths[index]
        enough = rooms >> length
        if not enough:
            row, room = len(rows), capacity
            rows.append([index])
        else:
            room = length + (enough & -enough).bit_length() - 1  # the least
            row = with_room[room].pop()
            rows[row].append(index)
            if not with_room[room]:
                rooms ^= 1 << room
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows
