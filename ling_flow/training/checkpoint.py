"""Checkpoints from which a run goes on bit for bit: a Hugging Face directory plus `training_state/`.

    step-00001234/              config.json, model.safetensors, tokenizer files
    step-00001234/training_state/
        optimizer.safetensors   moments and step counts of AdamW by parameter name; of 8 bits, codes and scales
        state.json              TrainingState; training draws no random numbers, so there is no generator to save
        files.json              size and SHA-256 of every other file of the checkpoint; what has it is whole

Written beside its place, synced, renamed: a killed writer leaves nothing that looks like a checkpoint. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ling_flow.config import parse
from ling_flow.errors import UserError
from ling_flow.model.hf import save_pretrained
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.adamw8 import MOMENTS, AdamW8bit
from ling_flow.training.settings import TrainingState

TRAINING_STATE = "training_state"
_OPTIMIZER, _STATE, _FILES = "optimizer.safetensors", "state.json", "files.json"


def save_checkpoint(
    root: Path,
    model: BailingMoeV2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    tokenizer_dir: Path | None = None,
) -> Path:
    """Write `root/step-<state.step>`; one that is already there is replaced."""
    destination = root / f"step-{state.step:08d}"
    unfinished = root / f".{destination.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    save_pretrained(model, unfinished, tokenizer_dir)
    training_state = unfinished / TRAINING_STATE
    training_state.mkdir()
    save_file(_optimizer_tensors(model, optimizer), training_state / _OPTIMIZER)
    (training_state / _STATE).write_text(state.model_dump_json(indent=2) + "\n")
    (training_state / _FILES).write_text(json.dumps(_describe(unfinished), indent=2) + "\n")
    for path in (*training_state.iterdir(), training_state, unfinished):
        _sync(path)
    shutil.rmtree(destination, ignore_errors=True)
    unfinished.rename(destination)
    _sync(root)
    return destination


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints below `root`, oldest first."""
    return sorted(path for path in root.glob("step-*") if path.is_dir())


def latest_checkpoint(root: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint from which training can go on; damaged ones are skipped, with a line to `report`."""
    for path in reversed(list_checkpoints(root)):
        if (path / TRAINING_STATE).is_dir():
            try:
                verify_checkpoint(path)
                return path
            except UserError as error:
                report(f"checkpoint skipped: {error}")
    return None


def verify_checkpoint(directory: Path) -> None:
    """Compare every file of a checkpoint that has training state with what was written.

    Raises:
        UserError: a file is missing or damaged; the line names it.
    """
    listing = directory / TRAINING_STATE / _FILES
    try:
        files = json.loads(listing.read_text())
    except FileNotFoundError:
        raise UserError(f"{listing}: missing; training can only go on from a checkpoint with training state") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{listing}: damaged ({error.__class__.__name__})") from None
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path}: missing")
        if path.stat().st_size != expected["bytes"]:
            raise UserError(f"{path}: damaged ({path.stat().st_size} bytes instead of {expected['bytes']})")
        if _sha256(path) != expected["sha256"]:
            raise UserError(f"{path}: damaged (its SHA-256 is not the one written)")


def load_training_state(
    directory: Path, model: BailingMoeV2ForCausalLM, optimizer: torch.optim.Optimizer
) -> TrainingState:
    """Give `optimizer` (of `model`) the saved moments, and return where the run stood. Weights are not loaded here.

    Raises:
        UserError: no training state there, or one of another model.
    """
    folder = directory / TRAINING_STATE
    try:
        text = (folder / _STATE).read_text()
        tensors = load_file(folder / _OPTIMIZER)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or folder}: missing; training cannot go on from {directory.name}") from None
    state = parse(TrainingState, text, str(folder / _STATE))
    for name, parameter in model.named_parameters():
        moments = {key: tensors.pop(f"{name}:{key}") for key in _MOMENTS if f"{name}:{key}" in tensors}
        if moments and moments["exp_avg"].shape != parameter.shape:
            shape = list(moments["exp_avg"].shape)
            raise UserError(f"{folder / _OPTIMIZER}: moments of {name} have shape {shape}, not {list(parameter.shape)}")
        if moments and ("exp_avg_scale" in moments) != _in_8_bits(optimizer, parameter):
            raise UserError(
                f"{folder / _OPTIMIZER}: moments of {name} are those of another optimizer; "
                "adamw and adamw8bit cannot go on from each other"
            )
        if moments:
            on_cpu = {"step"}  # where AdamW keeps it
            optimizer.state[parameter] = {
                key: value if key in on_cpu else value.to(parameter.device) for key, value in moments.items()
            }
    if tensors:
        raise UserError(f"{folder / _OPTIMIZER}: holds {min(tensors)}, which the model does not have")
    return state


def drop_training_state(directory: Path) -> None:
    """Keep only the Hugging Face directory of a checkpoint."""
    (directory / TRAINING_STATE / _FILES).unlink(missing_ok=True)  # first: a killed drop leaves no whole training state
    shutil.rmtree(directory / TRAINING_STATE, ignore_errors=True)


_MOMENTS = ("step", *MOMENTS)


def _in_8_bits(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> bool:
    return isinstance(optimizer, AdamW8bit) and optimizer.in_8_bits(parameter)


def _optimizer_tensors(model: BailingMoeV2ForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": optimizer.state[parameter][key].detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key in _MOMENTS
        if key in optimizer.state[parameter]
    }


def _describe(directory: Path) -> dict[str, dict[str, int | str]]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
