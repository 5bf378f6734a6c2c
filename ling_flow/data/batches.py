"""Batches as a pure function of corpus, mixture, seed and step: no loader state, so resuming is one integer.

A source's stream is cut into windows of S+1 tokens that overlap by one (S tokens to read, S to predict). An epoch
visits the windows in an order drawn from (seed, source, epoch). Which source a sequence comes from is fixed by a
periodic pattern that keeps every prefix within one sequence of the mixture.

Legend: B sequences per batch, S sequence length.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from ling_flow.data.corpus import Corpus, Split
from ling_flow.errors import UserError

LONGEST_PERIOD = 16384
"""Shares of a mixture are exact where they have a common denominator up to this, else rounded to 1/16384."""


class Batches:
    """Training or validation batches drawn from a mixture of sources.

    Args:
        mixture: weight per source, in any unit; sources of weight 0 are left out.
        sequence_length: S, tokens to predict per sequence.
        first_sequence: number of the first sequence of step 0; a later stage goes on where an earlier one ended.

    Raises:
        UserError: an unknown source, weights that are no mixture, or a source shorter than one window.
    """

    def __init__(
        self,
        corpus: Corpus,
        mixture: Mapping[str, float],
        sequence_length: int,
        sequences_per_batch: int,
        seed: int,
        split: Split = "train",
        first_sequence: int = 0,
    ) -> None:
        self.corpus, self.seed = corpus, seed
        self.sequence_length, self.sequences_per_batch, self.first_sequence = (
            sequence_length,
            sequences_per_batch,
            first_sequence,
        )
        for source in mixture:
            corpus.require(source)
        self.sources, periods = mixture_periods(mixture)
        self._tokens = [corpus.tokens(source, split) for source in self.sources]
        self._windows = [(len(tokens) - 1) // sequence_length for tokens in self._tokens]
        for source, tokens, windows in zip(self.sources, self._tokens, self._windows, strict=True):
            if windows < 1:
                raise UserError(
                    f"sequence_length: {sequence_length} + 1 tokens do not fit in source '{source}', "
                    f"which has {len(tokens)} {split} tokens"
                )
        self._share = periods
        self._source_at, self._rank_at = interleave(periods)
        self._order = functools.lru_cache(maxsize=2 * len(self.sources))(self._permutation)

    def batch(self, step: int) -> torch.Tensor:
        """int64 [B, S+1]: the sequences of `step`, each with the token after its last."""
        first = self.first_sequence + step * self.sequences_per_batch
        tokens_BS1 = np.empty((self.sequences_per_batch, self.sequence_length + 1), dtype=np.int64)
        for row in range(self.sequences_per_batch):
            source, window = self._place(first + row)
            begin = window * self.sequence_length
            tokens_BS1[row] = self._tokens[source][begin : begin + self.sequence_length + 1]
        return torch.from_numpy(tokens_BS1)

    def place(self, sequence: int) -> tuple[str, int]:
        """(source, window) that sequence number `sequence`, counted from 0 over the whole run, is read from."""
        source, window = self._place(sequence)
        return self.sources[source], window

    def _place(self, sequence: int) -> tuple[int, int]:
        period, at = divmod(sequence, len(self._source_at))
        source = int(self._source_at[at])
        drawn_before = period * self._share[source] + int(self._rank_at[at])
        epoch, position = divmod(drawn_before, self._windows[source])
        return source, int(self._order(source, epoch)[position])

    def _permutation(self, source: int, epoch: int) -> npt.NDArray[np.int64]:
        key = hashlib.sha256(f"{self.seed}/{self.sources[source]}/{epoch}".encode()).digest()
        return np.random.default_rng(int.from_bytes(key)).permutation(self._windows[source])


def mixture_periods(mixture: Mapping[str, float]) -> tuple[list[str], list[int]]:
    """Sources of positive weight, and how often each occurs in one period of the pattern.

    Raises:
        UserError: a weight is negative, not finite, or too small to ever be drawn; or all are zero.
    """
    for source, weight in mixture.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"mixture.{source}: weight must be a finite number, 0 or more (got {weight})")
    total = sum(mixture.values())
    if total <= 0:
        raise UserError("mixture: at least one source must have a weight above 0")
    names = [source for source, weight in mixture.items() if weight > 0]
    shares = [mixture[source] / total for source in names]
    exact = [Fraction(share).limit_denominator(1000) for share in shares]
    period = math.lcm(*(share.denominator for share in exact))
    is_exact = sum(exact) == 1 and all(abs(a - b) < 1e-9 for a, b in zip(exact, shares, strict=True))
    if is_exact and min(exact) > 0 and period <= LONGEST_PERIOD:
        return names, [int(share * period) for share in exact]
    counts = [math.floor(share * LONGEST_PERIOD) for share in shares]
    by_remainder = sorted(range(len(names)), key=lambda at: counts[at] - shares[at] * LONGEST_PERIOD)
    for at in by_remainder[: LONGEST_PERIOD - sum(counts)]:
        counts[at] += 1
    for source, count in zip(names, counts, strict=True):
        if count == 0:
            raise UserError(
                f"mixture.{source}: its share is below 1/{LONGEST_PERIOD} and would never be drawn; "
                "raise it or set it to 0"
            )
    return names, counts


def interleave(counts: list[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A pattern of length P = sum(counts) that holds source i `counts[i]` times, every prefix within one of its share.

    The j-th occurrence of source i may not come before j·P/counts[i] and must come before (j+1)·P/counts[i]; taking the
    one with the earliest deadline meets all of them (the Pfair schedule of one resource).

    Returns:
        source_at [P]: which source; rank_at [P]: how often it occurred before.
    """
    period = sum(counts)
    drawn = [0] * len(counts)
    source_at = np.empty(period, dtype=np.int64)
    rank_at = np.empty(period, dtype=np.int64)
    for slot in range(period):
        released = [i for i, count in enumerate(counts) if drawn[i] < count and drawn[i] * period // count <= slot]
        chosen = min(released, key=lambda i: -(-(drawn[i] + 1) * period // counts[i]))
        source_at[slot], rank_at[slot] = chosen, drawn[chosen]
        drawn[chosen] += 1
    return source_at, rank_at
