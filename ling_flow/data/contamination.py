"""Which documents hold problems of an evaluation set, by shared word n-grams."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise

from ling_flow.data.documents import documents
from ling_flow.data.filters import Decontamination
from ling_flow.data.reasoning import problem_stream
from ling_flow.errors import UserError

WORD = re.compile(r"\w+|[^\w\s]")
SHORTEST = 3
"""Words; problems with fewer are in every text."""


class EvaluationNgrams:
    """The word n-grams of evaluation problems (rule: `Decontamination`)."""

    def __init__(self, texts: Iterable[str], ngram: int) -> None:
        self.ngrams: set[tuple[str, ...]] = set()
        for text in texts:
            words = WORD.findall(text.lower())
            while words and words[-1] == "?":
                words.pop()
            if len(words) >= SHORTEST:
                self.ngrams.update(_windows(words, min(ngram, len(words))))
        self.lengths = sorted({len(words) for words in self.ngrams})
        self.beginnings = {words[:2] for words in self.ngrams}

    def shared(self, text: str) -> str | None:
        """The first n-gram that `text` shares, its words separated by blanks; None if there is none."""
        words = WORD.findall(text.lower())
        pairs = list(pairwise(words))
        if self.beginnings.isdisjoint(pairs):
            return None
        for begin, pair in enumerate(pairs):
            if pair in self.beginnings:
                for length in self.lengths:
                    if tuple(words[begin : begin + length]) in self.ngrams:
                        return " ".join(words[begin : begin + length])
        return None


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
        found = list(documents(source, settings.seed))
        if not EvaluationNgrams(found, settings.ngram).ngrams:
            raise UserError(f"filters.decontamination.files: {source.name} has no text of {SHORTEST} words or more")
        texts += found
    return EvaluationNgrams(texts, settings.ngram)
