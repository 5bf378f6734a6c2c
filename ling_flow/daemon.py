"""A server of this machine that outlives the command that started it: start, look at, stop.

`<directory>/<name>.lock` is held by the process while it runs (the kernel frees it, however the process ends; a process
id proves nothing, the kernel uses it again), `<name>.pid` holds its id, which is also that of its session, `<name>.log`
its output. Its starter may exit: the server inherits no pipe.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ling_flow.errors import SystemFault

_MARK = "LING_FLOW_DAEMON"  # in the environment of a server and its children: whose they are
_BEGIN = "--- started"  # a line of the log
_STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Daemon:
    """A server named `name`, its record and log in `directory`; `stop_signal` asks it to end in good order."""

    name: str
    directory: Path
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def log(self) -> Path:
        """File with all its output."""
        return self.directory / f"{self.name}.log"

    def running(self) -> bool:
        """Whether its process is there."""
        if not self.directory.is_dir():
            return False
        with self._file("lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: others may be looking at this moment
            except BlockingIOError:
                return True
        return False

    @property
    def pid(self) -> int | None:
        """Id of its process while it runs."""
        with contextlib.suppress(FileNotFoundError, ValueError):  # not written yet, or not to its end
            return int(self._file("pid").read_text()) if self.running() else None
        return None

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        account: pwd.struct_passwd | None = None,
        cwd: Path | None = None,
    ) -> int:
        """Start it in a session of its own, and return the id of its process.

        Args:
            account: whom it runs as, None for ourselves.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self.kill_stragglers()
        with self.log.open("ab") as output, self._file("lock").open("ab") as lock:
            output.write(f"{_BEGIN} {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            output.flush()
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._file("pid").unlink(missing_ok=True)  # a predecessor's: by now it may be that of a stranger
            process = subprocess.Popen(
                command,
                env={**environment, _MARK: self._mark},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                start_new_session=True,
                **as_account(account),
            )
        self._file("pid").write_text(f"{process.pid}\n")
        return process.pid

    def wait_until(self, healthy: Callable[[], bool], seconds: float) -> None:
        """
        Raises:
            SystemFault: it ended or did not answer in time; the message holds the end of its log.
        """
        until = time.monotonic() + seconds
        while not healthy():
            if not self.running():
                raise SystemFault(f"{self.name} ended as it started; {self._tail()}")
            if time.monotonic() > until:
                raise SystemFault(f"{self.name} did not answer within {seconds:.0f} s; {self._tail()}")
            time.sleep(0.1)

    def stop(self) -> bool:
        """End it, by force after half a minute; whether it was running."""
        pid, was_running = self.pid, self.running()
        if pid is not None:  # else we were killed as we started it, and it is ended as a straggler
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, self.stop_signal)
                until = time.monotonic() + _STOP_SECONDS
                while self.running() and time.monotonic() < until:
                    time.sleep(0.05)
                os.killpg(pid, signal.SIGKILL)  # what is left of its session
        self.kill_stragglers()
        self._file("pid").unlink(missing_ok=True)
        return was_running

    def kill_stragglers(self) -> None:
        """End children that outlived a server that was killed, and wait until they are gone: they keep its port."""
        until = time.monotonic() + _STOP_SECONDS
        while (pids := self._marked()) and time.monotonic() < until:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def _marked(self) -> list[int]:
        """Processes that have this server's mark in their environment; of one that has ended it cannot be read."""
        mark = f"{_MARK}={self._mark}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in entry.read_bytes().split(b"\0"):
                    found.append(int(entry.parent.name))
        return found

    @property
    def _mark(self) -> str:
        return f"{self.directory}/{self.name}"

    def _file(self, suffix: str) -> Path:
        return self.directory / f"{self.name}.{suffix}"

    def _tail(self) -> str:
        said = self.log.read_text(errors="replace").rpartition(_BEGIN)[2] if self.log.exists() else ""
        lines = [line.strip() for line in said.splitlines()[1:] if line.strip()]
        return f"log {self.log}: {' | '.join(lines[-8:]) or 'empty'}"


def as_account(account: pwd.struct_passwd | None) -> dict[str, Any]:
    """Arguments for `subprocess` to run a program as another user; None changes nothing."""
    return {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
