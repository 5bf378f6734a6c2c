"""A DAG with the name of the interpreter in a config."""

from kfp import dsl

from toy.draw import draw


@dsl.pipeline(name="named")
def named() -> None:
    draw.kfp(config='{"count": 2, "name": "python3_docs"}').set_caching_options(False)
