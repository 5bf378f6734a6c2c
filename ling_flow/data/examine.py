"""What is done to documents one by one, in this process or in several: quality, contamination, signature, tokens."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ling_flow.data import near_duplicates, quality
from ling_flow.data.contamination import EvaluationNgrams
from ling_flow.data.filters import Filters
from ling_flow.data.tokenizer import Tokenizer
from ling_flow.errors import SystemFault

ALONE_CHARACTERS = 16_000_000
"""So much text is tokenised before further processes are started: a small corpus is done sooner without them."""
FEW_CORES = 4
"""Up to so many, tokenizers' own threads keep them busy with less work than processes."""
THREADS = 2
"""In this process: while one batch is being tokenised (without the GIL), the next is read and looked at."""


@dataclass(frozen=True)
class Batch:
    """Documents of one source, no two the same, with their SHA-256."""

    texts: list[str]
    digests: list[bytes]
    rendered: bool
    """In the chat format: special tokens are read as such."""
    filtered: bool
    """Held to the filters."""

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))


@dataclass(frozen=True)
class Examined:
    """What is known of a batch's documents, in their order."""

    counts: list[quality.Counts]
    low_quality: list[bool]
    shared: list[str | None]
    """The n-gram shared with an evaluation problem."""
    tokens: list[npt.NDArray[np.unsignedinteger] | None]
    """None for a document that one of the two above leaves out."""
    signatures: npt.NDArray[np.uint32] | None


class Examiner:
    """Looks at documents one by one; the same answer in any process."""

    def __init__(self, tokenizer: Tokenizer, filters: Filters, evaluation: EvaluationNgrams | None) -> None:
        self.tokenizer, self.filters, self.evaluation = tokenizer, filters, evaluation

    def examine(self, batch: Batch) -> Examined:
        counts = [quality.count(text) for text in batch.texts]
        low = [False] * len(counts)
        shared: list[str | None] = [None] * len(counts)
        signatures = None
        if batch.filtered:
            low = [self.filters.quality is not None and not quality.passes(c, self.filters.quality) for c in counts]
            shared = [self.evaluation.shared(text) if self.evaluation else None for text in batch.texts]
            if self.filters.near_duplicates:
                signatures = near_duplicates.signatures(batch.texts, self.filters.near_duplicates)
        kept = [not poor and ngram is None for poor, ngram in zip(low, shared, strict=True)]
        encode = self.tokenizer.encode_rendered_batch if batch.rendered else self.tokenizer.encode_batch
        encoded = iter(encode([text for text, keep in zip(batch.texts, kept, strict=True) if keep]))
        tokens = [np.array(next(encoded), dtype=np.uint32) if keep else None for keep in kept]
        return Examined(counts, low, shared, tokens, signatures)


class Examiners:
    """An examiner, and from `ALONE_CHARACTERS` on several processes with one each. Use it as a context manager.

    Args:
        workers: processes; with 1 none is started, and tokenizers' own threads use the cores.
        tokenizer_path: where a process reads the tokenizer from.
    """

    def __init__(self, examiner: Examiner, workers: int, tokenizer_path: Path) -> None:
        self.examiner, self.workers, self.tokenizer_path = examiner, workers, tokenizer_path
        self.characters = 0
        self.threads = ThreadPoolExecutor(THREADS)
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Examiners:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self.threads, self.pool):
            if pool:
                pool.shutdown(cancel_futures=True)

    def map(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Examined]]:
        """Every batch with its answer, in their order.

        Raises:
            SystemFault: a process was killed or could not start.
        """
        under_way: deque[tuple[Batch, Future[Examined]]] = deque()
        for batch in batches:
            is_alone = self.workers == 1 or self.characters < ALONE_CHARACTERS
            self.characters += batch.characters
            future = self.threads.submit(self.examiner.examine, batch) if is_alone else self._submit(batch)
            under_way.append((batch, future))
            if len(under_way) > (THREADS if is_alone else 3 * self.workers):
                yield self._oldest(under_way)
        while under_way:
            yield self._oldest(under_way)

    def _submit(self, batch: Batch) -> Future[Examined]:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),  # a fork would copy threads that hold locks
                initializer=_start,
                initargs=(self.tokenizer_path, self.examiner.filters, self.examiner.evaluation),
            )
        try:
            return self.pool.submit(_examine, batch)
        except BrokenProcessPool:
            raise _killed() from None

    def _oldest(self, under_way: deque[tuple[Batch, Future[Examined]]]) -> tuple[Batch, Examined]:
        batch, future = under_way.popleft()
        try:
            return batch, future.result()
        except BrokenProcessPool:
            raise _killed() from None


def _killed() -> SystemFault:
    return SystemFault(
        "workers: a process that tokenises was killed (out of memory?) or could not start (a script of your own needs "
        "`if __name__ == '__main__':`); fewer workers need less memory, 1 starts no process"
    )


def default_workers() -> int:
    """One process per core this process may use; with few cores, this one alone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return cores if cores > FEW_CORES else 1


_examiner: Examiner


def _start(tokenizer_path: Path, filters: Filters, evaluation: EvaluationNgrams | None) -> None:
    """In a new process, before its first batch."""
    global _examiner
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _examiner = Examiner(Tokenizer.load(tokenizer_path), filters, evaluation)


def _end_with_parent() -> None:
    """A parent that was killed cannot end its processes."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _examine(batch: Batch) -> Examined:
    return _examiner.examine(batch)
