"""Weighted mean of checkpoints, streamed: one tensor at a time, summed in float32 (WSM §3.2)."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ling_flow.errors import UserError

_AVERAGED_TYPES = ("F32", "F16", "BF16")


def merge_checkpoints(checkpoints: Sequence[Path], weights: Sequence[float], destination: Path) -> None:
    """Write Σ weights[i] · checkpoints[i] as a Hugging Face directory.

    Tensors keep their names, shapes, types and shards; float32 sums are rounded once, at the end. `expert_bias`, stored
    in float32, is averaged like any other tensor, which keeps its mean at zero. Config and tokenizer are those of the
    last checkpoint.

    Args:
        checkpoints: Hugging Face directories, in the order of `weights`.
        destination: missing or empty; appears whole or not at all.

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
    destination.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        unfinished.chmod(0o755)  # mkdtemp makes it private
        not_copied = shutil.ignore_patterns("*.safetensors", "training_state")
        shutil.copytree(newest.path, unfinished, dirs_exist_ok=True, ignore=not_copied)
        for shard in newest.shards:
            _merge_shard(shard, newest, sources, weights, unfinished / shard)
        os.replace(unfinished, destination)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


class _Checkpoint:
    """Names, shapes and types of the tensors of a Hugging Face directory, read from the headers alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_json(path / "config.json")
        self.shards = sorted(file.name for file in path.glob("*.safetensors"))
        if not self.shards:
            raise UserError(f"{path}: holds no *.safetensors; is it a checkpoint?")
        self.headers = {shard: _read_header(path / shard) for shard in self.shards}
        self.shard_of = {name: shard for shard, (_, tensors) in self.headers.items() for name in tensors}
        for shard, (_, tensors) in self.headers.items():
            for name, tensor in tensors.items():
                if tensor["dtype"] not in _AVERAGED_TYPES:
                    known = ", ".join(_AVERAGED_TYPES)
                    raise UserError(f"{path / shard}: tensor {name} is {tensor['dtype']}; only {known} can be averaged")

    def tensor_spec(self, name: str) -> dict[str, Any]:
        return self.headers[self.shard_of[name]][1][name]

    def require_same_model(self, other: _Checkpoint) -> None:
        """Raises UserError where `other` is not a checkpoint of the same model."""
        for key in sorted({*self.config, *other.config}):
            mine, theirs = self.config.get(key), other.config.get(key)
            if mine != theirs:
                raise UserError(f"{other.path}: config.json has {key} = {theirs!r}, but {self.path.name} has {mine!r}")
        for name in sorted({*self.shard_of, *other.shard_of}):
            for one, two in ((self, other), (other, self)):
                if name not in one.shard_of:
                    raise UserError(f"{one.path}: tensor {name} is missing, but {two.path.name} has it")
            for key in ("shape", "dtype"):
                mine, theirs = self.tensor_spec(name)[key], other.tensor_spec(name)[key]
                if mine != theirs:
                    raise UserError(f"{other.path}: tensor {name} has {key} {theirs}, but {self.path.name} has {mine}")


def _merge_shard(
    shard: str, layout: _Checkpoint, sources: Sequence[_Checkpoint], weights: Sequence[float], destination: Path
) -> None:
    """Write one output shard; as nothing but the values changes, its header is the one of `layout`, byte for byte."""
    header, tensors = layout.headers[shard]
    with destination.open("wb") as file:
        file.write(header)
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
            total = torch.zeros(tensor["shape"])
            for source, weight in zip(sources, weights, strict=True):
                with safe_open(source.path / source.shard_of[name], framework="pt") as stored:
                    value = stored.get_tensor(name)
                total.add_(value.to(torch.float32), alpha=weight)
            file.write(total.to(value.dtype).reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _read_header(path: Path) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """The raw header of a safetensors file (with its length), and the tensors it lists."""
    try:
        with safe_open(path, framework="pt"):  # checks header, offsets and file size
            pass
        with path.open("rb") as file:
            length = file.read(8)
            raw = file.read(struct.unpack("<Q", length)[0])
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())})") from None
    tensors = json.loads(raw)
    tensors.pop("__metadata__", None)
    return length + raw, tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error.__class__.__name__})") from None
