"""The weight files of a Hugging Face checkpoint as a stream of tensors.

Only headers are read to know what is there; each tensor is read and written by itself, straight from and into its
place in the file. Host memory is therefore bounded by a few tensors, whatever the size of a shard or of the model.

The format (safetensors): the header's length as a little-endian 64-bit integer, a JSON header with type, shape and
place of each tensor, and the raw bytes of the tensors without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ling_flow.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 10 * 2**30

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_CODES = {dtype: code for code, dtype in _TYPES.items()} | {torch.uint8: "U8"}  # codes of moments; never weights


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not yet read."""

    name: str
    path: Path
    spec: TensorSpec
    start: int  # of its bytes in the file

    def load(self) -> Tensor:
        """The tensor, on the CPU.

        Raises:
            UserError: the file ends too early or cannot be read.
        """
        tensor = torch.empty(self.spec.shape, dtype=self.spec.dtype)
        self.load_into(tensor)
        return tensor

    def load_into(self, target: Tensor) -> None:
        """Read into a contiguous tensor of this type and shape on the CPU, without a copy in between.

        Raises:
            UserError: the file ends too early or cannot be read.
        """
        left = _bytes_of(target)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start)
                while len(left):
                    count = file.readinto(left)
                    if not count:
                        raise UserError(f"{self.path}: damaged (ends within {self.name}); fetch or write it again")
                    left = left[count:]
        except OSError as error:
            raise UserError(f"{self.path}: damaged or unreadable ({error}); fetch or write it again") from None


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint directory by name, in the order of the files; reads headers only.

    Raises:
        UserError: no weights there; a file that the index names is missing, damaged or lacks a tensor; a tensor is in
            two files.
    """
    weight_map = _read_index(directory)
    paths = [directory / name for name in sorted(set(weight_map.values()))] if weight_map else [directory / WEIGHTS]
    found: dict[str, StoredTensor] = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; the checkpoint is not whole")
        for tensor in _read_header(path):
            if tensor.name in found:
                raise UserError(f"{path}: holds {tensor.name}, which {found[tensor.name].path.name} holds too")
            found[tensor.name] = tensor
    for name, file in weight_map.items():
        if name not in found or found[name].path.name != file:
            raise UserError(f"{directory / INDEX}: says that {name} is in {file}, which does not have it")
    return found


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: no such file (with the text `missing`), or no JSON object in it.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(missing) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return data


def _read_index(directory: Path) -> dict[str, str]:
    """File by tensor name; empty where the weights are one file."""
    path = directory / INDEX
    if not path.exists():
        return {}
    weight_map = read_json(path, missing="").get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(name, str) for name in weight_map.values())):
        raise UserError(f"{path}: has no weight_map; fetch or write it again")
    return weight_map


def _read_header(path: Path) -> Iterator[StoredTensor]:
    try:
        with safe_open(path, framework="pt"):  # checks the header, the places and the file's size; reads no tensor
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged or unreadable ({reason}); fetch or write it again") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _TYPES:
            raise UserError(f"{path}: {name} is {entry['dtype']}; only {', '.join(_TYPES)} are read")
        spec = TensorSpec(_TYPES[entry["dtype"]], tuple(entry["shape"]))
        yield StoredTensor(name, path, spec, 8 + length + entry["data_offsets"][0])


def write_weights(
    directory: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors`, which come one by one in the order of `specs`, as one file, or above `shard_bytes` as shards
    with an index. Each is dropped once it is written."""
    shards = _shards(specs, shard_bytes)
    count = len(shards)
    files = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    stream = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        write_tensors(directory / file, {name: specs[name] for name in names}, islice(stream, len(names)))
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    return shards


def write_tensors(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write one file of `tensors`, which come one by one in the order of `specs`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide elements first: every tensor then starts at a multiple of its element's size, and can be mapped in place.
    for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
        spec, start = specs[name], end
        end += spec.nbytes
        header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, spec), (given, tensor) in zip(specs.items(), tensors, strict=True):
            if (given, TensorSpec.of(tensor)) != (name, spec):
                raise ValueError(f"expected {name} {spec}, got {given} {TensorSpec.of(tensor)}")
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(_bytes_of(tensor.detach().cpu().contiguous()))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data
