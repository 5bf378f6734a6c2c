"""A planner, and a step with a side effect."""

from pathlib import Path

from pydantic import Field

from ling_flow.config import StrictModel
from ling_flow.flow.component import Resources, component
from toy.average import AverageConfig
from toy.draw import DrawConfig


class PlanConfig(StrictModel):
    size: int = Field(3, description="How many numbers")


class PlanResult(StrictModel):
    draw: DrawConfig = Field(description="Config of draw")
    average: AverageConfig = Field(description="Config of average")


@component(version=1, resources=Resources(), planner=True)
def plan(config: PlanConfig) -> PlanResult:
    """Resolve the configs of the other steps."""
    return PlanResult(draw=DrawConfig(count=config.size), average=AverageConfig(power=2))


class PublishConfig(StrictModel):
    directory: Path = Field(description="Where the mark is put")


class PublishResult(StrictModel):
    mark: Path = Field(description="The file put there")


@component(version=1, resources=Resources(), still_valid=lambda config, result, root: result.mark.exists())
def publish(config: PublishConfig) -> PublishResult:
    """Put a mark into a directory outside our artifacts."""
    mark = config.directory / "mark"
    mark.write_text("here")
    return PublishResult(mark=mark)
