"""Small components, so that lineage has artifacts to walk."""

import json

from pydantic import Field

from ling_flow.config import StrictModel
from ling_flow.flow.component import Dataset, Input, Model, Output, Resources, component


class Nothing(StrictModel):
    """No settings."""


class Size(StrictModel):
    """What was made."""

    tokens: int = Field(description="tokens")


class Stage(StrictModel):
    """Which stage."""

    stage: str = Field(description="name of the stage")


@component(version=1, resources=Resources(cpus=1, memory_gib=1))
def collect(config: Nothing, corpus: Output[Dataset]) -> Size:
    """A corpus of one source."""
    half = {"documents": 1, "tokens": 50, "digest": "d1" * 32}
    source = {"train": half, "validation": {**half, "digest": "d2" * 32}}
    (corpus.path / "corpus.json").write_text(json.dumps({"sources": {"books": source}}))
    return Size(tokens=100)


@component(version=1, resources=Resources(cpus=1, memory_gib=1))
def gather(config: Nothing, corpus: Output[Dataset]) -> Size:
    """A corpus whose record has another shape than ours."""
    (corpus.path / "corpus.json").write_text('{"documents": 3}')
    return Size(tokens=100)


@component(version=1, resources=Resources(cpus=1, memory_gib=1), label=lambda config: config.stage)
def grow(
    config: Stage, corpus: Input[Dataset], checkpoints: Output[Model], previous: Input[Model] | None = None
) -> Size:
    """A model directory with two checkpoints inside."""
    for directory in (checkpoints.path, checkpoints.path / "step-1"):
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text("{}")
    return Size(tokens=100)
