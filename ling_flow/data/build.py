"""From sources to a corpus on disk: read, leave out, tokenise, write."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from ling_flow.data import quality
from ling_flow.data.chat import SPECIAL_TOKENS, THINK_TOKENS, chat_template_digest
from ling_flow.data.contamination import evaluation_ngrams
from ling_flow.data.corpus import Corpus, index_path, shard_path, token_dtype
from ling_flow.data.documents import check_read, documents, is_rendered
from ling_flow.data.examine import Batch, Examined, Examiner, Examiners
from ling_flow.data.files import Reading
from ling_flow.data.filters import Filters
from ling_flow.data.near_duplicates import NearIndex
from ling_flow.data.sources import ReasoningSource, Source
from ling_flow.data.statistics import (
    SPLITS,
    Contaminated,
    CorpusStatistics,
    FilterStatistics,
    SourceStatistics,
    Split,
    SplitStatistics,
)
from ling_flow.data.tokenizer import Tokenizer, train_tokenizer
from ling_flow.errors import UserError

BATCH_DOCUMENTS, BATCH_CHARACTERS = 512, 1_000_000
"""A batch of documents is full at either."""
COUNT_AT_ONCE = 2**24
"""Tokens per call of bincount, which widens them to 8 bytes."""
SAMPLES, SAMPLE_CHARACTERS = 3, 400

Progress = Callable[[int, int, str], None]


def build_corpus(
    path: Path,
    sources: Sequence[Source],
    *,
    vocab_size: int,
    validation_share: float,
    tokenizer_characters: int,
    seed: int,
    tokenizer: Tokenizer | None = None,
    filters: Filters | None = None,
    workers: int = 1,
    progress: Progress = lambda done, total, text: None,
) -> Corpus:
    """Read `sources`, learn a tokenizer from a sample of all of them, and write the corpus directory `path`.

    `path` must not exist or be empty; it appears whole or not at all, and is the same for any number of `workers`
    (processes that tokenise, see `Examiners`). `tokenizer_characters` is the size of the sample in all; with a
    `tokenizer`, none is learnt. `progress(done, total, text)` is told about every source.

    Raises:
        UserError: a source cannot be read, changes while it is, or has too few documents to split.
        SystemFault: a process that tokenises was killed.
    """
    path, filters = Path(path), filters or Filters()
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
        evaluation = evaluation_ngrams(filters.decontamination) if filters.decontamination else None
        examiner = Examiner(tokenizer, filters, evaluation)
        with Examiners(examiner, workers, working / "tokenizer") as examiners:
            writer = _Writer(working, examiners, validation_share, seed)
            for done, source in enumerate(sources, start=1):
                for text in writer.write(source):
                    progress(done, total, text)
        statistics = writer.statistics().model_dump_json(indent=2, exclude_none=True)
        (working / "corpus.json").write_text(statistics + "\n")
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

    def __init__(self, path: Path, examiners: Examiners, validation_share: float, seed: int) -> None:
        self.path, self.examiners, self.validation_share, self.seed = path, examiners, validation_share, seed
        self.tokenizer = examiners.examiner.tokenizer
        self.seen: set[bytes] = set()
        near = examiners.examiner.filters.near_duplicates
        self.near = NearIndex(near) if near else None
        self.written: dict[str, SourceStatistics] = {}
        self.counts = {split: np.zeros(self.tokenizer.vocab_size, dtype=np.int64) for split in SPLITS}

    def write(self, source: Source) -> Iterator[str]:
        """Write `source`, yielding a line about how far it is after every batch."""
        account, reading, started = _Account(), Reading(), time.monotonic()
        shard_path(self.path, source.name, "train").parent.mkdir(parents=True)
        with contextlib.ExitStack() as stack:
            train, validation = (
                stack.enter_context(_SplitWriter(self.path, source.name, split, self.tokenizer)) for split in SPLITS
            )
            # The training document of lowest hash is kept back: it becomes validation if nothing else does.
            spare: tuple[bytes, npt.NDArray[np.unsignedinteger]] | None = None
            for batch, examined in self.examiners.map(self._new_documents(source, reading, account)):
                for digest, ids in self._kept(batch, examined, account):
                    if _is_validation(digest, self.validation_share):
                        validation.add(ids)
                    elif validation.documents or (spare and spare[0] < digest):
                        train.add(ids)
                    else:
                        if spare:
                            train.add(spare[1])
                        spare = (digest, ids)
                tokens = train.offsets[-1] + validation.offsets[-1]
                speed = _speed(tokens, time.monotonic() - started, reading.share)
                yield f"{source.name}: {train.documents + validation.documents:,} documents, {tokens:,} tokens{speed}"
            if spare:
                (train if validation.documents else validation).add(spare[1])
            if not train.documents or not validation.documents:
                raise UserError(
                    f"sources.{source.name}: gives {train.documents} training and {validation.documents} validation "
                    "documents; at least one of each is needed: add documents or change validation_share"
                )
        check_read(source)
        counts = {split: self._count(source.name, split) for split in SPLITS}
        for split in SPLITS:
            self.counts[split] += counts[split]
        entropy = unigram_cross_entropy(counts["train"], counts["validation"])
        self.written[source.name] = account.statistics(train, validation, entropy)

    def _new_documents(self, source: Source, reading: Reading, account: _Account) -> Iterator[Batch]:
        """Batches of the documents that the corpus does not hold yet."""
        texts: dict[bytes, str] = {}
        characters = 0

        def batch() -> Batch:
            is_filtered = not isinstance(source, ReasoningSource)
            return Batch(list(texts.values()), list(texts), is_rendered(source), is_filtered)

        for text in documents(source, self.seed, reading):
            digest = _digest(text)
            if digest in self.seen:
                account.duplicates += 1
                continue
            self.seen.add(digest)
            texts[digest] = text
            characters += len(text)
            if len(texts) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield batch()
                texts, characters = {}, 0
        if texts:
            yield batch()

    def _kept(
        self, batch: Batch, examined: Examined, account: _Account
    ) -> Iterator[tuple[bytes, npt.NDArray[np.unsignedinteger]]]:
        """SHA-256 and tokens of the documents that no filter leaves out."""
        for at, (digest, text, ids) in enumerate(zip(batch.digests, batch.texts, examined.tokens, strict=True)):
            ngram = examined.shared[at]
            if examined.low_quality[at]:
                account.low_quality += 1
            elif ngram is not None:
                account.leave_contaminated(ngram, text)
            elif self.near and examined.signatures is not None and not self.near.add(examined.signatures[at]):
                account.near_duplicates += 1
            else:
                assert ids is not None
                account.keep(digest, text, examined.counts[at])
                yield digest, ids

    def _count(self, source: str, split: Split) -> npt.NDArray[np.int64]:
        """How often each token occurs in a finished shard: int64 [V]."""
        counts_V = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        tokens = np.memmap(shard_path(self.path, source, split), dtype=token_dtype(self.tokenizer.vocab_size), mode="r")
        for begin in range(0, len(tokens), COUNT_AT_ONCE):
            counts_V += np.bincount(tokens[begin : begin + COUNT_AT_ONCE], minlength=len(counts_V))
        return counts_V

    def statistics(self) -> CorpusStatistics:
        return CorpusStatistics(
            vocab_size=self.tokenizer.vocab_size,
            tokenizer_digest=self.tokenizer.digest,
            chat_template_digest=chat_template_digest(),
            unigram_entropy=unigram_cross_entropy(self.counts["train"], self.counts["validation"]),
            filters=self._filter_statistics(),
            sources=self.written,
        )

    def _filter_statistics(self) -> FilterStatistics | None:
        evaluation, near = self.examiners.examiner.evaluation, self.near
        if evaluation is None and near is None:
            return None
        return FilterStatistics(
            problems=None if evaluation is None else evaluation.problems - evaluation.short,
            short_problems=None if evaluation is None else evaluation.short,
            partly_compared=None if near is None else near.partly,
        )


class _Account:
    """What happened to the documents of one source."""

    def __init__(self) -> None:
        self.duplicates = self.near_duplicates = self.low_quality = self.contaminated = 0
        self.counts = quality.Counts()
        self.samples: list[tuple[bytes, str]] = []
        self.contaminated_samples: list[Contaminated] = []

    def keep(self, digest: bytes, text: str, counts: quality.Counts) -> None:
        self.counts = self.counts.plus(counts)
        if len(self.samples) < SAMPLES or digest < self.samples[-1][0]:
            self.samples = sorted([*self.samples, (digest, text[:SAMPLE_CHARACTERS])])[:SAMPLES]

    def leave_contaminated(self, ngram: str, text: str) -> None:
        self.contaminated += 1
        if len(self.contaminated_samples) < SAMPLES:
            self.contaminated_samples.append(Contaminated(ngram=ngram, text=text[:SAMPLE_CHARACTERS]))

    def statistics(self, train: _SplitWriter, validation: _SplitWriter, unigram_entropy: float) -> SourceStatistics:
        lengths = np.concatenate([np.diff(train.offsets), np.diff(validation.offsets)])
        return SourceStatistics(
            train=train.statistics(),
            validation=validation.statistics(),
            duplicates=self.duplicates,
            near_duplicates=self.near_duplicates,
            contaminated=self.contaminated,
            low_quality=self.low_quality,
            characters=self.counts.characters,
            mean_line_length=self.counts.mean_line_length,
            alphabetic_share=self.counts.alphabetic_share,
            repeated_line_share=self.counts.repeated_line_share,
            length_histogram=np.bincount(np.frexp(lengths)[1] - 1).tolist(),  # frexp: 2^(e-1) <= length < 2^e
            samples=[text for _, text in self.samples],
            contaminated_samples=self.contaminated_samples,
            unigram_entropy=unigram_entropy,
        )


class _SplitWriter:
    """Appends documents to one shard."""

    def __init__(self, path: Path, source: str, split: Split, tokenizer: Tokenizer) -> None:
        self.shard, self.index = shard_path(path, source, split), index_path(path, source, split)
        self.end_of_text, self.dtype = tokenizer.eos_id, token_dtype(tokenizer.vocab_size)
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

    def add(self, ids: npt.NDArray[np.unsignedinteger]) -> None:
        data = np.append(ids, self.end_of_text).astype(self.dtype).tobytes()
        self.stream.write(data)
        self.digest.update(data)
        self.offsets.append(self.offsets[-1] + len(ids) + 1)

    def statistics(self) -> SplitStatistics:
        return SplitStatistics(documents=self.documents, tokens=self.offsets[-1], digest=self.digest.hexdigest())


def _speed(tokens: int, seconds: float, share: float) -> str:
    """`, 812,000 tokens/s, 0:01:40 left`: of this source; nothing before there is anything to tell."""
    rate = f", {tokens / seconds:,.0f} tokens/s" if seconds > 0 else ""
    left = f", {timedelta(seconds=round(seconds * (1 - share) / share))} left" if share > 0 else ""
    return rate + left


def unigram_cross_entropy(train_counts_V: npt.NDArray[np.int64], validation_counts_V: npt.NDArray[np.int64]) -> float:
    """Cross-entropy, in nats per token, of validation tokens under the add-one smoothed unigram of the training tokens.

    What a model that ignores its context reaches: a trained model has to be below it.
    """
    log_probability_V = np.log(train_counts_V + 1) - np.log(train_counts_V.sum() + len(train_counts_V))
    return float(-(validation_counts_V * log_probability_V).sum() / validation_counts_V.sum())
