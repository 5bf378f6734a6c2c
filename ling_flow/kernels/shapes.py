"""The shapes that kernels are tested, compiled and measured at: one generator for all three.

Shapes: T tokens, K chosen, E experts, D hidden, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Load = Literal["balanced", "skewed", "holes", "one"]


@dataclass(frozen=True)
class MoEShape:
    """Sizes of one mixture-of-experts layer, and how its router spreads the tokens.

    `balanced`: every expert within one row of even. `skewed`: the share of expert e is proportional to 1/(e+1).
    `holes`: every other expert gets nothing, the rest are skewed. `one`: all tokens choose the first K experts.
    """

    name: str
    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    load: Load = "balanced"

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k


# Ragged, empty experts, a single expert, sizes that fill no tile: small enough for the interpreter.
SMALL = (
    MoEShape("even", 64, 128, 128, 4, 2),
    MoEShape("ragged", 75, 128, 64, 8, 2, "skewed"),
    MoEShape("empty experts", 40, 256, 128, 8, 3, "holes"),
    MoEShape("all to one", 150, 128, 128, 4, 1, "one"),
    MoEShape("one expert", 33, 128, 128, 1, 1),
    MoEShape("odd sizes", 37, 144, 80, 5, 2, "skewed"),
    MoEShape("one token", 1, 128, 128, 4, 2),
    MoEShape("no tokens", 0, 128, 128, 4, 2),
)

# One layer of the published models as one GPU sees it (flash: a rank of 8-way expert parallelism).
PUBLISHED = (
    MoEShape("mini 8k", 8192, 2048, 512, 256, 8),
    MoEShape("mini 32k", 32768, 2048, 512, 256, 8),
    MoEShape("mini 32k skewed", 32768, 2048, 512, 256, 8, "skewed"),
    MoEShape("flash rank", 65536, 4096, 1024, 32, 1),
)


class Routing(NamedTuple):
    """What a router would have said."""

    indices_TK: Tensor  # int64
    weights_TK: Tensor  # float32, positive
    counts_E: Tensor  # int64


def route(shape: MoEShape, device: torch.device | str = "cpu", seed: int = 0) -> Routing:
    """A routing of that shape and load. On the meta device, its types and sizes."""
    if torch.device(device).type == "meta":
        return Routing(
            torch.empty(shape.tokens, shape.top_k, dtype=torch.int64, device="meta"),
            torch.empty(shape.tokens, shape.top_k, device="meta"),
            torch.empty(shape.experts, dtype=torch.int64, device="meta"),
        )
    generator = torch.Generator().manual_seed(seed)
    if shape.load == "balanced":
        chosen = torch.arange(shape.pairs) % shape.experts
        indices_TK = chosen.view(shape.tokens, shape.top_k)[torch.randperm(shape.tokens, generator=generator)]
    elif shape.load == "one":
        indices_TK = torch.arange(shape.top_k).repeat(shape.tokens, 1)
    else:
        share_E = 1.0 / torch.arange(1, shape.experts + 1)
        if shape.load == "holes":
            share_E[1::2] = 0
        # The largest of log share + Gumbel noise: a draw of K without replacement.
        noise_TE = -torch.empty(shape.tokens, shape.experts).exponential_(generator=generator).log()
        indices_TK = (share_E.log() + noise_TE).topk(shape.top_k).indices
    weights_TK = torch.rand(shape.tokens, shape.top_k, generator=generator) + 0.1
    counts_E = torch.bincount(indices_TK.flatten(), minlength=shape.experts)
    return Routing(indices_TK.to(device), weights_TK.to(device), counts_E.to(device))


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Standard normal values, made where they are wanted; on the meta device, none."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)
