"""How often to save: the interval at which saving and what failures undo together cost least (Ling 2.0, appendix A)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

MINUTES_PER_DAY = 1440


def best_interval(save_cost_seconds: float, failures_per_day: float) -> float:
    """Seconds between two saves: s = √(2880·C/F), with s and C in minutes.

    Args:
        save_cost_seconds: for which one save holds training up.
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
    """Says when to save beside the plan, from what saves were measured to cost.

    Args:
        failures_per_day: None: never.
        clock: seconds.
    """

    def __init__(self, failures_per_day: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._failures_per_day, self._clock = failures_per_day, clock
        self._saved_at: float | None = None
        self.interval: float | None = None  # seconds; None until a save was measured

    def due(self) -> bool:
        """Whether to save now; before the first save, at once: its cost has to be known."""
        if self._failures_per_day is None:
            return False
        if self._saved_at is None:
            return True
        return self.interval is not None and self._clock() - self._saved_at >= self.interval

    def saved(self) -> None:
        """A save, planned or not, has begun."""
        self._saved_at = self._clock()

    def measured(self, stall_seconds: float, seconds: float) -> None:
        """What a save cost: training stood still, and the file was being written, for so long."""
        if self._failures_per_day is not None:  # never more often than can be written
            self.interval = max(seconds, best_interval(stall_seconds, self._failures_per_day))
