"""A stage as each of its workers trains it: the only process, one of several on a machine, or one of a Ray cluster.

All train; the first tells, evaluates and writes. How workers are started is not known here.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from components.pretrain import PretrainConfig, PretrainResult, stage_model
from ling_flow.data.batches import Batches
from ling_flow.data.corpus import Corpus
from ling_flow.errors import LingFlowError, SystemFault, UserError
from ling_flow.model.hf import read_config
from ling_flow.parallel.data import DataParallel, WorkerLost
from ling_flow.training.evaluate import mixture_loss, samples, validation_loss
from ling_flow.training.fp8 import Safeguard
from ling_flow.training.loop import StepReport
from ling_flow.training.saver import SaveReport
from ling_flow.training.settings import CheckpointIndex, StageSettings, number_at
from ling_flow.training.speed import Cost, measured_peak
from ling_flow.training.stage import batch_sizes, open_stage, run_stage

METRIC_POINTS = 200  # training metrics tracked per stage
TOLD_ROUNDING = 0.05  # of a share, from which on it is told


class Listener(Protocol):
    """Who is told: the step itself, or what carries words to it."""

    def progress(self, done: int, total: int, text: str = "", **metrics: float) -> None: ...

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def log(self, text: str) -> None: ...


class Forwarder:
    """A listener that hands on what it hears: the name of the call, and its arguments."""

    def __init__(self, send: Callable[[str, tuple[Any, ...], dict[str, Any]], None]) -> None:
        self._send = send

    def progress(self, done: int, total: int, text: str = "", **metrics: float) -> None:
        self._send("progress", (done, total, text), metrics)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._send("metrics", (values, step), {})

    def log(self, text: str) -> None:
        self._send("log", (text,), {})


@dataclass(frozen=True)
class Job:
    """A stage to train.

    Attributes:
        corpus, directory, previous: of the corpus, of this stage's checkpoints, and the checkpoint to go on from. Seen
            by all workers under the same paths.
        threads: CPU threads of each worker.
    """

    config: PretrainConfig
    settings: StageSettings
    corpus: Path
    directory: Path
    previous: Path | None
    threads: int


def train_stage(
    job: Job, listener: Listener, stopping: AbstractContextManager[Callable[[], bool]]
) -> PretrainResult | None:
    """Train the stage to its end, alone or with the other workers of torch's default process group.

    Args:
        stopping: entered while the stage trains. What it gives is asked after every step; once it says yes to one
            worker, the stage is saved and ends with a SystemFault.

    Returns:
        What the stage reached, on the first worker; None on the others.
    """
    config, settings, workers = job.config, job.settings, DataParallel()
    torch.set_num_threads(job.threads)
    if workers.rank > 0:
        listener = Forwarder(lambda kind, arguments, options: None)
    corpus = Corpus.open(job.corpus)
    before = None if job.previous is None else read_config(job.previous)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    run = open_stage(
        job.directory,
        settings,
        stage_model(config, corpus.tokenizer.vocab_size, corpus.tokenizer.eos_id, before),
        seed=config.seed,
        previous=job.previous,
        device=device,
        log=listener.log,
    )
    if not workers.agree(run.state.step, device):
        raise UserError(
            f"{job.directory}: workers see different checkpoints there; give an artifact root that all of them share"
        )
    run.model.recompute = config.recompute
    sizes = batch_sizes(settings)
    batches = Batches(
        corpus,
        config.mixture,
        settings.sequence_length,
        sizes,
        config.seed,
        packing=config.packing,
        mixture_end=config.mixture_end,
        sequences=sizes.before(settings.steps),
        drawn_before=run.state.drawn_before,
        longest=config.model.max_position_embeddings,
    )
    for source in batches.begun_anew:
        listener.log(f"{source}: begins anew; corpus, seed or packing are not those it was read in before")
    _tell_rounding(batches, config, listener)
    mixture = config.mixture_end or config.mixture  # which the stage leaves with

    watts = None if config.watts is None else config.watts * workers.workers
    peak = measured_peak(device, settings.precision) * workers.workers
    cost = Cost(run.model.config, settings.sequence_length, peak, watts)

    def evaluate(step_number: int) -> float:
        losses = validation_loss(
            run.model, corpus, settings.sequence_length, config.validation_tokens, sources=batches.sources
        )
        loss = mixture_loss(losses, mixture)
        listener.metrics(
            {"validation_loss": loss} | {f"validation_loss/{name}": value for name, value in losses.items()},
            step=step_number,
        )
        return loss

    def on_step(report: StepReport) -> None:
        figures = cost.step(report.tokens, report.seconds, device)
        done = report.step - run.state.stage_start
        text = f"lr {report.learning_rate:.3g}"
        if report.skipped:
            listener.log(f"step {done:,}: skipped (loss {report.loss:g}, gradient norm {report.gradient_norm:g})")
        listener.progress(
            done, settings.steps, text, loss=report.cross_entropy, tokens_per_second=report.tokens_per_second
        )
        if done % max(1, settings.steps // METRIC_POINTS) == 0 or done == settings.steps:
            listener.metrics(
                {
                    "loss": report.loss,
                    "cross_entropy": report.cross_entropy,
                    "mtp_cross_entropy": report.mtp_cross_entropy,
                    "gradient_norm": report.gradient_norm,
                    "learning_rate": report.learning_rate,
                    "load_violation": report.load_violation,
                    "tokens_per_second": report.tokens_per_second,
                    "skipped_steps": run.state.skipped_steps,
                    "rollbacks": run.state.guard.rollbacks,
                    **figures,
                    **{
                        f"cross_entropy/{batches.sources[source]}": loss
                        for source, loss in report.source_cross_entropy.items()
                    },
                },
                step=report.step,
            )
        within = number_at(done, settings.steps, config.evaluations + 1)
        if workers.rank == 0 and within is not None and done < settings.steps:
            listener.log(f"step {done:,}: validation loss {evaluate(report.step):.4f}")
            for name, text in samples(run.model, corpus, batches.sources).items():
                listener.log(f"step {done:,}: {name}: {text!r}")

    def on_watch(done: int, safeguard: Safeguard) -> None:
        listener.metrics(safeguard.metrics(), step=done)
        for line in safeguard.warnings():
            listener.log(f"step {done:,}: {line}")

    def on_saved(report: SaveReport) -> None:
        listener.metrics(
            {"save_stall_seconds": report.stall_seconds, "save_seconds": report.seconds},
            step=report.step,
        )

    with stopping as stop:
        kept = run_stage(
            run,
            job.directory,
            batches,
            settings,
            tokenizer_dir=corpus.path / "tokenizer",
            on_step=on_step,
            on_watch=on_watch,
            on_saved=on_saved,
            failures_per_day=config.failures_per_day,
            stop=stop,
            log=listener.log,
        )
    if workers.rank > 0:
        return None
    loss = evaluate(run.state.step)
    CheckpointIndex(
        stage=config.stage,
        latest=kept.window[-1].directory,
        learning_rate=settings.optimizer.learning_rate,
        batch_tokens=settings.batch_tokens,
        sequence_length=settings.sequence_length,
        mixture=mixture,
        checkpoints=kept.window,
        milestones=kept.milestones,
    ).save(job.directory)
    stage_tokens = run.state.tokens - run.state.tokens_before
    return PretrainResult(
        validation_loss=loss,
        tokens_per_second=stage_tokens / run.state.seconds,
        steps=settings.steps,
        tokens=stage_tokens,
        total_tokens=run.state.tokens,
        learning_rate=settings.optimizer.learning_rate,
        batch_tokens=settings.batch_tokens,
        load_violation=run.state.load_violation,
        skipped_steps=run.state.skipped_steps,
    )


def _tell_rounding(batches: Batches, config: PretrainConfig, listener: Listener) -> None:
    """Shares of a constant mixture are whole multiples of 1/16384, which tells where they are small."""
    total = sum(config.mixture.values())
    for source, share in batches.shares().items() if config.mixture_end is None else ():
        wanted = config.mixture[source] / total
        if abs(share / wanted - 1) > TOLD_ROUNDING:
            listener.log(f"mixture.{source}: {wanted:.3g} of all asked for, {share:.3g} drawn; shares are rounded")


class WorkerDefect(Exception):
    """A defect of ours in another process: what it was, then its traceback."""


def portable(error: Exception) -> LingFlowError | WorkerDefect:
    """`error` as it can be sent to another process, whatever it holds."""
    if isinstance(error, LingFlowError):
        return type(error)(str(error))
    return WorkerDefect(f"{type(error).__name__}: {error}\n" + "".join(traceback.format_exception(error)))


def cause(errors: Iterable[Exception], deaths: Iterable[str]) -> Exception:
    """Of all that befell the workers of a stage, what the others followed from.

    Args:
        errors: what workers raised, made `portable`.
        deaths: of workers that could raise nothing any more, a line each.
    """
    errors, deaths = list(errors), list(deaths)
    for error in errors:
        if isinstance(error, LingFlowError) and not isinstance(error, WorkerLost):
            return error
    if deaths:
        return SystemFault(f"{deaths[0]}; run again to go on from the newest checkpoint")
    return next((error for error in errors if isinstance(error, WorkerDefect)), errors[0])
