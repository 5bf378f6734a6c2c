"""Free TCP ports, for servers that are started here."""

from __future__ import annotations

import socket
import time

from ling_flow.errors import SystemFault


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server may listen there; one that ended a moment ago does not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_ports(count: int, first: int) -> list[int]:
    """The first ports from `first` on that nothing listens at."""
    found: list[int] = []
    for port in range(first, 65536):
        if port_is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise SystemFault(f"there are no {count} free ports from {first} on")


def soon_free(port: int) -> bool:
    """Whether a server may listen there within ten seconds: a process that was killed closes its sockets last."""
    until = time.monotonic() + 10
    while not port_is_free(port):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
