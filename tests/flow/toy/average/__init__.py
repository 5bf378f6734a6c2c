"""Average numbers: inputs, one of them optional, and every way to fail."""

import os
import sys
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from ling_flow.config import StrictModel, context_field
from ling_flow.errors import SystemFault, UserError
from ling_flow.flow.component import Dataset, Input, Metrics, Model, Output, Resources, component


class AverageConfig(StrictModel):
    power: int = Field(description="Power mean's exponent")
    fail: Literal["no", "user", "system", "twice", "defect", "nan", "contract", "leave"] = Field(
        "no", description="How to fail"
    )
    pause: float = context_field(0.0, why="a test device", description="Seconds to wait", ge=0)


class AverageResult(StrictModel):
    average: float = Field(description="Power mean of the numbers")
    had_previous: bool = Field(description="Whether an earlier model was given")


@component(version=1, resources=Resources())
def average(
    config: AverageConfig,
    numbers: Input[Dataset],
    model: Output[Model],
    summary: Input[Metrics] | None = None,
    previous: Input[Model] | None = None,
) -> AverageResult:
    """Average the numbers."""
    calls = os.environ.get("TOY_CALLS")
    if calls:
        with Path(calls).open("a") as stream:
            stream.write("average\n")
    (model.path / "half.txt").write_text("half written")
    time.sleep(config.pause)
    if config.fail == "user":
        raise UserError("power: give a smaller one")
    if config.fail == "system":
        raise SystemFault("the server is away")
    if config.fail == "twice" and Path(calls or "").read_text().count("average") < 3:
        raise SystemFault("the server is away, for now")
    if config.fail == "defect":
        raise ZeroDivisionError("a bug of ours")
    if config.fail == "leave":
        sys.exit(0)
    if config.fail == "contract":
        model.contract["rate"] = float("nan")
    values = [abs(float(file.read_text())) ** config.power for file in sorted(numbers.path.glob("*.txt"))]
    if summary is not None:
        assert "mean" in summary.read_json("summary.json")
    value = float("nan") if config.fail == "nan" else sum(values) / len(values)
    model.contract.update(numbers.contract)
    return AverageResult(average=value, had_previous=previous is not None)
