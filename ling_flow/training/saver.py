"""Checkpoints written behind training: the training thread copies, a second one writes, hashes, syncs and renames.

Training stands still for the copy into host memory, and for the checkpoint before if that is still being written. The
copy is one more of weights and moments (12 bytes per parameter with AdamW in float32), held until the stage ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ling_flow.training.checkpoint import Contents


class SaveReport(NamedTuple):
    """A checkpoint that is on disk.

    Attributes:
        stall_seconds: for which training stood still.
        seconds: from the copy's end until the checkpoint was in its place.
    """

    step: int
    stall_seconds: float
    seconds: float


class Saver:
    """At most one checkpoint is being written. Use as a context: leaving it waits for that one.

    Args:
        write: makes the checkpoint; runs in the second thread. What it raises, the next call of any method raises.
        on_saved: called in the training thread.
    """

    def __init__(self, write: Callable[[Contents], None], on_saved: Callable[[SaveReport], None]) -> None:
        self._write, self._on_saved = write, on_saved
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[SaveReport] | None = None
        self._buffers: dict[str, Tensor] = {}

    def save(self, contents: Contents) -> None:
        """Copy `contents`, once the checkpoint before is written, and have the copy written."""
        started = time.perf_counter()
        self.wait()
        copy = replace(
            contents,
            weights=self._copied("weights", contents.weights),
            moments=self._copied("moments", contents.moments),
        )
        if any(tensor.is_cuda for tensor in contents.weights.values()):
            torch.cuda.synchronize()
        self._writing = self._writer.submit(self._timed, copy, time.perf_counter() - started)

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written, or has been since `collect` was last called."""
        return self._writing is not None

    def collect(self) -> None:
        """Report the checkpoint that is being written, if it is through."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and report it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._on_saved(writing.result())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._writer.shutdown()  # waits

    def _timed(self, contents: Contents, stall_seconds: float) -> SaveReport:
        started = time.perf_counter()
        self._write(contents)
        return SaveReport(contents.state.step, stall_seconds, time.perf_counter() - started)

    @torch.no_grad()
    def _copied(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(f"{kind}:{name}")
            if buffer is None:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[f"{kind}:{name}"] = buffer
            copies[name] = buffer.copy_(tensor, non_blocking=True)
        return copies
