"""A stage trained in a process of its own, which can be killed. Processes are forked from one that holds torch."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from ling_flow.data.batches import Batches
from ling_flow.data.corpus import Corpus
from ling_flow.errors import LingFlowError
from ling_flow.training.checkpoint import list_checkpoints
from ling_flow.training.settings import StageSettings
from ling_flow.training.stage import batch_sizes, open_stage, run_stage
from ling_flow.training.stopping import sigterm_noticed
from tests.training.micro import micro_model

CONTEXT = multiprocessing.get_context("forkserver")


class Fault(NamedTuple):
    """What befalls the process, and when: `seconds` after it has made `steps` steps."""

    steps: int
    seconds: float = 0.0
    signal: signal.Signals | None = None
    file_bytes: int | None = None  # no file may become larger
    saved: int = 0  # so many checkpoints are whole before; writing them may take longer than the steps


class End(NamedTuple):
    """How it ended."""

    exitcode: int | None  # minus the signal that ended it
    lines: list[str]
    error: str
    steps: int


def train_apart(corpus: Path, directory: Path, settings: StageSettings, fault: Fault | None = None) -> End:
    """Train the stage in `directory` in a new process until its end, or that of the process."""
    CONTEXT.set_forkserver_preload(["tests.training.trainer", "pytest"])
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_train, args=(theirs, corpus, directory, settings, fault))
    process.start()
    theirs.close()
    lines, error, steps = [], "", 0
    try:
        while True:
            kind, value = ours.recv()
            if kind == "log":
                lines.append(value)
            elif kind == "error":
                error = value
            else:
                steps = value
    except EOFError:
        process.join()
    return End(process.exitcode, lines, error, steps)


def _train(tell: Connection, corpus: Path, directory: Path, settings: StageSettings, fault: Fault | None) -> None:
    torch.set_num_threads(1)
    done = 0

    def on_step(report: object) -> None:
        nonlocal done
        done += 1
        tell.send(("steps", done))
        if fault is not None and done == fault.steps:
            if fault.signal is not None and fault.seconds:
                threading.Timer(fault.seconds, os.kill, (os.getpid(), fault.signal)).start()
            elif fault.signal is not None:
                os.kill(os.getpid(), fault.signal)
            while len(list_checkpoints(directory)) < fault.saved:
                time.sleep(0.01)
            if fault.file_bytes is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_bytes, fault.file_bytes))

    try:
        opened = Corpus.open(corpus)
        run = open_stage(
            directory, settings, micro_model(), seed=0, previous=None, device=torch.device("cpu"),
            log=lambda line: tell.send(("log", line)),
        )  # fmt: skip
        batches = Batches(opened, {"words": 1, "numbers": 1}, settings.sequence_length, batch_sizes(settings), 0)
        with sigterm_noticed() as stop:
            run_stage(
                run, directory, batches, settings, tokenizer_dir=opened.path / "tokenizer", on_step=on_step, stop=stop
            )
    except LingFlowError as error:
        tell.send(("error", str(error)))
        sys.exit(error.exit_code)
