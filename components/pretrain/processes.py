"""The workers of a stage as processes of this machine. They end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import distributed

from components.pretrain import PretrainResult
from components.pretrain.worker import Forwarder, Job, Listener, cause, portable, train_stage
from ling_flow.errors import UserError
from ling_flow.training.stopping import sigterm_noticed

GRACE_SECONDS = 10.0  # for the others to end as well, or to say what befell them, once one has


def train_in_processes(job: Job, workers: int, listener: Listener) -> PretrainResult:
    """Train the stage with several processes.

    Raises:
        LingFlowError: a worker raised it; or one was killed, which is a SystemFault.
        WorkerDefect: a worker raised anything else.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < workers:
        raise UserError(f"pretrain.workers: at most one per GPU ({torch.cuda.device_count()}), got {workers}")
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    with tempfile.TemporaryDirectory() as folder, sigterm_noticed() as told:
        meeting, stop = Path(folder, "meeting"), Path(folder, "stop")
        running: dict[Connection, BaseProcess] = {}
        try:
            for rank in range(workers):
                ours, theirs = context.Pipe(duplex=False)
                running[ours] = context.Process(
                    target=_work, args=(rank, workers, meeting, stop, job, theirs), name=f"worker {rank}"
                )
                running[ours].start()
                theirs.close()
            return _follow(dict(running), listener, lambda: stop.touch() if told() else None)
        finally:
            for process in running.values():
                process.kill()
                process.join()


def _follow(running: dict[Connection, BaseProcess], listener: Listener, look: Callable[[], None]) -> PretrainResult:
    """Hear the workers out."""
    result: PretrainResult | None = None
    errors: list[Exception] = []
    deaths: list[str] = []
    until = float("inf")
    while running and time.monotonic() < until:
        look()
        for pipe in wait(list(running), timeout=0.2):
            assert isinstance(pipe, Connection)
            try:
                kind, arguments, options = pipe.recv()
            except (EOFError, OSError):
                process = running.pop(pipe)
                process.join()
                if process.exitcode:
                    deaths.append(f"{process.name} {_end(process.exitcode)}")
            else:
                if kind == "error":
                    errors += arguments
                elif kind == "result":
                    result = arguments[0] or result
                else:
                    getattr(listener, kind)(*arguments, **options)
        if errors or deaths or result:
            until = min(until, time.monotonic() + GRACE_SECONDS)
    if result is None:
        raise cause(errors, deaths)
    return result


def _end(exitcode: int) -> str:
    return f"left with exit code {exitcode}" if exitcode > 0 else f"was ended by {signal.Signals(-exitcode).name}"


def _work(rank: int, workers: int, meeting: Path, stop: Path, job: Job, pipe: Connection) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to all; the one that started us decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(rank)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=workers)
        result = train_stage(job, Forwarder(lambda *call: pipe.send(call)), nullcontext(stop.exists))
        pipe.send(("result", (result,), {}))
        distributed.destroy_process_group()
    except Exception as error:
        pipe.send(("error", (portable(error),), {}))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
