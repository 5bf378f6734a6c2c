"""Near duplicates: MinHash signatures by rensa, looked up by locality-sensitive hashing."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ling_flow.data.filters import NearDuplicates

WORD = re.compile(r"\w+")
SEED = 42
"""Of the permutations. Fixed: which documents are near each other is no matter of chance."""
FOUND = 0.9
"""Least probability with which a pair exactly at the threshold is looked at; pairs above it are found more surely."""


def signatures(texts: Sequence[str], settings: NearDuplicates) -> npt.NDArray[np.uint32]:
    """MinHash signatures [texts, permutations]: the share of equal entries estimates the Jaccard similarity."""
    from rensa import RMinHash

    digests = RMinHash.digests_from_token_sets(
        [_shingles(text, settings.ngram) for text in texts], settings.permutations, SEED
    )
    return np.array(digests, dtype=np.uint32).reshape(len(texts), settings.permutations)


def _shingles(text: str, ngram: int) -> list[str]:
    words = WORD.findall(text.lower())
    if len(words) <= ngram:
        return [" ".join(words) or text]
    return [" ".join(words[begin : begin + ngram]) for begin in range(len(words) - ngram + 1)]


def rows_per_band(threshold: float, permutations: int) -> int:
    """The longest bands (fewest false candidates) that still find a pair at the threshold with probability `FOUND`."""
    for rows in (16, 8, 4, 2):
        if 1 - (1 - threshold**rows) ** (permutations // rows) >= FOUND:
            return rows
    return 1


class NearIndex:
    """The signatures of the documents kept so far. About 4 KiB of memory per document."""

    def __init__(self, settings: NearDuplicates) -> None:
        self.settings = settings
        self.rows = rows_per_band(settings.threshold, settings.permutations)
        self.bands: list[dict[bytes, list[int]]] = [{} for _ in range(settings.permutations // self.rows)]
        self.kept: list[npt.NDArray[np.uint32]] = []

    def add(self, signature_P: npt.NDArray[np.uint32]) -> bool:
        """Keep a document, unless one that is near it was kept before: then False."""
        keys = [row.tobytes() for row in signature_P.reshape(len(self.bands), self.rows)]
        candidates = {at for band, key in zip(self.bands, keys, strict=True) for at in band.get(key, ())}
        if candidates:
            equal_NP = np.stack([self.kept[at] for at in candidates]) == signature_P
            if equal_NP.mean(axis=1).max() >= self.settings.threshold:
                return False
        for band, key in zip(self.bands, keys, strict=True):
            band.setdefault(key, []).append(len(self.kept))
        self.kept.append(signature_P.copy())  # not a view that keeps the whole batch alive
        return True
