"""Servers that outlive who started them, with real processes."""

import fcntl
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from ling_flow.daemon import Daemon
from ling_flow.errors import SystemFault

PARENT = "import subprocess; child = subprocess.Popen(['sleep', '1000']); print(child.pid, flush=True); child.wait()"


def test_a_daemon_that_was_killed_leaves_no_children(tmp_path: Path) -> None:
    daemon = Daemon("sleeper", tmp_path)
    pid = daemon.start([sys.executable, "-c", PARENT], {})
    assert daemon.running() and daemon.pid == pid
    daemon.wait_until(lambda: daemon.log.read_text().split()[-1].isdigit(), 20)
    child = int(daemon.log.read_text().split()[-1])
    os.kill(pid, signal.SIGKILL)
    daemon.stop()
    assert not daemon.running() and daemon.pid is None
    until = time.monotonic() + 20
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_two_who_look_do_not_see_each_other(tmp_path: Path) -> None:
    daemon = Daemon("absent", tmp_path)
    with (tmp_path / "absent.lock").open("ab") as another:
        fcntl.flock(another, fcntl.LOCK_SH)  # as `running` holds it
        assert not daemon.running()


def test_the_record_of_a_predecessor_is_gone_before_the_next_one_starts(tmp_path: Path) -> None:
    daemon = Daemon("sleeper", tmp_path)
    (tmp_path / "sleeper.pid").write_text(f"{os.getpid()}\n")
    with pytest.raises(FileNotFoundError):
        daemon.start(["/nowhere/at/all"], {})
    assert daemon.pid is None and daemon.stop() is False


def test_what_it_said_as_it_ended_is_told_and_nothing_older(tmp_path: Path) -> None:
    daemon = Daemon("short", tmp_path / "new")
    for words in ("first", "second"):
        daemon.start(["/bin/sh", "-c", f"echo {words} words"], {})
        with pytest.raises(SystemFault, match=rf"short ended as it started; log .*/new/short\.log: {words} words$"):
            daemon.wait_until(lambda: False, 20)
    assert "first words" in daemon.log.read_text()
    assert daemon.stop() is False


def test_one_that_does_not_answer_is_told(tmp_path: Path) -> None:
    daemon = Daemon("silent", tmp_path)
    daemon.start(["sleep", "1000"], os.environ)
    try:
        with pytest.raises(SystemFault, match=r"silent did not answer within 0 s; log .*: empty"):
            daemon.wait_until(lambda: False, 0)
    finally:
        assert daemon.stop() is True
    assert not daemon.running()
