"""TCP ports for servers that are started here."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import IO

from ling_flow.errors import SystemFault, UserError

direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs of servers of ours, which no proxy of the environment could reach."""


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server may listen there; one that ended a moment ago does not count.

    Raises:
        UserError: nothing can listen at `host`, whatever the port.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise UserError(
                f"host: {host!r} is no IPv4 address or name of this machine to listen on ({error.strerror or error})"
            ) from None
    return True


def claim_port(port: int, host: str = "127.0.0.1", patience: float = 0.0) -> IO[bytes] | None:
    """Take a port for a server that is about to start; None where one listens, or another process has taken it.

    Between choosing a port and listening at it a server may need half a minute, in which nothing else tells that the
    port is not free.

    Args:
        patience: seconds to wait for it: a process that was killed closes its sockets last.

    Returns:
        An open file: close it when the server listens.

    Raises:
        UserError: nothing can listen at `host`.
        SystemFault: there is no place to note it.
    """
    claims = Path(tempfile.gettempdir(), f"ling_flow-ports-{os.getuid()}")
    try:
        claims.mkdir(exist_ok=True)
        claim = (claims / str(port)).open("ab")
    except OSError as error:
        raise SystemFault(
            f"{claims}: cannot be written to ({error.strerror}); set TMPDIR to a directory of yours"
        ) from None
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if port_is_free(port, host):
                return claim
            fcntl.flock(claim, fcntl.LOCK_UN)
        except BlockingIOError:
            pass
        if time.monotonic() >= until:
            claim.close()
            return None
        time.sleep(0.05)
