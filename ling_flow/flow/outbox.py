"""A queue of calls to a service that may be away: one background thread makes them in order and repeats what failed."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

GATHER_SECONDS = 1.0  # points wait this long for company
BATCH_LIMIT = 1000  # points in one call
BUFFER_LIMIT = 100_000  # points kept while the service is away; then the oldest are dropped
RETRY_SECONDS = (0.5, 30.0)  # first and longest pause after a failure


@dataclass
class _Call:
    make: Callable[[], Any]
    answer: Future[Any] = field(default_factory=Future)


@dataclass
class _Batch:
    send: Callable[[list[Any]], None]
    points: list[Any]


class Outbox:
    """Calls for one service, made in order on a background thread.

    Args:
        what: the service's name in warnings.
        warn: receives one line for a person.
        passing: whether an exception may pass when the call is tried again; other calls are given up at once.
    """

    def __init__(self, what: str, warn: Callable[[str], None], passing: Callable[[Exception], bool]) -> None:
        self._what, self._warn, self._passing = what, warn, passing
        self._queue: deque[_Call | _Batch] = deque()
        self._points = 0
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    def put(self, make: Callable[[], Any]) -> Future[Any]:
        """Queue a call; the future holds what it returns, or why it was given up."""
        call = _Call(make)
        with self._changed:
            self._queue.append(call)
            self._changed.notify_all()
        return call.answer

    def put_points(self, send: Callable[[list[Any]], None], points: list[Any]) -> None:
        """Queue points for `send`, together with those that already wait for it."""
        with self._changed:
            last = self._queue[-1] if self._queue else None
            if isinstance(last, _Batch) and last.send == send and len(last.points) + len(points) <= BATCH_LIMIT:
                last.points += points
            else:
                self._queue.append(_Batch(send, list(points)))
            self._points += len(points)
            while self._points > BUFFER_LIMIT:
                oldest = next(item for item in self._queue if isinstance(item, _Batch))
                self._queue.remove(oldest)
                self._points -= len(oldest.points)
                self._say("full", f"{self._what} has been away for long: the oldest metrics are dropped")
            self._changed.notify_all()

    def close(self, within: float) -> None:
        """Send what is left, for at most `within` seconds; what cannot be sent then is dropped with a warning."""
        with self._changed:
            self._deadline = time.monotonic() + within
            self._changed.notify_all()
        self._thread.join(within + 1)
        with self._changed:
            unsent = len(self._queue)
            self._queue.clear()
        if unsent or self._thread.is_alive():
            self._say("unsent", f"{self._what} did not answer within {within:g} s: part of the record is lost")

    def _work(self) -> None:
        pause = RETRY_SECONDS[0]
        while (item := self._next()) is not None:
            try:
                if isinstance(item, _Batch):
                    item.send(item.points)
                else:
                    item.answer.set_result(item.make())
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                if self._passing(error):
                    self._say("away", f"{self._what} does not answer; its record is kept and sent later ({reason})")
                    with self._changed:
                        self._queue.appendleft(item)
                    if self._late():
                        return
                    pause = self._rest(pause)
                    continue
                self._say(type(error).__name__, f"{self._what} refused a record: {reason}")
                if isinstance(item, _Call):
                    item.answer.set_exception(error)
            pause = RETRY_SECONDS[0]
            if isinstance(item, _Batch):
                with self._changed:
                    self._points -= len(item.points)

    def _rest(self, pause: float) -> float:
        """Wait before the next try, less when closing; how long to wait the next time."""
        with self._changed:
            closing = self._changed.wait_for(lambda: self._deadline is not None, timeout=pause)
        if closing:
            time.sleep(RETRY_SECONDS[0])
            return RETRY_SECONDS[0]
        return min(pause * 2, RETRY_SECONDS[1])

    def _next(self) -> _Call | _Batch | None:
        """The next item, waiting for one; None when closing and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._queue) or self._deadline is not None)
            if self._queue and isinstance(self._queue[0], _Batch):
                # A batch at the tail may still grow; anything behind it means it is complete.
                self._changed.wait_for(lambda: len(self._queue) != 1 or self._deadline is not None, GATHER_SECONDS)
            return self._queue.popleft() if self._queue else None

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _say(self, about: str, text: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            self._warn(text)
