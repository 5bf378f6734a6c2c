"""Data parallelism: every worker holds the whole model and takes its share of a batch's rows.

What is divided is the batch, not the numbers: a batch, its loss, its gradient and its update are those of one process,
up to the order of float32 sums. So any number of workers can go on from any checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from ling_flow.data.batches import Batch
from ling_flow.errors import SystemFault, UserError

BUCKET_BYTES = 2**26  # gradients reduced at a time


class WorkerLost(SystemFault):
    """Another worker is no longer there; what happened to it, this one does not know."""


class DataParallel:
    """The workers of torch's default process group; one where there is none."""

    def __init__(self) -> None:
        there = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if there else 0
        self.workers = distributed.get_world_size() if there else 1

    def share(self, batch: Batch) -> Batch:
        """This worker's rows, contiguous.

        Raises:
            UserError: there are fewer rows than workers.
        """
        rows = len(batch.tokens)
        if rows < self.workers:
            raise UserError(
                f"batch: {rows} sequences cannot be shared among {self.workers} workers; "
                "raise batch_tokens or use fewer workers"
            )
        first, last = (rows * rank // self.workers for rank in (self.rank, self.rank + 1))
        return Batch(*(None if part is None else part[first:last] for part in batch))  # type: ignore[arg-type]

    def sum_(self, value: Tensor) -> Tensor:
        """The sum over workers, in place."""
        if self.workers > 1:
            with _together():
                distributed.all_reduce(value)
        return value

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is set on any worker."""
        return flag if self.workers == 1 else bool(self.sum_(torch.tensor(float(flag), device=device)))

    def agree(self, value: int, device: torch.device) -> bool:
        """Whether all workers have the same `value`."""
        if self.workers == 1:
            return True
        ends = torch.tensor([value, -value], device=device)
        with _together():
            distributed.all_reduce(ends, distributed.ReduceOp.MAX)
        return bool(ends[0] == -ends[1])

    def wait(self) -> None:
        """Until all workers are here."""
        if self.workers > 1:
            with _together():
                distributed.barrier()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Each parameter's gradient becomes the sum over workers. One without a gradient counts as zero: another
        worker's rows may have reached experts that this one's did not."""
        if self.workers == 1:
            return
        bucket: list[Tensor] = []
        size = 0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            size += parameter.grad.nbytes
            if size >= BUCKET_BYTES:
                self._sum_bucket(bucket)
                bucket, size = [], 0
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, gradients: list[Tensor]) -> None:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with _together():
            distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


@contextmanager
def _together() -> Iterator[None]:
    """
    Raises:
        WorkerLost: the operation of all workers failed.
    """
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise
        raise WorkerLost(f"another worker is gone ({str(error).strip().splitlines()[-1]})") from error
