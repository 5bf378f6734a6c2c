"""The procedural problems that the lifecycle teaches, trains on and asks, unless told otherwise."""

from ling_flow.data.reasoning import TaskSpec

TASKS = (
    TaskSpec(name="chain_sum", difficulties=(1, 2, 3), weight=7),
    TaskSpec(name="number_sorting", difficulties=(1,), weight=1),
    TaskSpec(name="count_bits", difficulties=(1,), weight=1),
    TaskSpec(name="gcd", difficulties=(1,), weight=1),
)
