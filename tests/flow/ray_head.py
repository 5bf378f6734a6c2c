"""A Ray head of our own with its job server, in the foreground of a process group: started, killed, started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.ports import free_port

RAY = str(Path(sys.executable).with_name("ray"))


class RayHead:
    """`address` is that of the job server, and stays the same when the head is started again."""

    def __init__(self, directory: Path, **environment: str) -> None:
        self.log = directory / "head.log"
        self._port, self._dashboard = free_port(), free_port()
        self._environment = {**ray_environment(), **environment}
        self._process: subprocess.Popen[bytes] | None = None
        self._sessions = tempfile.mkdtemp(prefix="ray-")  # short: it becomes part of a socket's path
        self.address = f"http://127.0.0.1:{self._dashboard}"

    def start(self) -> None:
        """Returns when the job server takes jobs, which is some time after it answers."""
        command = [RAY, "start", "--head", "--block", f"--port={self._port}", "--num-cpus=2", "--disable-usage-stats"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self._dashboard}", "--include-dashboard=true"]
        # Fixed by default, and an agent whose port is taken stays without a word, so that no job ever runs.
        command += ["--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_port()}"]
        command += [f"--temp-dir={self._sessions}"]
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                command, env=self._environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 240
        while refusal := _refusal(self.address):
            assert self._process.poll() is None and time.monotonic() < deadline, f"{refusal}\n{self._logs()}"
            time.sleep(0.2)

    def _logs(self) -> str:
        """What Ray says, and the ends of the logs of its parts that serve jobs."""
        session = Path(self._sessions, "session_latest", "logs")
        ends = [f"{path.name}: {path.read_text()[-3000:]}" for path in sorted(session.glob("dashboard*.log"))]
        return "\n".join([self.log.read_text()[-3000:], *ends])

    def add_node(self, cpus: int) -> subprocess.Popen[bytes]:
        """Another node of the cluster on this machine; the leader of its process group. It joins when it can."""
        command = [RAY, "start", "--block", f"--address=127.0.0.1:{self._port}", f"--num-cpus={cpus}"]
        command += ["--dashboard-agent-listen-port=0", "--disable-usage-stats"]
        with self.log.open("ab") as output:
            return subprocess.Popen(
                command, env=self._environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(60)
        shutil.rmtree(self._sessions, ignore_errors=True)

    def kill(self) -> None:
        """All its processes at once, as when the machine dies."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(60)


def ray_environment() -> dict[str, str]:
    """No token: this head listens on the loopback only, and a token of the user's would be asked for but not sent."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as in an image, `python` has our packages
    return {**kept, "RAY_AUTH_MODE": "disabled", "PATH": path}


def _refusal(address: str) -> str:
    """Why the job server takes no job; empty where it does."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/api/jobs/", b'{"entrypoint": "true"}', headers)
    try:
        with urllib.request.urlopen(request, timeout=60):
            return ""
    except urllib.error.HTTPError as error:  # "no available agent"
        return error.read().decode(errors="replace") or str(error)
    except OSError as error:
        return str(error)
