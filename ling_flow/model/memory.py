"""Training memory of the largest rank by part, in bytes, for any preset and parallel layout. No torch here.

What our own modules keep for the backward pass is counted tensor by tensor (`tests/model/test_memory.py` holds it to
what autograd is seen to save). Not counted: optional router losses, communication buffers, fragmentation, temporaries
other than the output head's, the framework and its kernels; experts are taken to be loaded evenly.

Letters: T tokens of a micro-batch, D hidden, V vocabulary, E experts, K chosen, F expert width, H heads, C head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from ling_flow.config import StrictModel
from ling_flow.errors import UserError
from ling_flow.model.config import ModelConfig

LOGITS_CHUNK_ELEMENTS = 2**28
"""Logits that exist at a time on a GPU (`kernels/linear_cross_entropy.py`)."""


class Layout(StrictModel):
    """How training is spread over data × pipeline ranks, and in which types its numbers are kept."""

    data: int = Field(1, ge=1, description="ranks that see different tokens (data parallel), per pipeline stage")
    expert: int = Field(1, ge=1, description="of these, how many share the routed experts among them; divides data")
    pipeline: int = Field(1, ge=1, description="stages of consecutive layers, 1F1B schedule; an MTP layer is a layer")
    sharding: Literal["none", "zero1", "fsdp"] = Field(
        "zero1", description="divided over the ranks of equal weights: nothing, the optimizer, or weights and all"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="type of weights and activations; bfloat16 adds float32 master weights"
    )
    optimizer: Literal["adamw", "adamw8bit", "muon"] = Field(
        "adamw",
        description="two moments in float32; in 8 bits with a float32 scale per block of 256; or one momentum in "
        "float32 for the hidden matrices, and AdamW for the rest",
    )
    micro_batch: int = Field(1, ge=1, description="sequences per forward pass and rank")
    recompute: bool = Field(True, description="layers keep their input only and run again in the backward pass")

    @property
    def ranks(self) -> int:
        """Devices in all."""
        return self.data * self.pipeline

    @property
    def element(self) -> int:
        """Bytes of a weight and of an activation."""
        return 4 if self.precision == "float32" else 2

    def optimizer_bytes(self, hidden: int, other: int) -> int:
        """Optimizer state of so many elements of hidden matrices and other parameters: master weights where the
        weights are bfloat16, and moments or momentum."""
        masters = 4 if self.precision == "bfloat16" else 0
        moments = 2 * (1 + 4 / 256) if self.optimizer == "adamw8bit" else 8
        return round((masters + (4 if self.optimizer == "muon" else moments)) * hidden + (masters + moments) * other)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes by part on one rank of pipeline stage `stage` (from 0), the stage that needs most.

    `gathered` is the largest layer's weights and gradients while FSDP holds them whole. `activations` is what the
    layers keep without recomputation, `activations_recompute` with it. `logits` is the output head and its loss.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    activations_recompute: int
    logits: int
    recompute: bool

    @property
    def total(self) -> int:
        """The sum, with the activations of the layout's choice."""
        activations = self.activations_recompute if self.recompute else self.activations
        return self.weights + self.gradients + self.optimizer + self.gathered + activations + self.logits


def training_memory(config: ModelConfig, layout: Layout, sequence_length: int) -> TrainingMemory:
    """Memory of the rank that needs most. Gradients are float32 in either precision, as sums over micro-batches are.

    Raises:
        UserError: a layout that does not fit the model.
    """
    units = _units(config)
    _check(config, layout, len(units))
    bounds = [stage * len(units) // layout.pipeline for stage in range(layout.pipeline + 1)]
    stages = [
        _stage(config, layout, sequence_length, stage, units[bounds[stage] : bounds[stage + 1]])
        for stage in range(layout.pipeline)
    ]
    return max(stages, key=lambda memory: memory.total)


def naive_logits_bytes(config: ModelConfig, layout: Layout, sequence_length: int) -> int:
    """What a head that materialises its logits needs: float32 log-probabilities of every application until the
    backward pass, then one gradient of their size, also cast to the activations' type, and that of the head."""
    rows = layout.micro_batch * sequence_length * config.vocab_size
    cast = layout.element if layout.element < 4 else 0
    head = config.vocab_size * config.hidden_size * layout.element
    return rows * (4 * (1 + config.num_nextn_predict_layers) + 4 + cast) + head


def logits_bytes(config: ModelConfig, layout: Layout, sequence_length: int) -> int:
    """What our head needs on a GPU (`kernels/linear_cross_entropy.py`): gradients of hidden states and head instead of
    logits, for trunk and MTP; while it works, the head's gradient summed in float32, then also in its own type, and one
    chunk's logits, in place of which their gradient comes."""
    element, tokens = layout.element, layout.micro_batch * sequence_length
    head, hidden = config.vocab_size * config.hidden_size, tokens * config.hidden_size
    chunk = min(tokens * config.vocab_size, max(LOGITS_CHUNK_ELEMENTS, config.vocab_size))
    cast = element if element < 4 else 0
    kept = config.num_nextn_predict_layers * (hidden + head) * element
    return kept + hidden * element + head * (4 + cast) + chunk * element


def layer_activation_bytes(config: ModelConfig, dense: bool, tokens: int, element: int) -> int:
    """What one decoder layer keeps of `tokens` tokens for the backward pass, `element` bytes per activation."""
    hidden = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    # Inputs and outputs of both norms; the fused projection; queries and keys, normed and turned; attention's output.
    activations = 4 * hidden + (queries + 2 * keys) + (queries + keys) + queries
    # One float32 per row of each norm and of the softmax.
    narrow = 4 * (2 + config.num_attention_heads + config.num_key_value_heads + config.num_attention_heads)
    if dense:
        return tokens * (element * (activations + 3 * config.intermediate_size) + narrow)
    chosen = config.num_experts_per_tok
    # A row per chosen expert: input, fused projection, product, weight; the shared expert keeps its last two.
    activations += chosen * (hidden + 3 * config.moe_intermediate_size + 1) + 3 * config.shared_intermediate_size
    # Router, float32: all scores, those chosen, and their sum and its inverse.
    narrow += 4 * (config.num_experts + chosen + 2)
    if element < 4:  # the router keeps its own, float32 copy of its input, and the shared expert the input itself
        narrow += 4 * hidden
        activations -= 0 if config.num_shared_experts else hidden
    narrow += 8 * 3 * chosen  # int64: chosen experts, and the rows' order and its inverse
    return tokens * (element * activations + narrow)


def _units(config: ModelConfig) -> list[str]:
    """Decoder layers, bottom to top."""
    dense = config.first_k_dense_replace
    moe = config.num_hidden_layers - dense
    return ["dense"] * dense + ["moe"] * moe + ["mtp"] * config.num_nextn_predict_layers


def _check(config: ModelConfig, layout: Layout, units: int) -> None:
    if layout.data % layout.expert:
        raise UserError(f"layout.expert: must divide data ({layout.data}), got {layout.expert}")
    if config.num_experts % layout.expert:
        raise UserError(f"layout.expert: must divide num_experts ({config.num_experts}), got {layout.expert}")
    if layout.pipeline > units:
        raise UserError(f"layout.pipeline: must be at most {units}, the model's layers, got {layout.pipeline}")


def _unit_parameters(config: ModelConfig, unit: str) -> tuple[int, int]:
    """(parameters every rank of a stage holds, routed experts' parameters) of one layer."""
    counts = config.parameter_counts()
    if unit == "mtp":
        total = counts.mtp // config.num_nextn_predict_layers
    else:
        one = config.model_copy(update={"num_hidden_layers": 1, "first_k_dense_replace": int(unit == "dense")})
        total = one.parameter_counts().total - (2 * config.vocab_size + 1) * config.hidden_size
    routed = 0 if unit == "dense" else 3 * config.num_experts * config.hidden_size * config.moe_intermediate_size
    return total - routed, routed


def _unit_not_hidden(config: ModelConfig, unit: str) -> int:
    """Parameters of a layer that are no hidden matrix: norms and router (`training/optimizer.py`)."""
    norms = (5 if unit == "mtp" else 2) * config.hidden_size + 2 * config.head_dim
    return norms + (0 if unit == "dense" else config.num_experts * config.hidden_size)


def _unit_activations(config: ModelConfig, layout: Layout, unit: str, tokens: int) -> tuple[int, int]:
    """Bytes one layer keeps of one micro-batch: (without recomputation, with it)."""
    layer = layer_activation_bytes(config, unit == "dense", tokens, layout.element)
    row = tokens * config.hidden_size * layout.element
    if unit == "mtp":  # embedding and state before it, both normed and side by side, and the input of its last norm
        return layer + 5 * row + 3 * 4 * tokens, 2 * row
    return layer, row


def _stage(config: ModelConfig, layout: Layout, sequence_length: int, stage: int, units: list[str]) -> TrainingMemory:
    last = stage == layout.pipeline - 1
    embedding = config.vocab_size * config.hidden_size
    tokens = layout.micro_batch * sequence_length
    element = layout.element

    per_unit = [_unit_parameters(config, unit) for unit in units]
    tables = embedding * ((stage == 0) + last)
    if last and stage > 0 and config.num_nextn_predict_layers:
        tables += embedding  # the MTP layer needs the embedding where it is
    top_norm = config.hidden_size if last else 0
    replicated = sum(common for common, _ in per_unit) + tables + top_norm
    routed = sum(experts for _, experts in per_unit) // layout.expert
    biases = 4 * config.num_experts * sum(experts > 0 for _, experts in per_unit)

    copies = layout.data // layout.expert  # ranks that hold the same experts
    shared_out = -(-replicated // layout.data) + -(-routed // copies)
    whole = replicated + routed
    held = shared_out if layout.sharding == "fsdp" else whole
    stepped = whole if layout.sharding == "none" else shared_out
    others = sum(_unit_not_hidden(config, unit) for unit in units) + tables + top_norm
    if layout.sharding != "none":
        others = -(-others // layout.data)
    gathered = 0
    if layout.sharding == "fsdp":
        largest = max(common + experts // layout.expert for common, experts in per_unit)
        gathered = 2 * element * max(largest, embedding if tables else 0)

    kept = [_unit_activations(config, layout, unit, tokens) for unit in units]
    top = tokens * config.hidden_size * element if last else 0  # input of the final norm
    flying = layout.pipeline - stage  # micro-batches whose backward pass is still to come (1F1B)
    return TrainingMemory(
        stage=stage,
        weights=element * held + biases,
        gradients=4 * held,
        optimizer=layout.optimizer_bytes(stepped - others, others),
        gathered=gathered,
        activations=flying * (sum(full for full, _ in kept) + top),
        activations_recompute=flying * (sum(thin for _, thin in kept) + top) + max(full for full, _ in kept),
        logits=logits_bytes(config, layout, sequence_length) if last else 0,
        recompute=layout.recompute,
    )
