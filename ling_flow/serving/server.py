"""Endpoints of this machine: serve in the foreground, or start, look at and stop background ones. No torch, no Ray.

A background endpoint is a `Daemon` in `<home>/endpoints`, with `<name>.json` beside it: what it serves, and where.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from ling_flow.config import StrictModel, parse
from ling_flow.daemon import Daemon
from ling_flow.errors import LingFlowError, SystemFault, UserError
from ling_flow.ports import claim_port, direct, port_is_free

FIRST_PORT = 8000
START_SECONDS = 300.0  # a large checkpoint, or a busy machine, takes its time
LOCALHOST = "127.0.0.1"


class Endpoint(StrictModel):
    """A background endpoint, as its record file holds it."""

    name: str = Field(description="name of the served model")
    url: str = Field(description="base URL, without /v1")
    pid: int = Field(description="process id of the server, also the id of its session")
    fingerprint: str = Field(description="fingerprint of the artifact it serves")
    model_dir: str = Field(description="checkpoint directory it serves")
    version: int | None = Field(description="registered model version, null where it did not come from the registry")
    log: str = Field(description="file with its output")


class Started(NamedTuple):
    """An endpoint that answers.

    Attributes:
        before: the one that answered before under its name; the same where there was nothing to start.
    """

    endpoint: Endpoint
    before: Endpoint | None


class EndpointStatus(StrictModel):
    """What an endpoint says of itself now."""

    endpoint: Endpoint = Field(description="its record")
    running: bool = Field(description="whether its process is there")
    healthy: bool = Field(description="whether it answers and serves what its record says")


def serve_foreground(
    model_dir: Path, model_name: str, port: int | None, fingerprint: str, host: str = LOCALHOST
) -> None:
    """Serve a checkpoint directory until SIGINT or SIGTERM; prints one line when it answers.

    Args:
        port: TCP port; None takes the first free one from 8000.
        host: address to listen on; anything but 127.0.0.1 lets other machines in, without a password.

    Raises:
        UserError: no checkpoint there, or the port is taken.
        SystemFault: Ray or the application did not come up.
    """
    from ling_flow.serving.ray_app import run_until_signal

    _check_model_dir(model_dir)
    with _chosen_port(port, host) as chosen:

        def ready() -> None:
            print(f"serving {model_name} ({fingerprint}) at http://{host}:{chosen}/v1", flush=True)

        try:
            run_until_signal(model_dir.absolute(), model_name, fingerprint, host, chosen, ready)
        except (RuntimeError, ConnectionError, TimeoutError) as error:
            raise SystemFault(f"serving {model_dir} failed: {error}") from error


def start_detached(
    model_dir: Path,
    model_name: str,
    fingerprint: str,
    home: Path,
    port: int | None = None,
    host: str = LOCALHOST,
    version: int | None = None,
) -> Started:
    """Start a background endpoint called `model_name` and wait until it answers.

    An endpoint of that name that serves something else, or does not answer, is stopped first and its port used again;
    one that serves the same artifact there stays as it is. Where the new one does not come up, the old one is started
    again; also where a signal ends this process, which then does not wait for it to answer.

    Raises:
        UserError: no checkpoint there, or the port is taken.
        SystemFault: it did not come up; the message holds the end of its log.
    """
    _check_model_dir(model_dir)
    old = endpoint_status(model_name, home)
    old_host, old_port = _address(old.endpoint) if old else (host, None)
    same_place = old_host == host and port in (None, old_port)
    if old is not None and old.healthy and old.endpoint.fingerprint == fingerprint and same_place:
        return Started(old.endpoint, old.endpoint)
    if port not in (None, old_port):
        _require_free(port, host)  # before anything is stopped
    replaced = old.endpoint if old is not None and old.healthy else None
    try:
        if old is not None:
            stop_endpoint(model_name, home)
            if port is None and old_port is not None and port_is_free(old_port, host):
                port = old_port
        with _chosen_port(port, host) as chosen:
            asked = Endpoint(
                name=model_name,
                url=f"http://{host}:{chosen}",
                pid=0,
                fingerprint=fingerprint,
                model_dir=str(model_dir.absolute()),
                version=version,
                log="",
            )
            return Started(_start(asked, home), replaced)
    except LingFlowError as error:
        if replaced is None:
            raise
        try:
            _start(replaced, home)
        except LingFlowError as second:
            raise type(error)(
                f"{error}; what {replaced.url} served before did not come up either ({second})"
            ) from error
        raise type(error)(f"{error}; {replaced.url} serves what it did before") from error
    except BaseException:
        if replaced is not None:
            _launch(replaced, home)
        raise


def take_back(started: Started, home: Path) -> None:
    """Undo a start: what was served before is served again, if there was something.

    Raises:
        SystemFault: it did not come up again.
    """
    if started.endpoint == started.before:
        return
    stop_endpoint(started.endpoint.name, home)
    if started.before is not None:
        _start(started.before, home)


def _address(endpoint: Endpoint) -> tuple[str, int]:
    host, _, port = endpoint.url.removeprefix("http://").rpartition(":")
    return host, int(port)


def _start(endpoint: Endpoint, home: Path) -> Endpoint:
    """Start what a record says, wait until it answers, and return its new record; nothing is left of one that fails."""
    started = _launch(endpoint, home)
    try:
        _daemon(endpoint.name, home).wait_until(lambda: _serves(started), START_SECONDS)
    except BaseException:
        stop_endpoint(endpoint.name, home)
        raise
    return started


def _launch(endpoint: Endpoint, home: Path) -> Endpoint:
    """The same without the wait."""
    daemon = _daemon(endpoint.name, home)
    host, port = _address(endpoint)
    arguments = [endpoint.model_dir, endpoint.name, endpoint.fingerprint, host, str(port)]
    pid = daemon.start([sys.executable, "-m", "ling_flow.serving", *arguments], os.environ)
    started = endpoint.model_copy(update={"pid": pid, "log": str(daemon.log)})
    _write(_record(endpoint.name, home), started)
    return started


def endpoint_status(name: str, home: Path) -> EndpointStatus | None:
    """The state of the endpoint `name`, None where there is none."""
    path = _record(name, home)
    try:
        endpoint = parse(Endpoint, path.read_text(), str(path))
    except FileNotFoundError:
        return None
    running = _daemon(name, home).running()
    return EndpointStatus(endpoint=endpoint, running=running, healthy=running and _serves(endpoint))


def list_endpoints(home: Path) -> list[EndpointStatus]:
    """All background endpoints that have a record, by name."""
    found = [endpoint_status(path.stem, home) for path in sorted((home / "endpoints").glob("*.json"))]
    return [status for status in found if status is not None]


def stop_endpoint(name: str, home: Path) -> bool:
    """Stop the endpoint `name` and remove its record (its log stays); whether there was one."""
    record = _record(name, home)
    if not record.exists():
        return False
    _daemon(name, home).stop()
    record.unlink(missing_ok=True)
    return True


def stop_all(home: Path) -> list[str]:
    """Stop every background endpoint; their names."""
    names = [status.endpoint.name for status in list_endpoints(home)]
    return [name for name in names if stop_endpoint(name, home)]


def _daemon(name: str, home: Path) -> Daemon:
    return Daemon(name, home.absolute() / "endpoints")


def _record(name: str, home: Path) -> Path:
    return home.absolute() / "endpoints" / f"{name}.json"


def _write(path: Path, endpoint: Endpoint) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(endpoint.model_dump_json(indent=1) + "\n")
    temporary.replace(path)


def _check_model_dir(model_dir: Path) -> None:
    if not (model_dir / "config.json").is_file():
        raise UserError(f"{model_dir}: no config.json there; give a Hugging Face checkpoint directory")


@contextmanager
def _chosen_port(port: int | None, host: str) -> Iterator[int]:
    """The port to listen on; while the block lasts, no other process that looks for a free one takes it."""
    if port is not None:
        _require_free(port, host)
        yield port
        return
    for candidate in range(FIRST_PORT, 65536):
        claim = claim_port(candidate, host)
        if claim is not None:
            with claim:
                yield candidate
            return
    raise SystemFault(f"no port from {FIRST_PORT} on is free on {host}")


def _require_free(port: int, host: str) -> None:
    if not port_is_free(port, host):
        raise UserError(f"port: {port} is taken on {host}; choose another, or none to get the first free one")


def served_fingerprint(url: str) -> str | None:
    """Of the artifact that an endpoint says it serves; None where nothing of ours answers. `url` is without /v1."""
    try:
        return _get_json(f"{url}/health").get("fingerprint")
    except (OSError, ValueError):
        return None


def _serves(endpoint: Endpoint) -> bool:
    """Whether the endpoint answers and says that it serves what its record says."""
    return served_fingerprint(endpoint.url) == endpoint.fingerprint


def _get_json(url: str) -> dict[str, Any]:
    with direct.open(url, timeout=5) as response:
        answer = json.load(response)
    return answer if isinstance(answer, dict) else {}
