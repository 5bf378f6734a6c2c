"""Draw numbers: a component with nested config, context field, several outputs."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from ling_flow.config import StrictModel, context_field
from ling_flow.flow.component import HTML, Dataset, Metrics, Output, Resources, Step, component


class Noise(StrictModel):
    scale: float = Field(0.5, gt=0, description="Standard deviation, in units of the numbers")
    shape: Literal["normal", "uniform"] = Field("normal", description="Distribution")


class DrawConfig(StrictModel):
    count: int = Field(10, ge=1, le=10**18, description="How many numbers")
    name: str = Field("series", description="Name of the series")
    ratio: float | None = Field(None, description="Share kept, 0 to 1; null keeps all")
    tags: list[str] = Field(["a"], description="Free tags")
    noise: Noise = Field(Noise(scale=2.0), description="Noise added")
    stop_at: int = context_field(-1, why="a test device", description="Kill the process after this many numbers")
    pause: float = context_field(0.0, why="a test device", description="Seconds between two numbers", ge=0)


class DrawResult(StrictModel):
    mean: float = Field(description="Mean of the numbers")
    count: int = Field(description="How many numbers")
    started_at: int = Field(description="Numbers that an earlier try had left")
    ok: bool = Field(description="Whether all went well")
    tags: list[str] = Field(description="The tags")
    noise: Noise = Field(description="Noise used")


@component(
    version=3,
    resources=Resources(cpus=1, memory_gib=0.5),
    resumable=True,
    label=lambda config: f"draw_{config.name}",
    runs_on="job",
)
def draw(
    config: DrawConfig, numbers: Output[Dataset], summary: Output[Metrics], report: Output[HTML], step: Step
) -> DrawResult:
    """Draw random numbers.

    One file per number, so that a killed run can go on.
    """
    calls = os.environ.get("TOY_CALLS")
    if calls:
        with Path(calls).open("a") as stream:
            stream.write("draw\n")
    started_at = len(list(numbers.path.glob("*.txt")))
    for index in range(started_at, config.count):
        if index == config.stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        value = random.Random(index).gauss(0, config.noise.scale)
        (numbers.path / f"{index:04}.txt").write_text(repr(value))
        time.sleep(config.pause)
        step.progress(index + 1, config.count, value=value)
    values = [float(file.read_text()) for file in sorted(numbers.path.glob("*.txt"))]
    numbers.contract["unit"] = "one"
    mean = sum(values) / len(values)
    step.metrics({"mean": mean}, step=config.count)
    (summary.path / "summary.json").write_text(json.dumps({"mean": mean}))
    (report.path / "index.html").write_text("<!doctype html><p>mean</p>")
    return DrawResult(
        mean=mean, count=len(values), started_at=started_at, ok=True, tags=config.tags, noise=config.noise
    )
