"""Being told to stop: SIGTERM, as from a scheduler that wants the machine back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_noticed() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM ends nothing: the function given says whether it came. Outside of the main thread,
    where Python handles no signals, it always says no."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
