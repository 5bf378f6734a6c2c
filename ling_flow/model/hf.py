"""Checkpoints as Hugging Face directories with the published tensor names: what we save, the engines load, and the
reverse. BF16 or float32, or the blockwise FP8 form; read and written tensor by tensor."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ling_flow.config import parse
from ling_flow.errors import UserError
from ling_flow.model.checkpoint_files import (
    INDEX,
    SHARD_BYTES,
    TensorSpec,
    read_json,
    stored_tensors,
    write_weights,
)
from ling_flow.model.config import HEADER_KEYS, ModelConfig
from ling_flow.model.fp8_blocks import (
    BLOCK,
    SCALE_SUFFIX,
    STORED_TYPE,
    dequantize_into,
    quantization_config,
    quantized_specs,
    quantized_stream,
    scale_spec,
)
from ling_flow.model.transformer import BailingMoeV2ForCausalLM

CONFIG = "config.json"


def published_tensors(model: BailingMoeV2ForCausalLM) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its published name, as a view of the model's own memory (writing to it changes
    the model)."""
    return _published(model.state_dict())


def _published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
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


def read_config(directory: Path) -> ModelConfig:
    """The architecture of a checkpoint, as its config.json has it.

    Raises:
        UserError: no whole checkpoint there, or a config.json that is damaged or of another model.
    """
    return ModelConfig.from_hf(_raw_config(directory), str(directory / CONFIG))


def load_pretrained(
    directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> BailingMoeV2ForCausalLM:
    """The model of a checkpoint directory, on `device`. Host memory: the model, if it is on the CPU, and a few tensors.

    The type is that of config.json, or `dtype` (float32 or bfloat16), which then becomes the config's. Without `dtype`
    nothing is rounded but FP8 blocks to the config's type; with it, wider stored tensors are. `expert_bias` is float32
    in any case. MTP layers are those the weights have where config.json does not say or the weights have none.

    Raises:
        UserError: a missing or damaged file (named), or tensors that are missing, unknown, of the wrong shape or type
            (all in one line, before any is read).
    """
    checkpoint = _Checkpoint(directory, dtype)
    # What `to_empty` does, which takes the detour of `empty_like` on a meta tensor: that imports sympy, for a second.
    model = checkpoint.meta_model._apply(lambda meta: torch.empty(meta.shape, dtype=meta.dtype, device=device))
    for gate in model.gates():
        gate.expert_counts.zero_()  # not part of a checkpoint
    for name, target in published_tensors(model).items():
        checkpoint.read_into(target, name)
    return model


def save_pretrained(
    model: BailingMoeV2ForCausalLM,
    directory: Path,
    tokenizer_dir: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    fp8: bool = False,
) -> None:
    """Write config.json, the weights (in shards with an index above `shard_bytes`) and a copy of the tokenizer's files.

    config.json is put in place last: a directory that has one is whole. Tensors keep their type; with `fp8`, the
    projections take the blockwise FP8 form.

    Raises:
        UserError: `tokenizer_dir` is not a directory.
    """
    save_state(model.config, model.state_dict(), directory, tokenizer_dir, shard_bytes, fp8)


def save_state(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    directory: Path,
    tokenizer_dir: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    fp8: bool = False,
) -> None:
    """As `save_pretrained`, from the model's config and state dict."""
    if tokenizer_dir is not None and not tokenizer_dir.is_dir():
        raise UserError(f"{tokenizer_dir}: no such directory; expected the tokenizer's files")
    tensors = _published(state)
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    write_checkpoint(directory, config.to_hf(), tokenizer_dir, specs, tensors.items(), shard_bytes, fp8)


def convert_checkpoint(source: Path, destination: Path, fp8: bool, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint in the blockwise FP8 form, or in its config.json's plain type; a tensor at a time, without
    the model. Other keys of config.json and other files of the directory stay as they are.

    Raises:
        UserError: as `load_pretrained`.
    """
    checkpoint = _Checkpoint(source, None)
    config = {**checkpoint.raw_config, "num_nextn_predict_layers": checkpoint.config.num_nextn_predict_layers}
    config.pop("quantization_config", None)
    write_checkpoint(destination, config, source, checkpoint.specs, checkpoint.tensors(), shard_bytes, fp8)


class _Checkpoint:
    """A checkpoint directory whose headers have been compared with its config.json; no weight is read yet."""

    def __init__(self, directory: Path, dtype: torch.dtype | None) -> None:
        self.raw_config = _raw_config(directory)
        where = str(directory / CONFIG)
        config = ModelConfig.from_hf(self.raw_config, where)  # a wrong config is told before a missing weight
        self.stored = stored_tensors(directory)
        self.config = self._as_stored(config, where, dtype)
        with torch.device("meta"):
            self.meta_model = BailingMoeV2ForCausalLM(self.config)
        self.specs = {name: TensorSpec.of(tensor) for name, tensor in published_tensors(self.meta_model).items()}
        problems = [
            _listing("missing tensors", sorted(self.specs.keys() - self.stored.keys())),
            _listing("unknown tensors", sorted(self.stored.keys() - self.specs.keys() - self._scales())),
            _listing("wrong tensors", self._wrong(may_round=dtype is not None)),
        ]
        if any(problems):
            raise UserError(f"{directory}: does not match its config.json: {'; '.join(filter(None, problems))}")

    def _as_stored(self, config: ModelConfig, where: str, dtype: torch.dtype | None) -> ModelConfig:
        """The config with the type that is asked for and the MTP layers that the weights have."""
        changes: dict[str, Any] = {} if dtype is None else {"torch_dtype": str(dtype).removeprefix("torch.")}
        matches = (re.match(r"model\.layers\.(\d+)\.", name) for name in self.stored)
        present = {int(match[1]) for match in matches if match}
        mtp_layers = sum(index >= config.num_hidden_layers for index in present)
        # Published chat models ship without their MTP layer, and published configs without its key.
        if mtp_layers == 0 or self.raw_config.get("num_nextn_predict_layers") is None:
            changes["num_nextn_predict_layers"] = mtp_layers
        return parse(ModelConfig, {**config.model_dump(), **changes}, where) if changes else config

    def _scales(self) -> set[str]:
        """Names of the scales of FP8 tensors."""
        return {name + SCALE_SUFFIX for name, tensor in self.stored.items() if tensor.spec.dtype == STORED_TYPE}

    def _wrong(self, may_round: bool) -> Iterator[str]:
        for name, expected in self.specs.items():
            if name not in self.stored:
                continue
            spec = self.stored[name].spec
            if spec.shape != expected.shape:
                yield f"{name} is {spec} instead of {expected}"
            elif spec.dtype == STORED_TYPE:
                scale = self.stored.get(name + SCALE_SUFFIX)
                if scale is None:
                    yield f"{name} is {spec} without {name}{SCALE_SUFFIX}"
                elif scale.spec != scale_spec(spec.shape):
                    yield f"{scale.name} is {scale.spec} instead of {scale_spec(spec.shape)}"
            elif not may_round and torch.promote_types(spec.dtype, expected.dtype) != expected.dtype:
                yield f"{name} is {spec} instead of {expected} (give a dtype to have it rounded)"

    @torch.no_grad()
    def read_into(self, target: Tensor, name: str) -> None:
        source = self.stored[name]
        if source.spec.dtype == STORED_TYPE:
            scales = self.stored[name + SCALE_SUFFIX].load()
            dequantize_into(target, source.load().to(target.device), scales.to(target.device))
        elif source.spec.dtype == target.dtype and target.device.type == "cpu":
            source.load_into(target)
        else:
            target.copy_(source.load())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, spec in self.specs.items():
            tensor = torch.empty(spec.shape, dtype=spec.dtype)
            self.read_into(tensor, name)
            yield name, tensor


def _raw_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    data = read_json(path, missing=f"{path}: no such file; {directory} is not a whole checkpoint")
    # What transformers makes of the config when it saves a published model: no model_type, and a newer name.
    if not data.get("model_type") and data.get("architectures") == HEADER_KEYS["architectures"]:
        data["model_type"] = HEADER_KEYS["model_type"]
    if "dtype" in data:
        data["torch_dtype"] = data.pop("dtype")
    quantization = data.get("quantization_config")
    if quantization is not None:
        expected = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
        for key, value in expected.items():
            if not isinstance(quantization, dict) or quantization.get(key) != value:
                raise UserError(f"{path}.quantization_config: only {expected} is supported, got {quantization}")
    return data


def write_checkpoint(
    directory: Path,
    config: dict[str, Any],
    others: Path | None,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
    fp8: bool = False,
) -> None:
    """Write a checkpoint whose tensors come one by one in the order of `specs`; config.json is put in place last.

    Args:
        config: content of config.json.
        others: directory whose other files (tokenizer, generation_config.json) are copied.
        fp8: quantise the projections to the blockwise FP8 form.
    """
    if fp8:
        config = {**config, "quantization_config": quantization_config(config["num_nextn_predict_layers"])}
        specs, tensors = quantized_specs(specs), quantized_stream(tensors)
    with _replaced(directory) as staging:
        if others is not None:
            for path in sorted(others.iterdir()):
                if path.is_file() and path.name not in (CONFIG, INDEX) and path.suffix != ".safetensors":
                    shutil.copyfile(path, staging / path.name)
        write_weights(staging, specs, tensors, shard_bytes)
        (staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextmanager
def _replaced(directory: Path) -> Iterator[Path]:
    """A folder whose files take the place of the checkpoint in `directory` once the block is through."""
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=directory))
    try:
        yield staging
        for path in staging.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        for stale in (directory / CONFIG, directory / INDEX, *directory.glob("model*.safetensors")):
            stale.unlink(missing_ok=True)
        for path in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG):
            path.replace(directory / path.name)
    finally:
        shutil.rmtree(staging)
        if not any(directory.iterdir()):
            directory.rmdir()


def _listing(title: str, names: Iterable[str], most: int = 20) -> str:
    found = list(names)
    if not found:
        return ""
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return f"{title}: {', '.join(found[:most])}{more}"
