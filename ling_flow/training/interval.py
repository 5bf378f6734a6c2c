"""How often to save: the interval at which saving and what failures undo together cost least (Ling 2.0, appendix A)."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable

MINUTES_PER_DAY = 1440
FEWEST_STEPS, STEPS = 3, 15  # beside which nothing is written: before they tell how long a step is, and the newest kept


def best_interval(save_cost_seconds: float, failures_per_day: float) -> float:
    """Seconds between two saves: s = √(2880·C/F), with s and C in minutes.

    Args:
        save_cost_seconds: that one save takes from training.
    """
    return 60 * math.sqrt(2 * MINUTES_PER_DAY * save_cost_seconds / 60 / failures_per_day)


def expected_loss(
    interval_seconds: float, save_cost_seconds: float, failures_per_day: float, restart_seconds: float = 0.0
) -> float:
    """Seconds of a day that do not train: E(s) = 1440·C/s + F·s/2 + F·A, all in minutes.

    Args:
        restart_seconds: from a failure to the first step after it.
    """
    interval, cost, restart = (seconds / 60 for seconds in (interval_seconds, save_cost_seconds, restart_seconds))
    saving = MINUTES_PER_DAY * cost / interval
    return 60 * (saving + failures_per_day * interval / 2 + failures_per_day * restart)


class SaveClock:
    """Says when to save beside the plan, from what saves were measured to cost: the time for which training stood
    still, and that by which its steps were slower while the file was being written.

    Args:
        failures_per_day: None: never.
        clock: seconds.
    """

    def __init__(self, failures_per_day: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._failures_per_day, self._clock = failures_per_day, clock
        self._saved_at: float | None = None
        self._free: deque[float] = deque(maxlen=STEPS)  # seconds of steps beside which nothing was written
        self._beside: list[float] = []  # and of those beside the save that is being written
        self._last: tuple[float, float, list[float]] | None = None  # stall, writing and steps of the last save

    @property
    def cost(self) -> float | None:
        """Seconds that the last save took from training; None until they are known."""
        if self._last is None or len(self._free) < FEWEST_STEPS:
            return None
        stall_seconds, _, beside = self._last
        return stall_seconds + max(0.0, sum(beside) - len(beside) * statistics.median(self._free))

    @property
    def interval(self) -> float | None:
        """Seconds between two saves, never less than one takes to write; None until the cost is known."""
        cost = self.cost
        if cost is None or self._last is None or self._failures_per_day is None:
            return None
        return max(self._last[1], best_interval(cost, self._failures_per_day))

    def due(self) -> bool:
        """Whether to save now; before the first save, at once: its cost has to be known."""
        if self._failures_per_day is None:
            return False
        if self._saved_at is None:
            return True
        interval = self.interval
        return interval is not None and self._clock() - self._saved_at >= interval

    def stepped(self, seconds: float, writing: bool) -> None:
        """A step took so long; a checkpoint was being written beside it, or not."""
        (self._beside if writing else self._free).append(seconds)

    def saved(self) -> None:
        """A save, planned or not, has begun."""
        self._saved_at = self._clock()

    def measured(self, stall_seconds: float, seconds: float) -> None:
        """What a save cost: training stood still, and the file was being written, for so long."""
        self._last, self._beside = (stall_seconds, seconds, self._beside), []
