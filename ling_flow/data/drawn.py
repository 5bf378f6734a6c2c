"""How far a run has read a source. No torch here."""

from __future__ import annotations

from pydantic import Field

from ling_flow.config import StrictModel


class Drawn(StrictModel):
    """What a stage is through with, of one source. A later stage goes on behind it where it reads in the same order."""

    tokens: int = Field(ge=0, description="tokens that are through, over all stages that read in this order")
    order: str = Field(description="what decides the order: the shard's SHA-256, the seed, and how it is read")
