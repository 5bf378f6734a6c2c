"""Checkpoints from which a run goes on bit for bit: a Hugging Face directory plus `training_state/`.

    step-00001234/              config.json, model.safetensors, tokenizer files
    step-00001234/training_state/
        optimizer.safetensors   the optimizer's state by parameter name: moments and step counts of AdamW, of 8 bits
                                codes and scales, momentum of Muon
        state.json              TrainingState; training draws no random numbers, so there is no generator to save
        files.json              size and SHA-256 of every other file of the checkpoint; what has it is whole

Written beside its place, synced, renamed: a killed writer leaves nothing that looks like a checkpoint. Removed the same
way: renamed, then deleted. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from ling_flow.config import StrictModel, parse
from ling_flow.errors import SystemFault, UserError
from ling_flow.model.checkpoint_files import TensorSpec, write_tensors
from ling_flow.model.config import ModelConfig
from ling_flow.model.hf import save_state
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.adamw8 import MOMENTS, AdamW8bit
from ling_flow.training.optimizer import state_of
from ling_flow.training.settings import TrainingState

TRAINING_STATE = "training_state"
_OPTIMIZER, _STATE, _FILES = "optimizer.safetensors", "state.json", "files.json"


@dataclass(frozen=True)
class Contents:
    """All that a checkpoint holds but the tokenizer.

    Attributes:
        weights: the model's state dict.
        moments: what the optimizer keeps, by `<parameter>:<key>`.
    """

    config: ModelConfig
    weights: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor]
    state: TrainingState


def contents_of(model: BailingMoeV2ForCausalLM, optimizer: torch.optim.Optimizer, state: TrainingState) -> Contents:
    """The tensors are those of `model` and `optimizer` themselves."""
    moments = {
        f"{name}:{key}": optimizer.state[parameter][key].detach()
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key in _MOMENTS
        if key in optimizer.state[parameter]
    }
    return Contents(model.config, model.state_dict(), moments, state)


def save_checkpoint(root: Path, contents: Contents, tokenizer_dir: Path | None = None) -> Path:
    """Write `root/step-<step>`; one that is already there is replaced.

    Raises:
        SystemFault: it cannot be written (a full disk); what was there stays as it was.
    """
    destination = checkpoint_path(root, contents.state.step)
    unfinished = root / f".{destination.name}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        save_state(contents.config, contents.weights, unfinished, tokenizer_dir)
        training_state = unfinished / TRAINING_STATE
        training_state.mkdir()
        specs = {name: TensorSpec.of(tensor) for name, tensor in contents.moments.items()}
        write_tensors(training_state / _OPTIMIZER, specs, contents.moments.items())
        (training_state / _STATE).write_text(contents.state.model_dump_json(indent=2) + "\n")
        (training_state / _FILES).write_text(json.dumps(_describe(unfinished), indent=2) + "\n")
        for path in (*training_state.iterdir(), training_state, unfinished):
            _sync(path)
        remove_checkpoint(destination)
        unfinished.rename(destination)
        _sync(root)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = error.strerror or str(error)
        raise SystemFault(f"{destination}: cannot be written ({reason}); those before it are whole") from error
    return destination


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's directory."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints below `root`, oldest first."""
    return sorted(path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir())


def latest_checkpoint(
    root: Path, report: Callable[[str], None], among: Callable[[int], bool] = lambda step: True
) -> Path | None:
    """The newest checkpoint from which training can go on, of the steps `among`; damaged ones are skipped, with a line
    to `report`."""
    for path in reversed(list_checkpoints(root)):
        if among(step_of(path)) and (path / TRAINING_STATE).is_dir():
            try:
                verify_checkpoint(path)
                return path
            except UserError as error:
                report(f"checkpoint skipped: {error}")
    return None


def verify_checkpoint(directory: Path) -> None:
    """Compare every file of a checkpoint that has training state with what was written.

    Raises:
        UserError: a file is missing, damaged or cannot be read; the line names it.
    """
    listing = directory / TRAINING_STATE / _FILES
    try:
        files = _LISTING.validate_json(listing.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{listing}: missing; training can only go on from a checkpoint with training state") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{listing}: damaged ({error.__class__.__name__})") from None
    if not files.keys() >= _NEEDED or not any(name.startswith("model") for name in files):
        raise UserError(f"{listing}: damaged (it does not list all files)")
    for name, expected in files.items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                raise UserError(f"{path}: damaged ({size} bytes instead of {expected.bytes})")
            if _sha256(path) != expected.sha256:
                raise UserError(f"{path}: damaged (its SHA-256 is not the one written)")
        except FileNotFoundError:
            raise UserError(f"{path}: missing") from None
        except OSError as error:  # a bad sector, a stale handle
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


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
        if not moments:
            continue
        first = moments["exp_avg" if "exp_avg" in moments else "momentum_buffer"]
        if first.shape != parameter.shape:
            shape = list(first.shape)
            raise UserError(f"{folder / _OPTIMIZER}: moments of {name} have shape {shape}, not {list(parameter.shape)}")
        if set(moments) != state_of(optimizer, parameter):
            raise UserError(
                f"{folder / _OPTIMIZER}: moments of {name} are those of another optimizer; "
                "adamw, adamw8bit and muon cannot go on from each other"
            )
        in_8_bits = isinstance(optimizer, AdamW8bit) and optimizer.in_8_bits(parameter)
        on_cpu = {"step"} if in_8_bits else set()  # a number of the kernel's; the fused update has it on the device
        optimizer.state[parameter] = {  # copies: what was read is mapped, and would keep a removed file on the disk
            key: value.to("cpu" if key in on_cpu else parameter.device, copy=True) for key, value in moments.items()
        }
    if tensors:
        raise UserError(f"{folder / _OPTIMIZER}: holds {min(tensors)}, which the model does not have")
    return state


def drop_training_state(directory: Path) -> None:
    """Keep only the Hugging Face directory of a checkpoint."""
    (directory / TRAINING_STATE / _FILES).unlink(missing_ok=True)  # first: a killed drop leaves no whole training state
    shutil.rmtree(directory / TRAINING_STATE, ignore_errors=True)


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint, if it is there."""
    if directory.exists():
        leftover = directory.with_name(f".{directory.name}.removed")  # a killed removal leaves no half checkpoint
        directory.rename(leftover)
        shutil.rmtree(leftover)


class _File(StrictModel):
    bytes: int
    sha256: str


_LISTING = TypeAdapter(dict[str, _File])
_NEEDED = {"config.json", f"{TRAINING_STATE}/{_OPTIMIZER}", f"{TRAINING_STATE}/{_STATE}"}
_MOMENTS = ("step", *MOMENTS, "momentum_buffer")


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
