"""Which documents hold problems of an evaluation set, by shared word n-grams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice, pairwise

from ling_flow.data.documents import check_read, problems_of
from ling_flow.data.filters import Decontamination
from ling_flow.data.reasoning import problem_stream
from ling_flow.data.words import is_unspaced, words_and_signs
from ling_flow.errors import UserError

SHORTEST = 3
"""Words; problems with fewer are in every text."""
CHARACTERS_PER_WORD = 3
"""In scripts where every character counts as a word: so many say as much as one word elsewhere."""
ENDS = frozenset("?.\u061f\u3002\u0964")
"""Ends of a question or sentence: Latin, Arabic, Chinese, Devanagari. (Full-width ones have become Latin.)"""


class EvaluationNgrams:
    """The word n-grams of evaluation problems (rule: `Decontamination`).

    Attributes:
        problems: how many were given.
        short: how many of them are too short to be looked for.
    """

    def __init__(self, texts: Iterable[str], ngram: int) -> None:
        self.ngrams: set[tuple[str, ...]] = set()
        self.problems = self.short = 0
        for text in texts:
            self.problems += 1
            words = words_and_signs(text)
            while words and words[-1] in ENDS:
                words.pop()
            if _says_enough(words):
                self.ngrams.update(_windows(words, min(ngram, len(words))))
            else:
                self.short += 1
        self.lengths: dict[tuple[str, ...], list[int]] = {}
        """By an n-gram's first two words: how long those are that begin so, the shortest first."""
        for length in sorted({len(words) for words in self.ngrams}):
            for beginning in {words[:2] for words in self.ngrams if len(words) == length}:
                self.lengths.setdefault(beginning, []).append(length)

    def shared(self, text: str) -> str | None:
        """The first n-gram that `text` shares, its words separated by blanks; None if there is none."""
        words = words_and_signs(text)
        pairs = list(pairwise(words))
        if self.lengths.keys().isdisjoint(pairs):
            return None
        for begin, pair in enumerate(pairs):
            for length in self.lengths.get(pair, ()):
                if tuple(words[begin : begin + length]) in self.ngrams:
                    return " ".join(words[begin : begin + length])
        return None


def _says_enough(words: list[str]) -> bool:
    """Whether a problem has `SHORTEST` words."""
    characters = sum(map(is_unspaced, words))
    return len(words) - characters + characters / CHARACTERS_PER_WORD >= SHORTEST


def _windows(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[begin : begin + length]) for begin in range(len(words) - length + 1))


def evaluation_ngrams(settings: Decontamination) -> EvaluationNgrams:
    """The n-grams of all evaluation sets that `settings` names.

    Raises:
        UserError: a file is missing or malformed, or holds nothing to look for.
    """
    texts: list[str] = []
    if settings.tasks:
        held_out = problem_stream(settings.tasks, str(settings.seed), "held_out")
        texts += [problem.question for problem in islice(held_out, settings.problems)]
    for source in settings.files:
        found = list(problems_of(source))
        check_read(source)
        if not EvaluationNgrams(found, settings.ngram).ngrams:
            raise UserError(f"filters.decontamination.files: {source.name} has no text of {SHORTEST} words or more")
        texts += found
    return EvaluationNgrams(texts, settings.ngram)
