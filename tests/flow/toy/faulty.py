"""A DAG whose first step takes its time, and whose second fails twice before it works."""

from kfp import dsl

from toy.average import average
from toy.draw import draw


@dsl.pipeline(name="faulty")
def faulty() -> None:
    drawn = draw.kfp(config='{"count": 80, "pause": 0.1}')
    averaged = average.kfp(config='{"power": 2, "fail": "twice"}', numbers=drawn.outputs["numbers"])
    averaged.set_retry(num_retries=3)
    for task in (drawn, averaged):
        task.set_caching_options(False)
