"""Which source each sequence of a stage is drawn from: a fixed pattern that keeps every prefix within one sequence of
the mixture, also where the mixture moves while the stage runs."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ling_flow.errors import UserError

LONGEST_PERIOD = 16384
"""Shares of a constant mixture are exact where they have a common denominator up to this, else rounded to 1/16384."""
PHASES = 64
"""Steps, at most, in which a mixture moves from its start to its end."""


class Interleaving:
    """The pattern of one stage.

    A mixture that moves does so in up to 64 phases of equal length, each a whole number of periods in which every
    source has a whole number of places: within a phase shares are constant, multiples of 1/period.

    Args:
        start: weight per source, in any unit; sources that are 0 at both ends are left out.
        end: weights at the end of the stage; None: those of the start. Shares move linearly.
        sequences: of the whole stage; needed where the mixture moves.

    Raises:
        UserError: weights that are no mixture, or a stage too short to move in.
    """

    def __init__(
        self, start: Mapping[str, float], end: Mapping[str, float] | None = None, sequences: int | None = None
    ) -> None:
        self._begins = [0]  # first sequence of each phase
        if end is None or _shares(start, "mixture") == _shares(end, "mixture_end"):
            self.sources, counts = mixture_periods(start)
            self._counts = [counts]
        else:
            self.sources, self._counts, length = _moving(start, end, sequences)
            self._begins = [phase * length for phase in range(len(self._counts))]
        self._patterns = [interleave(counts) for counts in self._counts]
        self._drawn = np.zeros((len(self._counts), len(self.sources)), dtype=np.int64)  # before each phase
        for phase in range(1, len(self._counts)):
            periods = (self._begins[phase] - self._begins[phase - 1]) // sum(self._counts[phase - 1])
            self._drawn[phase] = self._drawn[phase - 1] + periods * np.array(self._counts[phase - 1])

    def place(self, sequence: int) -> tuple[int, int]:
        """(index of the source, sequences drawn from it before) of sequence number `sequence`."""
        phase = bisect.bisect_right(self._begins, sequence) - 1
        source_at, rank_at = self._patterns[phase]
        period, at = divmod(sequence - self._begins[phase], len(source_at))
        source = int(source_at[at])
        return source, int(self._drawn[phase, source]) + period * self._counts[phase][source] + int(rank_at[at])

    def drawn(self, sequences: int) -> dict[str, int]:
        """How many of the first `sequences` come from each source."""
        phase = bisect.bisect_right(self._begins, sequences) - 1
        source_at, _ = self._patterns[phase]
        periods, rest = divmod(sequences - self._begins[phase], len(source_at))
        counts = self._drawn[phase] + periods * np.array(self._counts[phase])
        counts += np.bincount(source_at[:rest], minlength=len(self.sources))
        return dict(zip(self.sources, counts.tolist(), strict=True))

    def shares(self, sequence: int) -> dict[str, float]:
        """The mixture in force at a sequence; sums to 1."""
        counts = self._counts[bisect.bisect_right(self._begins, sequence) - 1]
        return {source: count / sum(counts) for source, count in zip(self.sources, counts, strict=True)}


def _shares(mixture: Mapping[str, float], field: str) -> dict[str, float]:
    for source, weight in mixture.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{field}.{source}: weight must be a finite number, 0 or more (got {weight})")
    total = sum(mixture.values())
    if total <= 0:
        raise UserError(f"{field}: at least one source must have a weight above 0")
    return {source: weight / total for source, weight in mixture.items() if weight > 0}


def _moving(
    start: Mapping[str, float], end: Mapping[str, float], sequences: int | None
) -> tuple[list[str], list[list[int]], int]:
    """Sources, their places per period in each phase, and sequences per phase."""
    first, last = _shares(start, "mixture"), _shares(end, "mixture_end")
    names = [name for name in dict.fromkeys([*start, *end]) if name in first or name in last]
    if sequences is None or sequences < 4 * len(names):
        raise UserError(
            f"mixture_end: {sequences} sequences are too few to move a mixture of {len(names)} sources; "
            "leave it out or lengthen the stage"
        )
    # Phases for a fine course, places per period for fine shares: about the square root of the stage each.
    phases = min(PHASES, max(2, math.isqrt(sequences) // 2))
    periods = -(-sequences // (phases * LONGEST_PERIOD))
    period = max(len(names), sequences // (phases * periods))
    counts, owed = [], np.zeros(len(names))
    for phase in range(phases):
        at = (phase + 0.5) / phases
        wanted = np.array([period * ((1 - at) * first.get(name, 0.0) + at * last.get(name, 0.0)) for name in names])
        # What rounding owes is carried on, so that the whole stage has its share of each source.
        counts.append(_rounded(np.maximum(wanted + owed, 0), period))
        owed += wanted - counts[-1]
    return names, counts, periods * period


def _rounded(wanted: npt.NDArray[np.float64], total: int) -> list[int]:
    """Whole numbers that sum to `total`, by largest remainder."""
    wanted = wanted * (total / wanted.sum())
    counts = np.floor(wanted).astype(np.int64)
    for at in np.argsort(counts - wanted, kind="stable")[: total - int(counts.sum())]:
        counts[at] += 1
    return [int(count) for count in counts]


def mixture_periods(mixture: Mapping[str, float]) -> tuple[list[str], list[int]]:
    """Sources of positive weight, and how often each occurs in one period of the pattern.

    Raises:
        UserError: a weight is negative, not finite, or too small to ever be drawn; or all are zero.
    """
    share_of = _shares(mixture, "mixture")
    names, shares = list(share_of), list(share_of.values())
    exact = [Fraction(share).limit_denominator(1000) for share in shares]
    period = math.lcm(*(share.denominator for share in exact))
    is_exact = sum(exact) == 1 and all(abs(a - b) < 1e-9 for a, b in zip(exact, shares, strict=True))
    if is_exact and min(exact) > 0 and period <= LONGEST_PERIOD:
        return names, [int(share * period) for share in exact]
    counts = _rounded(np.array(shares) * LONGEST_PERIOD, LONGEST_PERIOD)
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
