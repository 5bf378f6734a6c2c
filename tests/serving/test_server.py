"""Background endpoints with a real Ray Serve."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ling_flow.errors import SystemFault, UserError
from ling_flow.serving import server
from ling_flow.serving.chat import ChatModel
from ling_flow.serving.server import (
    Endpoint,
    EndpointStatus,
    endpoint_status,
    list_endpoints,
    start_detached,
    stop_all,
    stop_endpoint,
)
from tests.ports import free_port
from tests.serving.client import serving
from tests.serving.conftest import ANSWER, QUESTION


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    stop_all(tmp_path)


def ask(url: str) -> str:
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def test_nothing_there(home: Path) -> None:
    assert endpoint_status("micro", home) is None
    assert stop_endpoint("micro", home) is False
    assert stop_all(home) == []


def test_a_directory_without_a_model_is_the_users_error(home: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json there"):
        start_detached(home, "micro", "f1", home)
    assert list_endpoints(home) == []


def test_a_taken_port_is_the_users_error(home: Path, checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"port: \d+ is taken"):
            start_detached(checkpoint, "micro", "f1", home, port=taken.getsockname()[1])


def test_an_address_of_no_machine_is_the_users_error(home: Path, checkpoint: Path) -> None:
    for host in ("::1", "no.such.host.invalid", "192.0.2.1"):
        for port in (None, free_port()):
            with pytest.raises(UserError, match=f"host: '{host}' is no IPv4 address or name of this machine"):
                start_detached(checkpoint, "micro", "f1", home, port=port, host=host)
    assert list_endpoints(home) == []


def test_a_local_endpoint_is_asked_past_any_proxy(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(ChatModel.load(checkpoint)) as url:
        assert server.served_fingerprint(url) == "f00d"


def test_the_first_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(server, "FIRST_PORT", taken.getsockname()[1])
        # The second stands for another process: what the first has chosen is not bound yet.
        with server._chosen_port(None, "127.0.0.1") as first, server._chosen_port(None, "127.0.0.1") as second:
            assert taken.getsockname()[1] < first < second


def test_a_record_of_a_process_that_is_gone(home: Path) -> None:
    """Its id may belong to another process by now, which must not be touched."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    endpoint = server.Endpoint(
        name="micro", url="http://127.0.0.1:9", pid=other.pid, fingerprint="f", model_dir="/m", version=None, log="/l"
    )
    (home / "endpoints").mkdir()
    (home / "endpoints" / "micro.json").write_text(endpoint.model_dump_json())
    status = endpoint_status("micro", home)
    assert status is not None and not status.running and not status.healthy
    assert stop_endpoint("micro", home)
    assert other.poll() is None
    other.kill()
    other.wait()
    assert endpoint_status("micro", home) is None


@pytest.mark.slow
def test_life_of_an_endpoint(home: Path, checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    first = start_detached(checkpoint, "micro", "f1", home, port=port, version=1).endpoint
    assert first.url == f"http://127.0.0.1:{port}"
    assert ask(first.url) == ANSWER
    status = endpoint_status("micro", home)
    assert status is not None and status.healthy and status.endpoint == first
    assert os.getsid(first.pid) == first.pid  # a session of its own: it outlives its starter

    assert start_detached(checkpoint, "micro", "f1", home, version=1) == (first, first)  # the same: nothing to do
    with socket.socket() as taken, pytest.raises(UserError, match=r"port: \d+ is taken"):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        start_detached(checkpoint, "micro", "f2", home, port=taken.getsockname()[1])
    assert endpoint_status("micro", home) == status  # it was not touched

    replaced = start_detached(checkpoint, "micro", "f2", home, version=2)  # another one: replaced at the same place
    second = replaced.endpoint
    assert replaced.before == first
    assert (second.url, second.fingerprint) == (first.url, "f2")
    assert second.pid != first.pid
    assert ask(second.url) == ANSWER

    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{}")
    with pytest.raises(SystemFault, match=rf"ended as it started.*; {second.url} serves what it did before"):
        start_detached(damaged, "micro", "f3", home)
    assert (ask(second.url), server.served_fingerprint(second.url)) == (ANSWER, "f2")

    code = (
        "from pathlib import Path; from ling_flow.serving.server import start_detached\n"
        "from ling_flow.flow.step import exit_on_sigterm; exit_on_sigterm()\n"
        f"start_detached(Path({str(checkpoint)!r}), 'micro', 'f4', Path({str(home)!r}))"
    )
    replacing = subprocess.Popen([sys.executable, "-c", code])
    while (status := endpoint_status("micro", home)) is None or status.endpoint.fingerprint != "f4":
        assert replacing.poll() is None
        time.sleep(0.02)
    replacing.terminate()
    assert replacing.wait(60) == 128 + signal.SIGTERM
    until = time.monotonic() + server.START_SECONDS
    while server.served_fingerprint(second.url) != "f2":
        assert time.monotonic() < until
        time.sleep(0.1)
    status = endpoint_status("micro", home)
    assert status is not None and status.healthy and status.endpoint.version == 2
    third = status.endpoint

    assert stop_all(home) == ["micro"]
    assert endpoint_status("micro", home) is None
    with pytest.raises(OSError):
        ask(second.url)
    states = subprocess.run(["ps", "-o", "stat=", "-s", str(third.pid)], capture_output=True, text=True).stdout
    assert [state for state in states.split() if "Z" not in state] == []  # nothing of its session is left


def test_where_neither_comes_up_both_reasons_are_told(
    home: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Endpoint(name="micro", url="http://127.0.0.1:9", pid=1, fingerprint="f1", model_dir="", version=1, log="")
    monkeypatch.setattr(server, "endpoint_status", lambda *_: EndpointStatus(endpoint=old, running=True, healthy=True))

    def fails(endpoint: Endpoint, home: Path) -> Endpoint:
        raise SystemFault(f"{endpoint.fingerprint} ended as it started")

    monkeypatch.setattr(server, "_start", fails)
    with pytest.raises(
        SystemFault, match=rf"^f2 ended .*; what {old.url} served .* either \(f1 ended as it started\)$"
    ):
        start_detached(checkpoint, "micro", "f2", home)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_loaded(home: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    with pytest.raises(SystemFault, match=r"micro ended as it started; .*config\.json"):
        start_detached(broken, "micro", "f1", home, port=free_port())
    assert list_endpoints(home) == []


@pytest.mark.slow
def test_the_starters_pipes_are_closed_when_it_exits(home: Path, checkpoint: Path) -> None:
    """Whoever reads a step's output until its end must not wait for the endpoint."""
    code = (
        "import sys; from pathlib import Path; from ling_flow.serving.server import start_detached\n"
        f"start_detached(Path({str(checkpoint)!r}), 'micro', 'f1', Path({str(home)!r}), port={free_port()})\n"
        "print('started')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == "started\n", done.stderr
    status = endpoint_status("micro", home)
    assert status is not None and status.healthy


@pytest.mark.slow
def test_in_the_foreground_until_a_signal(checkpoint: Path) -> None:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "ling_flow.serving", str(checkpoint), "micro", "f1", "127.0.0.1", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    said = process.stdout.readline()
    assert said == f"serving micro (f1) at http://127.0.0.1:{port}/v1\n", process.stderr.read()
    assert ask(f"http://127.0.0.1:{port}") == ANSWER
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0
