"""The corpus: deduplicated documents as token shards on disk, split into train and validation.

- `tokenizer/`: Hugging Face tokenizer files
- `shards/<source>/<split>-00000.bin`: token ids, uint16 (uint32 above 65535 ids); a document ends with `<|endoftext|>`
- `shards/<source>/<split>-00000.idx.npy`: int64 [documents + 1], where each document begins, in tokens
- `corpus.json`: `CorpusStatistics`
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ling_flow.config import StrictModel, parse
from ling_flow.data.chat import SPECIAL_TOKENS, THINK_TOKENS, chat_template_digest
from ling_flow.data.documents import documents, is_rendered
from ling_flow.data.sources import Source
from ling_flow.data.tokenizer import Tokenizer, train_tokenizer
from ling_flow.errors import UserError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
ENCODE_AT_ONCE = 512
"""Documents per call of the tokenizer."""
COUNT_AT_ONCE = 2**24
"""Tokens per call of bincount, which widens them to 8 bytes."""

Progress = Callable[[int, int, str], None]


class SplitStatistics(StrictModel):
    """One split of one source."""

    documents: int = Field(description="documents")
    tokens: int = Field(description="tokens, end-of-text tokens included")
    digest: str = Field(description="SHA-256 of the shard")


class SourceStatistics(StrictModel):
    """One source."""

    train: SplitStatistics
    validation: SplitStatistics
    duplicates: int = Field(description="documents left out because the corpus already held them")
    unigram_entropy: float = Field(
        description="cross-entropy of its validation tokens under its own training unigram, nats per token"
    )

    @property
    def tokens(self) -> int:
        return self.train.tokens + self.validation.tokens

    @property
    def documents(self) -> int:
        return self.train.documents + self.validation.documents


class CorpusStatistics(StrictModel):
    """What `corpus.json` holds."""

    schema_version: Literal[1] = 1
    vocab_size: int = Field(description="token ids of the tokenizer")
    tokenizer_digest: str = Field(description="SHA-256 of tokenizer.json")
    chat_template_digest: str = Field(description="SHA-256 of the chat template")
    unigram_entropy: float = Field(
        description="cross-entropy of all validation tokens under the unigram of all training tokens, nats per token"
    )
    sources: dict[str, SourceStatistics]

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources.values())

    @property
    def documents(self) -> int:
        return sum(source.documents for source in self.sources.values())

    @property
    def duplicates(self) -> int:
        return sum(source.duplicates for source in self.sources.values())

    @property
    def digest(self) -> str:
        """SHA-256 over the tokenizer and all shards."""
        parts = [self.tokenizer_digest]
        for name, source in sorted(self.sources.items()):
            parts += [name, source.train.digest, source.validation.digest]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


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
        return np.memmap(_shard(self.path, source, split), dtype=_dtype(self.statistics.vocab_size), mode="r")

    def document_offsets(self, source: str, split: Split = "train") -> npt.NDArray[np.int64]:
        """Where each document begins, and the end of the last: int64 [documents + 1]."""
        self.require(source)
        offsets: npt.NDArray[np.int64] = np.load(_index(self.path, source, split), mmap_mode="r")
        return offsets

    def require(self, source: str) -> SourceStatistics:
        """Statistics of `source`, or a UserError that names the sources there are."""
        if source not in self.statistics.sources:
            raise UserError(f"{self.path}: has no source '{source}'; it has {', '.join(self.sources)}")
        return self.statistics.sources[source]

    def _check(self, source: str, split: Split, expected: SplitStatistics) -> None:
        again = "damaged or incomplete; prepare the data again"
        shard, index = _shard(self.path, source, split), _index(self.path, source, split)
        size = expected.tokens * _dtype(self.statistics.vocab_size).itemsize
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


def _dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u2") if vocab_size <= 65535 else np.dtype("<u4")


def _shard(path: Path, source: str, split: Split) -> Path:
    return path / "shards" / source / f"{split}-00000.bin"


def _index(path: Path, source: str, split: Split) -> Path:
    return _shard(path, source, split).with_suffix(".idx.npy")


def build_corpus(
    path: Path,
    sources: Sequence[Source],
    *,
    vocab_size: int,
    validation_share: float,
    tokenizer_characters: int,
    seed: int,
    tokenizer: Tokenizer | None = None,
    progress: Progress = lambda done, total, text: None,
) -> Corpus:
    """Read `sources`, learn a tokenizer from a sample of all of them, and write the corpus directory `path`.

    `path` must not exist or be empty; it appears whole or not at all. `tokenizer_characters` is the size of the
    sample in all; with a `tokenizer`, none is learnt. `progress(done, total, text)` is told about every source.

    Raises:
        UserError: a source cannot be read, or has too few documents to split.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: must be an empty or new directory")
    working = path.with_name(f".{path.name}.partial")
    shutil.rmtree(working, ignore_errors=True)
    try:
        total = len(sources) + 1
        if tokenizer is None:
            progress(0, total, "training the tokenizer")
            per_source = tokenizer_characters // len(sources)
            sample = (text for source in sources for text in _sample(source, seed, per_source, validation_share))
            tokenizer = train_tokenizer(sample, vocab_size)
        tokenizer.save(working / "tokenizer")
        writer = _Writer(working, tokenizer, validation_share, seed)
        for done, source in enumerate(sources, start=1):
            for read, tokens in writer.write(source):
                progress(done, total, f"{source.name}: {read:,} documents, {tokens:,} tokens")
        (working / "corpus.json").write_text(writer.statistics().model_dump_json(indent=2) + "\n")
        working.rename(path)  # onto an empty directory, too
        progress(total, total, "corpus written")
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    return Corpus.open(path)


def _sample(source: Source, seed: int, characters: int, validation_share: float) -> Iterator[str]:
    """The first training documents of a source, about `characters` long in all, special tokens cut out."""
    special = re.compile("|".join(map(re.escape, (*SPECIAL_TOKENS, *THINK_TOKENS))))
    for text in documents(source, seed):
        if not _is_validation(_digest(text), validation_share):
            yield from special.split(text) if is_rendered(source) else [text]
            characters -= len(text)
        if characters <= 0:
            return


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _is_validation(digest: bytes, share: float) -> bool:
    """A document's split depends on its text alone."""
    return int.from_bytes(digest[:8]) < share * 2**64


class _Writer:
    """Writes one source after the other; remembers which documents the corpus holds."""

    def __init__(self, path: Path, tokenizer: Tokenizer, validation_share: float, seed: int) -> None:
        self.path, self.tokenizer, self.validation_share, self.seed = path, tokenizer, validation_share, seed
        self.seen: set[bytes] = set()
        self.written: dict[str, SourceStatistics] = {}
        self.counts = {split: np.zeros(tokenizer.vocab_size, dtype=np.int64) for split in SPLITS}

    def write(self, source: Source) -> Iterator[tuple[int, int]]:
        """Write `source`, yielding (documents, tokens) written so far."""
        encode = self.tokenizer.encode_rendered_batch if is_rendered(source) else self.tokenizer.encode_batch
        stream, duplicates = documents(source, self.seed), 0
        _shard(self.path, source.name, "train").parent.mkdir(parents=True)
        with contextlib.ExitStack() as stack:
            train, validation = (
                stack.enter_context(_SplitWriter(self.path, source.name, split, self.tokenizer)) for split in SPLITS
            )
            # The training document of lowest hash is kept back: it becomes validation if nothing else does.
            spare: tuple[bytes, list[int]] | None = None
            while texts := list(islice(stream, ENCODE_AT_ONCE)):
                by_digest = {_digest(text): text for text in texts}
                new = {digest: text for digest, text in by_digest.items() if digest not in self.seen}
                self.seen.update(new)
                duplicates += len(texts) - len(new)
                for digest, ids in zip(new, encode(list(new.values())), strict=True):
                    if _is_validation(digest, self.validation_share):
                        validation.add(ids)
                    elif validation.documents or (spare and spare[0] < digest):
                        train.add(ids)
                    else:
                        if spare:
                            train.add(spare[1])
                        spare = (digest, ids)
                yield train.documents + validation.documents, train.offsets[-1] + validation.offsets[-1]
            if spare:
                (train if validation.documents else validation).add(spare[1])
            if not train.documents or not validation.documents:
                raise UserError(
                    f"sources.{source.name}: gives {train.documents} training and {validation.documents} validation "
                    "documents; at least one of each is needed: add documents or change validation_share"
                )
        counts = {split: self._count(source.name, split) for split in SPLITS}
        for split in SPLITS:
            self.counts[split] += counts[split]
        self.written[source.name] = SourceStatistics(
            train=train.statistics(),
            validation=validation.statistics(),
            duplicates=duplicates,
            unigram_entropy=unigram_cross_entropy(counts["train"], counts["validation"]),
        )

    def _count(self, source: str, split: Split) -> npt.NDArray[np.int64]:
        """How often each token occurs in a finished shard: int64 [V]."""
        counts_V = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        tokens = np.memmap(_shard(self.path, source, split), dtype=_dtype(self.tokenizer.vocab_size), mode="r")
        for begin in range(0, len(tokens), COUNT_AT_ONCE):
            counts_V += np.bincount(tokens[begin : begin + COUNT_AT_ONCE], minlength=len(counts_V))
        return counts_V

    def statistics(self) -> CorpusStatistics:
        return CorpusStatistics(
            vocab_size=self.tokenizer.vocab_size,
            tokenizer_digest=self.tokenizer.digest,
            chat_template_digest=chat_template_digest(),
            unigram_entropy=unigram_cross_entropy(self.counts["train"], self.counts["validation"]),
            sources=self.written,
        )


class _SplitWriter:
    """Appends documents to one shard."""

    def __init__(self, path: Path, source: str, split: Split, tokenizer: Tokenizer) -> None:
        self.shard, self.index = _shard(path, source, split), _index(path, source, split)
        self.end_of_text, self.dtype = tokenizer.eos_id, _dtype(tokenizer.vocab_size)
        self.offsets = [0]
        self.digest = hashlib.sha256()

    def __enter__(self) -> _SplitWriter:
        self.stream: IO[bytes] = self.shard.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        np.save(self.index, np.array(self.offsets, dtype=np.int64))

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    def add(self, ids: list[int]) -> None:
        tokens = np.array([*ids, self.end_of_text], dtype=self.dtype)
        self.stream.write(tokens.tobytes())
        self.digest.update(tokens.tobytes())
        self.offsets.append(self.offsets[-1] + len(tokens))

    def statistics(self) -> SplitStatistics:
        return SplitStatistics(documents=self.documents, tokens=self.offsets[-1], digest=self.digest.hexdigest())


def unigram_cross_entropy(train_counts_V: npt.NDArray[np.int64], validation_counts_V: npt.NDArray[np.int64]) -> float:
    """Cross-entropy, in nats per token, of validation tokens under the add-one smoothed unigram of the training tokens.

    What a model that ignores its context reaches: a trained model has to be below it.
    """
    log_probability_V = np.log(train_counts_V + 1) - np.log(train_counts_V.sum() + len(train_counts_V))
    return float(-(validation_counts_V * log_probability_V).sum() / validation_counts_V.sum())
