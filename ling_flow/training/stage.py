"""One stage of a constant-rate run: start it, go on from the stage before, or resume after a kill; keep checkpoints.

The stages of a run are one training: weights, moments, step count and warm-up carry over; data and context change.
Run by every worker of a process group, the first of them writes; all read the same checkpoint when they go on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ling_flow.data.batches import Batches, BatchSizes
from ling_flow.data.drawn import Drawn
from ling_flow.errors import SystemFault, UserError
from ling_flow.model.config import ModelConfig
from ling_flow.model.hf import load_pretrained
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.parallel.data import DataParallel
from ling_flow.training.checkpoint import (
    Contents,
    checkpoint_path,
    contents_of,
    drop_training_state,
    latest_checkpoint,
    list_checkpoints,
    load_training_state,
    remove_checkpoint,
    save_checkpoint,
    step_of,
    verify_checkpoint,
)
from ling_flow.training.fp8 import Safeguard, set_precision
from ling_flow.training.guard import SpikeGuard
from ling_flow.training.interval import SaveClock
from ling_flow.training.loop import StepReport, train
from ling_flow.training.optimizer import build_optimizer, warmup_then_constant
from ling_flow.training.retention import kept
from ling_flow.training.saver import Saver, SaveReport
from ling_flow.training.settings import CheckpointEntry, StageSettings, TrainingState

CONTEXT_FIELDS = ("max_position_embeddings", "rope_theta", "rope_scaling")
"""What a stage may change in a model: its context."""


class StageCheckpoints(NamedTuple):
    """What a finished stage keeps, oldest first: evenly spaced up to its end, and earlier ones."""

    window: list[CheckpointEntry]
    milestones: list[CheckpointEntry]


@dataclass
class StageRun:
    """A stage under way: all that changes while it trains."""

    model: BailingMoeV2ForCausalLM
    optimizer: torch.optim.Optimizer
    state: TrainingState


def open_stage(
    directory: Path,
    settings: StageSettings,
    config: ModelConfig,
    *,
    seed: int,
    previous: Path | None,
    device: torch.device,
    log: Callable[[str], None],
) -> StageRun:
    """The stage as it stands: resumed from `directory`, else continued from the checkpoint `previous`, else new.

    Args:
        directory: where this stage's checkpoints are, from a killed earlier try, and will be.
        config: the model of this stage, with its context.
        seed: of the initial weights.

    Raises:
        UserError: `previous` is damaged, holds no training state, or is another model (the line names the field); or
            there are checkpoints in `directory` and none that can be gone on from. They all stay as they are.
    """
    resumable = latest_checkpoint(directory, log)
    there = list_checkpoints(directory)
    if resumable is None and there:
        raise UserError(
            f"{directory}: none of its {len(there)} checkpoints up to {there[-1].name} can be gone on from (reasons "
            "above); restore a file, or remove the directory to start the stage again"
        )
    _discard(directory, resumable, DataParallel())
    source = resumable or previous
    if source is None:
        model = BailingMoeV2ForCausalLM(config)
        model.init_weights(seed)
        model.to(device)
        return StageRun(model, build_optimizer(model, settings.optimizer), _begin(settings, step=0, tokens=0, drawn={}))
    if resumable is None:
        verify_checkpoint(source)
    model = load_pretrained(source)
    _set_context(model, config, source, log)
    model.to(device)
    optimizer = build_optimizer(model, settings.optimizer)
    state = load_training_state(source, model, optimizer)
    if resumable is None:
        log(f"goes on from {state.stage}: step {state.step:,}, {state.tokens:,} tokens")
        return StageRun(model, optimizer, _begin(settings, state.step, state.tokens, state.drawn))
    log(f"resumed at step {state.step - state.stage_start:,} of {settings.steps:,}")
    return StageRun(model, optimizer, state)


def run_stage(
    run: StageRun,
    directory: Path,
    batches: Batches,
    settings: StageSettings,
    *,
    tokenizer_dir: Path,
    on_step: Callable[[StepReport], None],
    on_watch: Callable[[int, Safeguard], None] | None = None,
    on_saved: Callable[[SaveReport], None] = lambda report: None,
    failures_per_day: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    log: Callable[[str], None] = lambda line: None,
) -> StageCheckpoints:
    """Train to the end of the stage, in place.

    Args:
        on_saved: called once a checkpoint is on disk, some steps after its own.
        failures_per_day: save beside the plan, as often as pays at that rate; None: only as planned.
        stop: asked after every step; once it says yes, the stage saves and ends with an error.

    Raises:
        UserError: the settings of FP8 do not fit the model.
        SystemFault: too many steps in a row were not finite or spikes, also after going back to a checkpoint; or a
            checkpoint could not be written; or the stage was told to stop.
    """
    start = run.state.stage_start
    device = next(run.model.parameters()).device
    workers = DataParallel()
    clock = SaveClock(failures_per_day)
    guard = SpikeGuard(settings.guard, run.state.guard)

    def count(report: StepReport) -> None:
        state = run.state
        run.state = state.model_copy(
            update={
                "step": report.step,
                "tokens": state.tokens + report.tokens,
                "drawn": batches.drawn(report.step - state.stage_start + guard.state.batches_passed),
                "skipped_steps": state.skipped_steps + report.skipped,
                "seconds": state.seconds + report.seconds,
                "load_violation": report.load_violation,
                "guard": guard.state,
            }
        )
        clock.stepped(report.seconds, saver.writing)
        on_step(report)

    def planned(step: int) -> bool:
        return settings.save_number(step - start) is not None

    def write(contents: Contents) -> None:
        save_checkpoint(directory, contents, tokenizer_dir)
        _keep(directory, settings, start)

    def saved(report: SaveReport) -> None:
        clock.measured(report.stall_seconds, report.seconds)
        on_saved(report)

    def checkpoint(step: int) -> None:
        saver.collect()
        stopping = workers.any(stop(), device)
        if planned(step):
            tokens_at = {**run.state.tokens_at, step: run.state.tokens}
            run.state = run.state.model_copy(update={"tokens_at": tokens_at})
        if workers.rank == 0 and (stopping or planned(step) or clock.due()):
            saver.save(contents_of(run.model, run.optimizer, run.state))
            clock.saved()
        if stopping:
            saver.wait()
            workers.wait()
            done = f"step {step - start:,} of {settings.steps:,}"
            raise SystemFault(f"told to stop: {settings.stage} is saved at {done}; run again to go on from there")

    def roll_back() -> int | None:
        saver.wait()
        workers.wait()
        # Where another checkpoint is newer, it depends on the time of day: the bits must not.
        found = latest_checkpoint(directory, log, among=planned)
        if found is None:
            return None
        _discard(directory, found, workers)
        at = run.state.step
        run.model.load_state_dict(load_pretrained(found).state_dict())
        run.optimizer.state.clear()
        before = load_training_state(found, run.model, run.optimizer)
        log(f"rolled back from step {at:,} to {before.step:,}; the batches between are passed over")
        guard.rolled_back(before.guard, batches=at - before.step)
        # What was skipped, and the time it took, stay counted.
        lost = {"skipped_steps": run.state.skipped_steps, "seconds": run.state.seconds}
        run.state = before.model_copy(update={"guard": guard.state, **lost})
        return before.step

    set_precision(run.model, settings.precision, settings.fp8)
    with Saver(write, saved) as saver:
        train(
            run.model,
            run.optimizer,
            batches,
            steps=start + settings.steps,
            schedule=warmup_then_constant(settings.optimizer.learning_rate, settings.warmup_steps),
            start_step=run.state.step,
            first_batch_step=start,
            gradient_clip=settings.optimizer.gradient_clip,
            expert_bias_update_rate=settings.expert_bias_update_rate,
            router_loss=settings.router_loss,
            sequences_per_forward=settings.sequences_per_forward,
            guard=guard,
            roll_back=roll_back,
            safeguard=Safeguard(run.model, settings.fp8) if settings.precision == "fp8" else None,
            on_watch=on_watch,
            on_step=count,
            checkpoint=checkpoint,
        )
    if workers.rank == 0:
        _keep(directory, settings, start, finished=True)
    workers.wait()
    entries = [_entry(path, run.state) for path in list_checkpoints(directory)]
    window = settings.retention.window
    return StageCheckpoints(window=entries[-window:], milestones=entries[:-window])


def batch_sizes(settings: StageSettings) -> BatchSizes:
    """Sequences per step of a stage."""
    ramp = settings.batch_ramp
    if ramp is None:
        return BatchSizes(settings.sequences_per_batch)
    return BatchSizes(settings.sequences_per_batch, ramp.sequences_at_start, ramp.steps)


def _begin(settings: StageSettings, step: int, tokens: int, drawn: dict[str, Drawn]) -> TrainingState:
    return TrainingState(
        stage=settings.stage,
        step=step,
        stage_start=step,
        tokens=tokens,
        tokens_before=tokens,
        drawn_before=drawn,
        drawn=drawn,
        skipped_steps=0,
        seconds=0,
        load_violation=0,
        settings=settings,
    )


def _entry(checkpoint: Path, end: TrainingState) -> CheckpointEntry:
    step = step_of(checkpoint)
    return CheckpointEntry(directory=checkpoint.name, step=step, tokens=end.tokens_at[step])


def _set_context(model: BailingMoeV2ForCausalLM, config: ModelConfig, source: Path, log: Callable[[str], None]) -> None:
    """Give a loaded model the context of `config`, with which it must agree in everything else."""
    for name in ModelConfig.model_fields:
        wanted, found = getattr(config, name), getattr(model.config, name)
        if wanted != found and name not in CONTEXT_FIELDS:
            raise UserError(f"model.{name}: {wanted!r} asked for, but {source} was trained with {found!r}")
        if wanted != found:
            log(f"{name}: {found} before, {wanted} from here on")
    model.set_context(config.max_position_embeddings, config.rope_theta, config.rope_scaling)


def _discard(directory: Path, newer_than: Path | None, workers: DataParallel) -> None:
    """Remove what a killed try left half-written, and newer checkpoints, which will be made again."""
    workers.wait()  # until all have looked
    if workers.rank > 0:
        return
    for path in directory.glob(".step-*"):
        shutil.rmtree(path)
    for path in list_checkpoints(directory):
        if newer_than is None or path.name > newer_than.name:
            remove_checkpoint(path)


def _keep(directory: Path, settings: StageSettings, start: int, finished: bool = False) -> None:
    """Remove the checkpoints and training states that need not stay."""
    saved = {step: settings.save_number(step - start) for step in map(step_of, list_checkpoints(directory))}
    stay = kept(saved, settings.retention, finished)
    for step in saved:
        if step not in stay.checkpoints:
            remove_checkpoint(checkpoint_path(directory, step))
        elif step not in stay.training_states:
            drop_training_state(checkpoint_path(directory, step))
