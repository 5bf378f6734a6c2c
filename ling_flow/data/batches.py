"""Batches as a pure function of corpus, mixture, seed and step: no loader state, so resuming is one integer.

Sequences are numbered over the stage. Which source a number is drawn from is a fixed pattern (`data.mixture`); what it
holds is the next S+1 tokens of a lane of that source's shuffled documents (`data.stream`), the last of them the first
of the lane's next draw, so that an epoch predicts every token once. Any number of workers take rows of the same batch.

Legend: B sequences of a batch, S sequence length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ling_flow.data.corpus import Corpus, Split
from ling_flow.data.drawn import Drawn
from ling_flow.data.mixture import Interleaving
from ling_flow.data.stream import PADDING, DocumentStream, PackedDocuments, Row, Windows
from ling_flow.errors import UserError

Packing = Literal["windows", "stream", "masked_stream", "best_fit"]
"""How documents fill a row. `windows`: the source as it lies on disk, cut into rows at fixed places, shuffled anew each
epoch. `stream`: shuffled documents one after the other, all of a row seen by all of it. `masked_stream`: the same, but
documents do not see each other. `best_fit`: documents whole wherever they fit, not seeing each other, the rest of a row
padded. Only streams go on behind an earlier stage of another length or mixture without meeting anything again."""


class Routed(NamedTuple):
    """What of a batch counts for a router: rows with any such token, and tokens."""

    rows: int
    tokens: int


class Batch(NamedTuple):
    """Rows of a step.

    Attributes:
        tokens: int64 [B, S+1].
        documents: int64 [B, S+1], the document of each token in its row, -1 in padding; None: a row is one document.
        sources: the source of each row, as an index into `Batches.sources`.
    """

    tokens: Tensor
    documents: Tensor | None = None
    sources: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]

    def split(self, rows: int) -> list[Batch]:
        """In parts of so many rows."""
        return [
            Batch(*(None if part is None else part[first : first + rows] for part in self))  # type: ignore[arg-type]
            for first in range(0, len(self.tokens), rows)
        ]

    @property
    def token_count(self) -> int:
        """Tokens that the model reads, padding left out."""
        return self.tokens[:, 1:].numel() if self.documents is None else int((self.documents[:, :-1] != PADDING).sum())

    def targets(self, ahead: int = 1) -> int:
        """Tokens that are predicted from the one `ahead` places before them: where it is in the same document."""
        return self.tokens[:, ahead:].numel() if self.documents is None else int(self._same(ahead).sum())

    def routed(self, depth: int) -> Routed:
        """What counts for the trunk's routers (depth 0), or for that of an MTP layer: positions that have a target."""
        if self.documents is None:
            return Routed(len(self.tokens), self.tokens[:, depth + 1 :].numel())
        counted_BS = self.documents[:, :-1] != PADDING if depth == 0 else self._same(depth + 1)
        return Routed(int(counted_BS.any(1).sum()), int(counted_BS.sum()))

    def _same(self, ahead: int) -> Tensor:
        assert self.documents is not None
        return (self.documents[:, ahead:] == self.documents[:, :-ahead]) & (self.documents[:, ahead:] != PADDING)


class BatchSizes:
    """Sequences per step: constant, or growing linearly over the first steps of a stage (Ling 2.0 §3.2).

    Args:
        sequences: B at the end of the ramp.
        start: B of the first step; None: no ramp.
        ramp_steps: steps after which B is reached.
    """

    def __init__(self, sequences: int, start: int | None = None, ramp_steps: int = 0) -> None:
        ramp = np.arange(ramp_steps) / max(ramp_steps, 1) if start is not None else np.arange(0)
        self.sequences = sequences
        self._ramp = np.rint(start + ramp * (sequences - start)).astype(np.int64) if start is not None else ramp
        self._before = np.concatenate([[0], np.cumsum(self._ramp)]).astype(np.int64)

    def of(self, step: int) -> int:
        """Sequences of step 0, 1, …"""
        return int(self._ramp[step]) if step < len(self._ramp) else self.sequences

    def before(self, step: int) -> int:
        """Sequences of all steps before it."""
        ramp = len(self._ramp)
        return int(self._before[min(step, ramp)]) + max(0, step - ramp) * self.sequences


class Batches:
    """Training or validation batches drawn from a mixture of sources.

    Args:
        mixture: weight per source, in any unit; sources of weight 0 are left out.
        sequence_length: S, tokens to predict per sequence.
        sizes: sequences per step, constant or growing.
        mixture_end: weights at the end of the stage, to which shares move linearly; None: those of the start.
        sequences: of the whole stage; needed with `mixture_end`.
        drawn_before: per source, what earlier stages are through with: this one goes on behind them, but for a source
            that it reads in another order, because corpus, seed or packing are others; that it begins anew.
        longest: tokens of the longest sequence of any stage of the run; a source is read in lanes that hold it.

    Attributes:
        sources: names, in the order of `Batch.sources`.
        begun_anew: those that are read in another order than before.

    Raises:
        UserError: an unknown source, weights that are no mixture, or a source shorter than one sequence.
    """

    def __init__(
        self,
        corpus: Corpus,
        mixture: Mapping[str, float],
        sequence_length: int,
        sizes: int | BatchSizes,
        seed: int,
        split: Split = "train",
        *,
        packing: Packing = "windows",
        mixture_end: Mapping[str, float] | None = None,
        sequences: int | None = None,
        drawn_before: Mapping[str, Drawn] | None = None,
        longest: int = 0,
    ) -> None:
        for source in (*mixture, *(mixture_end or {})):
            corpus.require(source)
        self.corpus, self.sequence_length, self.packing = corpus, sequence_length, packing
        self.sizes = BatchSizes(sizes) if isinstance(sizes, int) else sizes
        self._interleaving = Interleaving(mixture, mixture_end, sequences)
        self.sources = self._interleaving.sources
        self._drawn_before = dict(drawn_before or {})
        # Windows are numbered over the whole run.
        through = sum(drawn.tokens for drawn in self._drawn_before.values())
        self._first = through // sequence_length if packing == "windows" else 0
        if mixture_end is not None and packing == "windows":
            raise UserError("mixture_end: needs packing stream, masked_stream or best_fit, got windows")
        self._streams: list[Windows | DocumentStream | PackedDocuments] = []
        for source in self.sources:
            tokens, offsets = corpus.tokens(source, split), corpus.document_offsets(source, split)
            if len(tokens) < sequence_length + 1:
                raise UserError(
                    f"sequence_length: {sequence_length} + 1 tokens do not fit in source '{source}', "
                    f"which has {len(tokens)} {split} tokens"
                )
            key = f"{seed}/{source}"
            if packing == "windows":
                self._streams.append(Windows(tokens, key, sequence_length))
            elif packing == "best_fit":
                self._streams.append(PackedDocuments(tokens, offsets, key, sequence_length + 1))
            else:
                self._streams.append(DocumentStream(tokens, offsets, key, max(longest, sequence_length) + 1))
        self._orders = {
            source: self._order(source, stream, seed, split)
            for source, stream in zip(self.sources, self._streams, strict=True)
        }
        self.begun_anew = [
            source for source in self.sources
            if packing != "windows" and self._order_before(source) not in (None, self._orders[source])
        ]  # fmt: skip

    def _order(self, source: str, stream: Windows | DocumentStream | PackedDocuments, seed: int, split: Split) -> str:
        lanes = f"{stream.lanes} lanes" if isinstance(stream, DocumentStream) else self.packing
        shard = getattr(self.corpus.require(source), split).digest
        return hashlib.sha256(f"{shard}/{seed}/{lanes}".encode()).hexdigest()[:16]

    def _order_before(self, source: str) -> str | None:
        return self._drawn_before[source].order if source in self._drawn_before else None

    def _through(self, source: str) -> int:
        """Tokens of a source that earlier stages are through with in this order."""
        before = self._drawn_before.get(source)
        return 0 if before is None or source in self.begun_anew else before.tokens

    def shares(self, sequence: int = 0) -> dict[str, float]:
        """The mixture as it is drawn at a sequence of the stage; sums to 1."""
        return self._interleaving.shares(self._first + sequence)

    def batch(self, step: int) -> Batch:
        """The sequences of a step, counted from the start of the stage."""
        first = self.sizes.before(step)
        placed = [self.row(first + row) for row in range(self.sizes.of(step))]
        documents = None
        if self.packing in ("masked_stream", "best_fit"):
            documents = torch.from_numpy(np.stack([row.documents for _, row in placed]))
        return Batch(
            torch.from_numpy(np.stack([row.tokens for _, row in placed])),
            documents,
            torch.tensor([source for source, _ in placed]),
        )

    def row(self, sequence: int) -> tuple[int, Row]:
        """(index of its source, S+1 tokens and their documents) of a sequence, counted from the start of the stage."""
        source, drawn = self._interleaving.place(self._first + sequence)
        stream, before = self._streams[source], self._through(self.sources[source])
        if isinstance(stream, Windows):
            return source, stream.row(drawn)
        if isinstance(stream, PackedDocuments):
            return source, stream.row(before // self.sequence_length + drawn)
        turn, lane = divmod(drawn, stream.lanes)
        position = -(-before // stream.lanes) + turn * self.sequence_length
        return source, stream.read(lane, position, self.sequence_length + 1)

    def drawn(self, steps: int) -> dict[str, Drawn]:
        """What is through of each source after that many steps of the stage, earlier stages included. Where
        the lanes are not all equally far, what the others have not read yet counts as well: a later stage leaves it
        out."""
        found = dict(self._drawn_before)
        earlier = self._interleaving.drawn(self._first)
        drawn = self._interleaving.drawn(self._first + self.sizes.before(steps))
        for (source, sequences), stream in zip(drawn.items(), self._streams, strict=True):
            lanes = stream.lanes if isinstance(stream, DocumentStream) else 1
            turns = -(-(sequences - earlier[source]) // lanes)
            tokens = self._through(source) + turns * lanes * self.sequence_length
            found[source] = Drawn(tokens=tokens, order=self._orders[source])
        return found
