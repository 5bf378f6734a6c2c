"""Near duplicates: MinHash signatures by rensa, looked up by locality-sensitive hashing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ling_flow.data.filters import NearDuplicates
from ling_flow.data.words import words

SEED = 42
"""Of the permutations. Fixed: which documents are near each other is no matter of chance."""
FOUND = 0.9
"""Least probability with which a pair exactly at the threshold is looked at; pairs above it are found more surely."""

ALIKE = 100
"""Kept documents in one band of a signature, at most: the first ones. Texts of one template have bands in common, and
to compare each with all would take time by the square of their number; a near duplicate shares other bands, too."""


def signatures(texts: Sequence[str], settings: NearDuplicates) -> npt.NDArray[np.uint32]:
    """MinHash signatures [texts, permutations]: the share of equal entries estimates the Jaccard similarity."""
    from rensa import RMinHash

    digests = RMinHash.digests_from_token_sets(
        [_shingles(text, settings.ngram) for text in texts], settings.permutations, SEED
    )
    return np.array(digests, dtype=np.uint32).reshape(len(texts), settings.permutations)


def _shingles(text: str, ngram: int) -> list[str]:
    found = words(text)
    if len(found) <= ngram:
        return [" ".join(found) or text]
    return [" ".join(found[begin : begin + ngram]) for begin in range(len(found) - ngram + 1)]


def rows_per_band(threshold: float, permutations: int) -> int:
    """The longest bands (fewest false candidates) that still find a pair at the threshold with probability `FOUND`."""
    for rows in (16, 8, 4, 2):
        if 1 - (1 - threshold**rows) ** (permutations // rows) >= FOUND:
            return rows
    return 1


class NearIndex:
    """The signatures of the documents kept so far. About 4 KiB of memory per document.

    Attributes:
        partly: kept documents that were compared with a part of those that look alike (`ALIKE`).
    """

    def __init__(self, settings: NearDuplicates) -> None:
        self.settings = settings
        self.rows = rows_per_band(settings.threshold, settings.permutations)
        self.bands: list[dict[bytes, list[int]]] = [{} for _ in range(settings.permutations // self.rows)]
        self.partly = 0
        self._kept = bytearray()  # grows in place, which an array of numpy's does not

    @property
    def documents(self) -> int:
        """How many are kept."""
        return len(self._kept) // (4 * self.settings.permutations)

    def add(self, signature_P: npt.NDArray[np.uint32]) -> bool:
        """Keep a document, unless one that is near it was kept before: then False."""
        keys = [row.tobytes() for row in signature_P.reshape(len(self.bands), self.rows)]
        alike = [band.get(key, ()) for band, key in zip(self.bands, keys, strict=True)]
        candidates = sorted({at for numbers in alike for at in numbers})
        if candidates:
            kept_NP = np.frombuffer(self._kept, dtype=np.uint32).reshape(-1, len(signature_P))
            equal_NP = kept_NP[candidates] == signature_P
            if equal_NP.mean(axis=1).max() >= self.settings.threshold:
                return False
            del kept_NP  # while it looks at them, `_kept` cannot grow
        self.partly += any(len(numbers) == ALIKE for numbers in alike)
        for band, key, numbers in zip(self.bands, keys, alike, strict=True):
            if len(numbers) < ALIKE:
                band.setdefault(key, []).append(self.documents)
        self._kept += signature_P.tobytes()
        return True
