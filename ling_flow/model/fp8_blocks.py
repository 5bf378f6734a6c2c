"""The blockwise FP8 form of a checkpoint (Ling 2.0's published converter).

A quantised `X.weight` (M, N) is stored as float8_e4m3fn beside `X.weight_scale_inv`, float32
(ceil(M/128), ceil(N/128)); an element is its stored value times the scale of its block of 128×128.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ling_flow.model.checkpoint_files import TensorSpec

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"
STORED_TYPE = torch.float8_e4m3fn
_LARGEST = 448.0  # of float8_e4m3fn
_LEAST_MAXIMUM = 1e-4

_QUANTIZED = (
    ".attention.query_key_value.weight",
    ".attention.dense.weight",
    ".gate_proj.weight",
    ".up_proj.weight",
    ".down_proj.weight",
)


def quantization_config(mtp_layers: int) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    With an MTP layer it names the plain linear layers: otherwise SGLang's draft model and transformers look for an
    FP8 `eh_proj`, which the published form does not have.
    """
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        **({"modules_to_not_convert": ["lm_head", "eh_proj"]} if mtp_layers else {}),
    }


def is_quantized(name: str) -> bool:
    """Whether the published FP8 form holds this tensor in FP8: the projections of attention and of every
    feed-forward; not embeddings, head, norms, router and `eh_proj`."""
    return name.endswith(_QUANTIZED)


def quantized_specs(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Types and shapes of the FP8 form."""
    stored: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        if is_quantized(name):
            stored[name] = TensorSpec(STORED_TYPE, spec.shape)
            stored[name + SCALE_SUFFIX] = scale_spec(spec.shape)
        else:
            stored[name] = spec
    return stored


def scale_spec(shape: tuple[int, ...]) -> TensorSpec:
    """Type and shape of the scales of a matrix (M, N)."""
    return TensorSpec(torch.float32, tuple(-(-size // BLOCK) for size in shape))


def quantized_stream(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The FP8 form, tensor by tensor, in the order of `quantized_specs`."""
    for name, tensor in tensors:
        if is_quantized(name):
            stored, scales = quantize(tensor.detach(), power_of_two=_rounds_scales(name))
            yield name, stored
            yield name + SCALE_SUFFIX, scales
        else:
            yield name, tensor


def _rounds_scales(name: str) -> bool:
    """The published converter rounds the scales of these tensors up to powers of two."""
    return name.endswith(".attention.dense.weight") or (".experts." in name and not name.endswith(".down_proj.weight"))


def quantize(weight_MN: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Stored values (M, N) and scales; a block's scale is max(largest magnitude, 1e-4) / 448, or the next power of
    two."""
    rows, columns = weight_MN.shape
    stored_MN = torch.empty(weight_MN.shape, dtype=STORED_TYPE, device=weight_MN.device)
    scales = torch.empty(scale_spec((rows, columns)).shape, device=weight_MN.device)
    for index in range(len(scales)):  # a row of blocks at a time: no float32 copy of the whole matrix
        block = slice(index * BLOCK, (index + 1) * BLOCK)
        values = weight_MN[block].float()
        padded = functional.pad(values.abs(), (0, -columns % BLOCK))
        scale = padded.unflatten(1, (-1, BLOCK)).amax((0, 2)).clamp(min=_LEAST_MAXIMUM) / _LARGEST
        scales[index] = _next_power_of_two(scale) if power_of_two else scale
        stored_MN[block] = (values / _across(scales[index], columns)).to(STORED_TYPE)
    return stored_MN, scales


def dequantize_into(target_MN: Tensor, stored_MN: Tensor, scales: Tensor) -> None:
    """target = stored · scale in float32, rounded once to the target's type."""
    for index in range(len(scales)):
        block = slice(index * BLOCK, (index + 1) * BLOCK)
        target_MN[block] = stored_MN[block].float() * _across(scales[index], stored_MN.shape[1])


def _next_power_of_two(scale: Tensor) -> Tensor:
    """At least `scale`: one is added to the exponent where any bit of the fraction is set. Exact, which log2 is not."""
    return ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def _across(scale: Tensor, columns: int) -> Tensor:
    """Scale of each column, from one scale per block."""
    return scale.repeat_interleave(BLOCK)[:columns]
