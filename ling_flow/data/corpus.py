"""The corpus on disk: deduplicated documents as token shards, split into train and validation.

- `tokenizer/`: Hugging Face tokenizer files
- `shards/<source>/<split>-00000.bin`: token ids, uint16 (uint32 above 65535 ids); a document ends with `<|endoftext|>`
- `shards/<source>/<split>-00000.idx.npy`: int64 [documents + 1], where each document begins, in tokens
- `corpus.json`: `CorpusStatistics`, which is also the manifest of the shards (tokens, SHA-256)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ling_flow.config import parse
from ling_flow.data.statistics import SPLITS, CorpusStatistics, SourceStatistics, Split, SplitStatistics
from ling_flow.data.tokenizer import Tokenizer
from ling_flow.errors import UserError


class Corpus:
    """A corpus on disk, opened for reading; shards are memory-mapped."""

    def __init__(self, path: Path, statistics: CorpusStatistics) -> None:
        self.path = path
        self.statistics = statistics
        self.tokenizer = Tokenizer.load(path / "tokenizer")

    @property
    def sources(self) -> list[str]:
        """Names of the sources, in the order they were given."""
        return list(self.statistics.sources)

    @classmethod
    def open(cls, path: Path) -> Corpus:
        """Open a corpus and check that every shard has the size it was written with.

        Raises:
            UserError: a file is missing or damaged; the line names it.
        """
        path = Path(path)
        try:
            text = (path / "corpus.json").read_text()
        except (OSError, UnicodeDecodeError):
            raise UserError(
                f"{path / 'corpus.json'}: cannot be read; expected the directory of a prepared corpus"
            ) from None
        corpus = cls(path, parse(CorpusStatistics, text, where=str(path / "corpus.json")))
        if corpus.tokenizer.digest != corpus.statistics.tokenizer_digest:
            raise UserError(
                f"{path / 'tokenizer' / 'tokenizer.json'}: not the tokenizer of this corpus; prepare the data again"
            )
        for name, source in corpus.statistics.sources.items():
            for split in SPLITS:
                corpus._check(name, split, getattr(source, split))
        return corpus

    def tokens(self, source: str, split: Split = "train") -> npt.NDArray[np.unsignedinteger]:
        """All tokens of one split of a source, one document after the other: [tokens], memory-mapped.

        Raises:
            UserError: the corpus has no such source.
        """
        self.require(source)
        return np.memmap(shard_path(self.path, source, split), dtype=token_dtype(self.statistics.vocab_size), mode="r")

    def document_offsets(self, source: str, split: Split = "train") -> npt.NDArray[np.int64]:
        """Where each document begins, and the end of the last: int64 [documents + 1]."""
        self.require(source)
        offsets: npt.NDArray[np.int64] = np.load(index_path(self.path, source, split), mmap_mode="r")
        return offsets

    def require(self, source: str) -> SourceStatistics:
        """Statistics of `source`, or a UserError that names the sources there are."""
        if source not in self.statistics.sources:
            raise UserError(f"{self.path}: has no source '{source}'; it has {', '.join(self.sources)}")
        return self.statistics.sources[source]

    def _check(self, source: str, split: Split, expected: SplitStatistics) -> None:
        again = "damaged or incomplete; prepare the data again"
        shard, index = shard_path(self.path, source, split), index_path(self.path, source, split)
        size = expected.tokens * token_dtype(self.statistics.vocab_size).itemsize
        if not shard.is_file():
            raise UserError(f"{shard}: missing; prepare the data again")
        if shard.stat().st_size != size:
            raise UserError(f"{shard}: has {shard.stat().st_size} bytes instead of {size}; {again}")
        if not index.is_file():
            raise UserError(f"{index}: missing; prepare the data again")
        try:
            offsets = np.load(index, mmap_mode="r")
        except (ValueError, EOFError, OSError):
            raise UserError(f"{index}: {again}") from None
        if offsets.shape != (expected.documents + 1,) or offsets[-1] != expected.tokens:
            raise UserError(f"{index}: does not match its shard; {again}")


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Two bytes per token where they are enough."""
    return np.dtype("<u2") if vocab_size <= 65535 else np.dtype("<u4")


def shard_path(path: Path, source: str, split: Split) -> Path:
    """Where the tokens of one split of a source lie in the corpus at `path`."""
    return path / "shards" / source / f"{split}-00000.bin"


def index_path(path: Path, source: str, split: Split) -> Path:
    """Where its documents begin."""
    return shard_path(path, source, split).with_suffix(".idx.npy")
