"""The FP8 recipe of Ling 2.0 (§5.1): what runs in blockwise FP8, and the safeguard that watches it.

In FP8: the projections of attention, dense feed-forwards, shared and routed experts, also inside the MTP layers. In
bfloat16: attention itself, norms, embedding, output head and the MTP layers' `eh_proj`. In float32: router, softmax,
loss, master weights, sums inside every product, optimizer. Weights are quantised once per optimizer step.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ling_flow.errors import UserError
from ling_flow.kernels.fp8_layers import FP8Weight
from ling_flow.model.layers import Experts, Linear
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.settings import FP8Settings, Precision

_KEPT_HIGH = ("lm_head", "eh_proj")
_LEAF = "by columns"  # operands of weight gradients: their error does not pass on (Ling 2.0 §5.1)
LEAST_CAPABILITY = (8, 9)  # the first GPUs that know E4M3
NORM_WARNING = 0.1  # how far from 1 the factor between the norms may be; rounding to FP8 makes less than 0.01
SLICE = 2**24  # elements that are compared at a time


class OperationError(NamedTuple):
    """What FP8 did to one operation of one layer.

    Attributes:
        layer: name of the module.
        operation: `input`, `weight`, `gradient` (as quantised, by rows or columns), `forward`, `dgrad`, `wgrad` (a
            product against the same in float32).
        underflow: share of the elements that became 0.
        cosine: of the angle between the two; 1 is no distortion, or no values to compare.
        norm: Euclidean norm in FP8 over that in high precision, which the cosine does not see; 1 likewise.
        finite: both hold finite values only.

    Of an operation that is told in parts (experts, parts of a batch), each is the worst of them.
    """

    layer: str
    operation: str
    underflow: float
    cosine: float
    norm: float
    finite: bool


def set_precision(model: BailingMoeV2ForCausalLM, precision: Precision, settings: FP8Settings) -> None:
    """Make `model` compute in `precision` from here on. Its weights stay as they are, float32 in training.

    Raises:
        UserError: `settings` names a layer that the model does not have, the weights are not float32, or the model is
            on a GPU without FP8.
    """
    for module in model.modules():
        if isinstance(module, Linear | Experts):
            module.fp8 = None
    model.compute_dtype = None if precision == "float32" else torch.bfloat16
    if precision != "fp8":
        return
    if model.lm_head.weight.dtype != torch.float32:
        raise UserError(f"precision: fp8 needs float32 weights, got a model in {model.lm_head.weight.dtype}")
    capability = _capability(model.lm_head.weight.device)
    if capability is not None and capability < LEAST_CAPABILITY:
        raise UserError(
            "precision: fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell), this one has "
            f"{capability[0]}.{capability[1]}: use bfloat16"
        )
    depth = len(model.model.layers)
    for index in settings.bfloat16_layers:
        if not -depth <= index < depth:
            raise UserError(
                f"fp8.bfloat16_layers: the model has layers 0 to {depth - 1} (or from -{depth}), got {index}"
            )
    kept = {index % depth for index in settings.bfloat16_layers}
    for index, layer in enumerate(model.model.layers):
        if index in kept:
            continue
        for name, module in layer.named_modules():
            if isinstance(module, Experts):
                module.fp8 = (FP8Weight(), FP8Weight())
            elif isinstance(module, Linear) and not name.endswith(_KEPT_HIGH):
                module.fp8 = FP8Weight()


def _capability(device: torch.device) -> tuple[int, int] | None:
    """Of a GPU; None for a CPU, which follows the kernels' definitions."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def fp8_weights(model: nn.Module) -> dict[str, FP8Weight]:
    """Every weight that is in FP8, by the name of its module."""
    found: dict[str, FP8Weight] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.fp8 is not None:
            found[name] = module.fp8
        elif isinstance(module, Experts) and module.fp8 is not None:
            found[f"{name}.gate_up_proj"], found[f"{name}.down_proj"] = module.fp8
    return found


class Safeguard:
    """Compares FP8 operations with high precision, where and when asked (Ling 2.0 §5.1)."""

    def __init__(self, model: BailingMoeV2ForCausalLM, settings: FP8Settings) -> None:
        self.settings = settings
        self._weights = fp8_weights(model)
        self._found: dict[tuple[str, str], OperationError] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every FP8 operation of a forward and backward pass is computed in high precision too."""
        self._found.clear()
        for name, weight in self._weights.items():
            weight.watch = functools.partial(self._record, name)
        try:
            yield
        finally:
            for weight in self._weights.values():
                weight.watch = None

    @torch.no_grad()
    def _record(self, layer: str, operation: str, exact: Tensor, found: Tensor) -> None:
        sums = torch.zeros(4, dtype=torch.float64, device=exact.device)
        for mine, theirs in zip(found.flatten().split(SLICE), exact.flatten().split(SLICE), strict=True):
            lost = ((mine == 0) & (theirs != 0)).sum()
            mine, theirs = mine.double(), theirs.double()
            sums += torch.stack([mine @ mine, theirs @ theirs, mine @ theirs, lost])
        mine_2, theirs_2, product, lost_count = sums.tolist()
        cosine = norm = 1.0
        finite = math.isfinite(mine_2) and math.isfinite(theirs_2)  # no square of a float32 overflows in float64
        if finite and mine_2 and theirs_2:
            cosine, norm = product / math.sqrt(mine_2 * theirs_2), math.sqrt(mine_2 / theirs_2)
        elif finite and (mine_2 or theirs_2):
            norm = math.inf if mine_2 else 0.0
        error = OperationError(layer, operation, lost_count / max(exact.numel(), 1), cosine, norm, finite)
        # In the order in which operations first ran; recomputing a layer runs its forward pass twice.
        before = self._found.get((layer, operation))
        self._found[layer, operation] = error if before is None else _worse(before, error)

    @property
    def found(self) -> list[OperationError]:
        """Of the last watched pass, in order."""
        return list(self._found.values())

    def metrics(self) -> dict[str, float]:
        """The worst over the layers, per operation: `fp8/underflow/…`, `fp8/cosine/…` and `fp8/norm/…`."""
        worst: dict[str, OperationError] = {}
        for error in self._found.values():
            worst[error.operation] = _worse(worst.get(error.operation, error), error)
        return {
            f"fp8/{kind}/{operation.replace(' ', '_')}": getattr(error, kind)
            for operation, error in worst.items()
            for kind in ("underflow", "cosine", "norm")
        }

    def warnings(self) -> list[str]:
        """A line per operation beyond the thresholds; the operands of weight gradients are only logged."""
        lines = []
        for error in self._found.values():
            where = f"fp8: {error.layer}, {error.operation}"
            if not error.finite:
                lines.append(f"{where}: not finite")
            elif _LEAF in error.operation:
                continue
            elif error.cosine < self.settings.cosine_warning:
                lines.append(f"{where}: cosine to high precision {error.cosine:.4f}")
            elif abs(error.norm - 1) > NORM_WARNING:
                lines.append(f"{where}: {error.norm:.2g} times as large as in high precision")
            elif error.underflow > self.settings.underflow_warning and error.operation in ("input", "gradient"):
                lines.append(f"{where}: {error.underflow:.1%} of the elements became 0")
        return lines


def _worse(one: OperationError, other: OperationError) -> OperationError:
    """The worst of both in each respect, under the name of the first."""
    return OperationError(
        one.layer,
        one.operation,
        max(one.underflow, other.underflow),
        min(one.cosine, other.cosine),
        max(one.norm, other.norm, key=lambda norm: abs(norm - 1)),
        one.finite and other.finite,
    )
