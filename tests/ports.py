"""Free TCP ports for servers that tests start."""

from __future__ import annotations

import random
import socket

_random = random.Random()  # unseeded: processes that test side by side must not meet
_given: set[int] = set()


def free_port(*offsets: int) -> int:
    """A port of the loopback that is free, as are those `offsets` above it, and was not given before.

    It lies below those that the kernel gives to whoever asks for any (32768 and up by default), one of which may be
    another's by the time a server that takes half a minute to start listens on it, or comes back to it; and above those
    that Ray gives its workers (10002 to 19999).
    """
    while True:
        port = _random.randrange(20000, 22768)
        if port in _given:
            continue
        try:
            for number in (port, *(port + offset for offset in offsets)):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        _given.add(port)
        return port
