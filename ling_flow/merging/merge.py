"""Weighted mean of checkpoints, streamed: one tensor at a time, summed in float32 (WSM §3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ling_flow.errors import UserError
from ling_flow.model.checkpoint_files import read_json, stored_tensors
from ling_flow.model.hf import CONFIG, write_checkpoint

_AVERAGED_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def merge_checkpoints(checkpoints: Sequence[Path], weights: Sequence[float], destination: Path) -> None:
    """Write Σ weights[i] · checkpoints[i] as a Hugging Face directory.

    Tensors keep their names, shapes and types; float32 sums are rounded once, at the end. `expert_bias`, stored in
    float32, is averaged like any other tensor, which keeps its mean at zero. Config and tokenizer are those of the last
    checkpoint.

    Args:
        checkpoints: Hugging Face directories, in the order of `weights`.
        destination: missing or empty; config.json is put in place last: a directory that has one is whole.

    Raises:
        UserError: no checkpoint or not one weight for each; the checkpoints are not of one model (the line names the
            checkpoint and the tensor or config key); `destination` holds something.
    """
    if not checkpoints or len(checkpoints) != len(weights):
        raise UserError(f"merge: {len(weights)} weights for {len(checkpoints)} checkpoints; give one for each")
    if destination.exists() and any(destination.iterdir()):
        raise UserError(f"{destination}: holds files already; merge into a new directory")
    sources = [_Checkpoint(path) for path in checkpoints]
    newest = sources[-1]
    for other in sources[:-1]:
        newest.require_same_model(other)
    specs = {name: tensor.spec for name, tensor in newest.tensors.items()}
    write_checkpoint(destination, newest.config, newest.path, specs, _means(sources, weights))


class _Checkpoint:
    """Config and tensors of a Hugging Face directory; no tensor is read yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        config = path / CONFIG
        self.config = read_json(config, missing=f"{config}: no such file; {path} is not a whole checkpoint")
        self.tensors = stored_tensors(path)
        for name, tensor in self.tensors.items():
            if tensor.spec.dtype not in _AVERAGED_TYPES:
                known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _AVERAGED_TYPES)
                raise UserError(f"{tensor.path}: tensor {name} is {tensor.spec}; only {known} can be averaged")

    def require_same_model(self, other: _Checkpoint) -> None:
        """Raises UserError where `other` is not a checkpoint of the same model."""
        for key in sorted({*self.config, *other.config}):
            mine, theirs = self.config.get(key), other.config.get(key)
            if mine != theirs:
                raise UserError(f"{other.path}: config.json has {key} = {theirs!r}, but {self.path.name} has {mine!r}")
        for name in sorted({*self.tensors, *other.tensors}):
            for one, two in ((self, other), (other, self)):
                if name not in one.tensors:
                    raise UserError(f"{one.path}: tensor {name} is missing, but {two.path.name} has it")
            ours, given = self.tensors[name].spec, other.tensors[name].spec
            if ours != given:
                raise UserError(f"{other.path}: tensor {name} is {given}, but {ours} in {self.path.name}")


def _means(sources: Sequence[_Checkpoint], weights: Sequence[float]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in sources[-1].tensors.items():
        total = torch.zeros(tensor.spec.shape)
        for source, weight in zip(sources, weights, strict=True):
            total.add_(source.tensors[name].load().to(torch.float32), alpha=weight)
        yield name, total.to(tensor.spec.dtype)
