"""Counters of text quality that hold for any language."""

from __future__ import annotations

from typing import NamedTuple

from ling_flow.data.filters import QualityFilter

NOT_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())


class Counts(NamedTuple):
    """What is counted in a text; counts of several texts add up field by field."""

    characters: int = 0
    alphabetic: int = 0
    lines: int = 0
    line_characters: int = 0
    repeated_lines: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def mean_line_length(self) -> float:
        """Characters per line that is not blank."""
        return self.line_characters / max(self.lines, 1)

    @property
    def alphabetic_share(self) -> float:
        """Letters of any script, of all characters."""
        return self.alphabetic / max(self.characters, 1)

    @property
    def repeated_line_share(self) -> float:
        """Lines that stand further up in the same text, of all that are not blank."""
        return self.repeated_lines / max(self.lines, 1)


def count(text: str) -> Counts:
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    if text.isascii():
        alphabetic = len(text.encode("ascii").translate(None, delete=NOT_LETTERS))
    else:
        alphabetic = sum(map(str.isalpha, text))
    return Counts(
        characters=len(text),
        alphabetic=alphabetic,
        lines=len(lines),
        line_characters=sum(map(len, lines)),
        repeated_lines=len(lines) - len(set(lines)),
    )


def passes(counts: Counts, bounds: QualityFilter) -> bool:
    """Whether a text is within all bounds."""
    length, letters = counts.mean_line_length, counts.alphabetic_share
    return (
        (bounds.min_mean_line_length is None or length >= bounds.min_mean_line_length)
        and (bounds.max_mean_line_length is None or length <= bounds.max_mean_line_length)
        and (bounds.min_alphabetic_share is None or letters >= bounds.min_alphabetic_share)
        and (bounds.max_repeated_line_share is None or counts.repeated_line_share <= bounds.max_repeated_line_share)
    )
