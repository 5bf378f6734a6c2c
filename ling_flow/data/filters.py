"""Which documents of text sources are left out: typed declarations, light to import.

Filters look at files and the standard library, never at procedural problems: those are alike by design, and none of
their questions is a held-out one (a step of a solution may be).
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from ling_flow.config import StrictModel
from ling_flow.data.reasoning import TaskSpec
from ling_flow.data.sources import FilesSource


class NearDuplicates(StrictModel):
    """MinHash signatures of word n-grams; a document that is near one that the corpus holds is left out."""

    threshold: float = Field(0.8, gt=0, le=1, description="estimated Jaccard similarity from which on two are one")
    ngram: int = Field(5, ge=1, description="words per n-gram; of scripts without blanks, characters")
    permutations: int = Field(128, ge=16, description="size of a signature: more for a sharper estimate")

    @field_validator("permutations")
    @classmethod
    def _multiple_of_16(cls, value: int) -> int:
        if value % 16:
            raise ValueError(f"must be a multiple of 16 (got {value})")
        return value


class Decontamination(StrictModel):
    """Documents that share a word n-gram with a problem of an evaluation set are left out.

    Words are runs of letters, digits and underscores, and single signs, in lower case and one Unicode form; in scripts
    without blanks (Chinese, Thai, …) single characters. A question mark or full stop at a problem's end does not count.
    A problem shorter than `ngram` words is one n-gram, whole, if it has 3 words (9 of those characters) or more.
    """

    ngram: int = Field(13, ge=3, description="words per n-gram; of scripts without blanks, characters")
    tasks: tuple[TaskSpec, ...] = Field((), description="families of held-out problems, as in evaluate.tasks")
    problems: int = Field(
        1000, ge=1, description="held-out problems, at most; the first of them are what evaluate asks"
    )
    seed: int = Field(1, ge=0, lt=2**32, description="seed that draws the held-out problems, as in evaluate.seed")
    files: tuple[FilesSource, ...] = Field(
        (), description="evaluation sets of your own; each document is a problem, in a text each line"
    )

    @model_validator(mode="after")
    def _against_something(self) -> Self:
        if not self.tasks and not self.files:
            raise ValueError("needs tasks or files to compare with")
        return self


class QualityFilter(StrictModel):
    """Bounds of the quality counters, each held by every document; null: not looked at."""

    min_mean_line_length: float | None = Field(None, gt=0, description="characters per line that is not blank")
    max_mean_line_length: float | None = Field(None, gt=0, description="characters per line that is not blank")
    min_alphabetic_share: float | None = Field(None, gt=0, le=1, description="letters of any script, of all characters")
    max_repeated_line_share: float | None = Field(None, ge=0, lt=1, description="lines that stand further up, of all")


class Filters(StrictModel):
    """What is left out besides exact duplicates."""

    near_duplicates: NearDuplicates | None = Field(None, description="leave out near duplicates; null: keep them")
    decontamination: Decontamination | None = Field(
        None, description="leave out documents that hold evaluation problems; null: keep them"
    )
    quality: QualityFilter | None = Field(
        None, description="leave out documents by their quality counters; null: only count"
    )
