"""The published figures of the Ling 2.0 family, as data with their sources, and the tensors of a published checkpoint.

Sources: report (arXiv 2510.22115) Table 1 and Fig. 14; README of inclusionAI/Ling-V2; the model cards' metadata. No
torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ling_flow.model.config import ModelConfig
from ling_flow.model.memory import Layout
from ling_flow.scaling.law import LING_2_LAW


@dataclass(frozen=True)
class Published:
    """One member of the family as its authors give it; None where they give nothing."""

    name: str
    total: float  # report, Table 1
    active: float  # report, Table 1
    active_non_embedding: float | None  # README and model card
    checkpoint_bfloat16: int | None  # parameters by the checkpoint's metadata: without MTP layer and expert biases
    checkpoint_float32: int | None  # expert biases by the checkpoint's metadata
    learning_rate: float  # report, Table 1; by the scaling law it fixes the compute of the run
    batch_sequences: int  # report, Table 1; the unit, sequences of 4096 tokens, is what the batch-size law gives
    layout: Layout  # to estimate memory by: where its authors give none, one of ours for GPUs of 80 GB

    @property
    def law_flops(self) -> float:
        """The compute C at which the published learning-rate law gives the published learning rate."""
        law = LING_2_LAW.learning_rate
        return float((self.learning_rate / law.coefficient) ** (1 / law.exponent))


FAMILY = {
    # The README's throughput table starts at 8 GPUs of 80 GB; its training scripts use 8-way expert parallelism.
    "mini": Published("Ling-mini-2.0", 16e9, 1.4e9, 789e6, None, None, 3.36e-4, 4400, Layout(data=8, expert=8)),
    "flash": Published(
        "Ling-flash-2.0",
        103e9,
        6.1e9,
        4.8e9,
        102_889_697_280,
        7936,
        2.61e-4,
        8352,
        Layout(data=16, expert=8, pipeline=4),
    ),
    # Report, Fig. 14: 2016 GPUs, TP1 EP8 PP21, hence 96 data-parallel ranks; full recomputation.
    "one_t": Published(
        "Ling-1T", 1000e9, 51e9, None, None, None, 1.86e-4, 18144, Layout(data=96, expert=8, pipeline=21)
    ),
}
"""The presets that are models only: no pipeline preset trains them here."""

PUBLISHED_TOKENS = 20e12
"""Pre-training tokens of every member (report §3.2.1)."""


def tensor_counts(config: ModelConfig) -> tuple[int, int]:
    """Tensors of a published checkpoint: (without MTP layers, what these add). Each expert has three of its own."""
    common = 6  # two norms of the layer, fused projection, query and key norm, output projection
    moe = common + 2 + 3 * config.num_experts + (3 if config.num_shared_experts else 0)
    dense_layers = config.first_k_dense_replace
    trunk = 3 + dense_layers * (common + 3) + (config.num_hidden_layers - dense_layers) * moe
    return trunk, config.num_nextn_predict_layers * (moe + 4)
