"""Checkpoints as Hugging Face directories with the published tensor names: what we save, the engines load, and the
reverse."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ling_flow.errors import UserError
from ling_flow.model.config import ModelConfig
from ling_flow.model.transformer import BailingMoeV2ForCausalLM

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
SHARD_BYTES = 10 * 2**30


def published_tensors(model: BailingMoeV2ForCausalLM) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its published name, as a view of the model's own memory (writing to it changes
    the model)."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        stem, _, last = name.rpartition(".")
        if stem.endswith(".experts"):
            for index, expert in enumerate(tensor):
                tensors.update(_halves(f"{stem}.{index}.{last}.weight", expert))
        else:
            tensors.update(_halves(name, tensor))
    return tensors


def _halves(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The fused gate and up projections are two tensors on disk."""
    if ".gate_up_proj." in name:
        gate, up = tensor.chunk(2, dim=0)
        yield name.replace(".gate_up_proj.", ".gate_proj."), gate
        yield name.replace(".gate_up_proj.", ".up_proj."), up
    else:
        yield name, tensor


def save_pretrained(
    model: BailingMoeV2ForCausalLM, directory: Path, tokenizer_dir: Path | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write config.json, the weights (in shards with an index above `shard_bytes`) and a copy of the tokenizer's files.

    config.json is put in place last: a directory that has one is whole. Tensors keep their type.

    Raises:
        UserError: `tokenizer_dir` is not a directory.
    """
    if tokenizer_dir is not None and not tokenizer_dir.is_dir():
        raise UserError(f"{tokenizer_dir}: no such directory; expected the tokenizer's files")
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=directory))
    try:
        if tokenizer_dir is not None:
            for path in sorted(tokenizer_dir.iterdir()):
                if path.is_file():
                    shutil.copyfile(path, staging / path.name)
        _write_weights(published_tensors(model), staging, shard_bytes)
        (staging / CONFIG).write_text(json.dumps(model.config.to_hf(), indent=2, sort_keys=True) + "\n")
        for path in staging.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        for stale in (directory / CONFIG, directory / INDEX, *directory.glob("model*.safetensors")):
            stale.unlink(missing_ok=True)
        for path in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG):
            path.replace(directory / path.name)
    finally:
        shutil.rmtree(staging)


def _write_weights(tensors: dict[str, Tensor], directory: Path, shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    files = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, names in zip(files, shards, strict=True):
        # Copies, one shard at a time: safetensors refuses views that share memory.
        save_file(
            {name: tensors[name].detach().cpu().clone() for name in names}, directory / file, metadata={"format": "pt"}
        )
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        (directory / INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
        )


def read_config(directory: Path) -> ModelConfig:
    """The architecture of a checkpoint.

    Raises:
        UserError: no whole checkpoint there, or a config.json that is damaged or of another model.
    """
    path = directory / CONFIG
    data = _read_json(path, missing=f"{path}: no such file; {directory} is not a whole checkpoint")
    return ModelConfig.from_hf(data, str(path))


def load_pretrained(directory: Path) -> BailingMoeV2ForCausalLM:
    """The model of a checkpoint directory, bit for bit, on the CPU.

    Raises:
        UserError: a missing or damaged file (named), or tensors that are missing, unknown, of the wrong shape or type
        (all in one line).
    """
    config = read_config(directory)
    model = BailingMoeV2ForCausalLM(config)
    expected = published_tensors(model)
    files = weight_files(directory)
    found: set[str] = set()
    wrong: list[str] = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not iterable itself)
                    found.add(name)
                    if name not in expected:
                        continue
                    source, target = file.get_tensor(name), expected[name]
                    if source.shape != target.shape or source.dtype != target.dtype:
                        wrong.append(f"{name} is {_kind(source)} instead of {_kind(target)}")
                    else:
                        target.copy_(source)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or unreadable ({error}); fetch or write it again") from None
    problems = [
        _listing("missing tensors", sorted(expected.keys() - found)),
        _listing("unknown tensors", sorted(found - expected.keys())),
        _listing("wrong tensors", wrong),
    ]
    if any(problems):
        raise UserError(f"{directory}: does not match its config.json: {'; '.join(filter(None, problems))}")
    return model


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        UserError: none there, or one that the index names is missing.
    """
    if (directory / INDEX).exists():
        weight_map = _read_json(directory / INDEX, missing="").get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{directory / INDEX}: has no weight_map; fetch or write it again")
        paths = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        paths = [directory / WEIGHTS]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; the checkpoint is not whole")
    return paths


def _read_json(path: Path, missing: str) -> dict:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(missing) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return data


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _listing(title: str, names: list[str], most: int = 5) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{title}: {', '.join(names[:most])}{more}"
