"""A DAG with the same component twice, by one label, and a pipeline parameter inside a config."""

from kfp import dsl

from toy.average import average
from toy.draw import draw


@dsl.pipeline(name="twice")
def twice(name: str = "a,b", scale: float = 1.0) -> None:
    drawn = draw.kfp(config=f'{{"count": 3, "name": "{name}", "noise": {{"scale": {scale}}}}}')
    tasks = [average.kfp(config=f'{{"power": {power}}}', numbers=drawn.outputs["numbers"]) for power in (1, 2)]
    for task in (drawn, *tasks):
        task.set_caching_options(False)
