"""What training costs: FLOPs, GPU-hours at a utilisation, energy. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from ling_flow.config import StrictModel
from ling_flow.model.config import ModelConfig
from ling_flow.model.flops import Scores, training_flops_per_token


@dataclass(frozen=True)
class Gpu:
    """An accelerator by its data sheet (SXM form): peak of dense bf16 products in TFLOP/s, board power in watts."""

    peak_tflops: float
    watts: float


GPUS = {
    "a100": Gpu(312, 400),
    "h20": Gpu(148, 400),
    "h100": Gpu(989.5, 700),
    "h800": Gpu(989.5, 700),
    "h200": Gpu(989.5, 700),
}


class CostOptions(StrictModel):
    """What turns an architecture into FLOPs, GPU-hours and energy."""

    context: int = Field(4096, ge=1, le=2**40, description="tokens per sequence")
    scores: Scores = Field(
        "full", description="attention over the whole sequence, as the laws count, or the half of it"
    )
    tokens: float = Field(20e12, gt=0, le=1e18, allow_inf_nan=False, description="training tokens")
    mfu: float = Field(0.35, ge=1e-6, le=1, description="training FLOPs, nothing recomputed, over the GPUs' peak")
    gpu: Literal["a100", "h20", "h100", "h800", "h200"] = Field("h800", description="gives peak and power")
    peak_tflops: float | None = Field(None, ge=1e-6, le=1e9, description="another peak of one GPU, TFLOP/s")
    watts: float | None = Field(None, gt=0, le=1e9, description="another power of one GPU, W")

    @property
    def peak(self) -> float:
        """Peak of one GPU, TFLOP/s."""
        return self.peak_tflops or GPUS[self.gpu].peak_tflops

    @property
    def power(self) -> float:
        """Power of one GPU, W."""
        return self.watts or GPUS[self.gpu].watts


@dataclass(frozen=True)
class TrainingCost:
    """Cost of a training run. `law_flops` is the C = M·D of the scaling laws: full attention scores, no output head, no
    MTP layers. `flops` is everything that is computed, and makes the GPU-hours. The energy is that of the GPUs alone.
    """

    law_flops: float
    flops: float
    gpu_hours: float
    energy_kwh: float


def training_cost(config: ModelConfig, options: CostOptions) -> TrainingCost:
    """Cost of training `config` on `options.tokens` tokens."""
    law = training_flops_per_token(config, options.context).non_embedding * options.tokens
    flops = training_flops_per_token(config, options.context, options.scores).total * options.tokens
    hours = flops / (options.peak * 1e12 * options.mfu) / 3600
    return TrainingCost(law, flops, hours, hours * options.power / 1000)
