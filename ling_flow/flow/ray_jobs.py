"""Jobs on a Ray cluster that runs already, through the Jobs API of its head.

A submission id can be used once, which makes it the lock: of two launchers of one step, the second attaches to the
first one's job. An id whose job failed or was stopped is followed by the next attempt's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ling_flow.errors import SystemFault, UserError
from ling_flow.flow import events
from ling_flow.flow.context import Context
from ling_flow.flow.job_settings import JobSettings
from ling_flow.flow.jobs import STOP_SECONDS, Ended, Job, JobOutput

POLL_SECONDS = 1.0
REQUEST_SECONDS = (10.0, 60.0)  # to connect, and between two pieces of an answer
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")


def run(job: Job, settings: JobSettings, output: JobOutput) -> Ended:
    """Submit the job at RAY_ADDRESS or attach to it, and wait for its end.

    Raises:
        UserError: RAY_ADDRESS is missing or not a job server's.
        SystemFault: the server is away for too long, has forgotten the job, or the job stands still.
    """
    address = job_server()
    client = connect(address)
    name = None
    try:
        name = submit(client, job, settings)
        return follow(client, name, f"job {name} at {address}", settings, output)
    except BaseException as error:
        if not isinstance(error, Exception):  # told to end
            name = name or _under_way(client, job)  # its submission may have reached the server
            if name is not None:
                events.emit("log", step=job.label, text=f"stopping job {name} at {address}")
                stop(client, name)
        raise


def job_server(environment: Any = os.environ) -> str:
    """
    Raises:
        UserError: RAY_ADDRESS is missing or not the address of a job server.
    """
    address = environment.get("RAY_ADDRESS") or ""
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and parts.hostname
    except ValueError:  # brackets that are no IPv6 address
        good = False
    if not good:
        found = f"got '{address}'" if address else "it is not set"
        raise UserError(f"RAY_ADDRESS: must be the URL of a Ray job server, like http://HOST:8265; {found}")
    return address.rstrip("/")


def connect(address: str) -> Any:
    """A client of the job server at `address`, an http:// URL; no call of it waits for long.

    Raises:
        UserError: the server asks for a token that is not given.
        SystemFault: no job server answers there.
    """
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **arguments: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=REQUEST_SECONDS, **arguments)

    with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # they would win over the argument
        try:
            return Client(address)
        except Exception as error:
            raise _named(error, address) from None


def submit(client: Any, job: Job, settings: JobSettings) -> str:
    """Submit the job, or find an attempt of it that is under way.

    Returns:
        The submission id.

    Raises:
        UserError: the server refuses the job.
        SystemFault: the server does not answer.
    """
    attempt, until = 1, time.monotonic() + settings.patience_s
    while True:
        name = job.name(attempt)
        try:
            state = _state(client, name)
            if state is None:
                _send(client, name, job, settings)
                return name
        except (RuntimeError, ValueError, OSError) as error:  # the client's own, and those of the connection
            if _refuses(client, name, error):
                raise UserError(f"RAY_ADDRESS: {client.get_address()} refuses the job ({_reason(error)})") from None
            # Another launcher was faster and has the id; or the head has just started.
            if time.monotonic() > until:
                raise _named(error, client.get_address()) from None
            time.sleep(POLL_SECONDS)
            continue
        if state not in TERMINAL:
            events.emit("log", step=job.label, text=f"attaching to job {name}")
            return name
        attempt += 1


def _refuses(client: Any, name: str, error: Exception) -> bool:
    """Whether the server wants no such job (an invalid one, too large an upload), and always will."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not re.search("status code 4[0-9][0-9]|exceeds the maximum size", text):
        return False
    with contextlib.suppress(Exception):
        return _state(client, name) is None  # else another launcher was faster
    return False


def _send(client: Any, name: str, job: Job, settings: JobSettings) -> None:
    environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
    if settings.working_dir is not None:
        if not settings.working_dir.is_dir():
            raise UserError(f"LING_FLOW_JOB: working_dir: {settings.working_dir} is no directory")
        environment |= {"working_dir": str(settings.working_dir), "excludes": excluded(settings.working_dir, job.root)}
    # A head on this machine may have been started from the environment that runs us. What answers at the loopback may
    # as well be a forwarded port of a cluster, whose image has `python`.
    here = urlsplit(client.get_address()).hostname in ("127.0.0.1", "localhost", "::1")
    ours = f'"$(command -v {shlex.quote(sys.executable)} || echo python)"'
    reserved = job.reserved
    client.submit_job(
        entrypoint=job.entrypoint(name, ours if here else "python"),
        submission_id=name,
        runtime_env=environment,
        metadata=job.notes,
        entrypoint_num_cpus=reserved.cpus if reserved else None,
        entrypoint_num_gpus=reserved.gpus if reserved and reserved.gpus else None,
        entrypoint_memory=int(reserved.memory_gib * 2**30) if reserved else None,
    )


def excluded(directory: Path, root: str) -> list[str]:
    """What an upload of `directory` leaves out beside what .gitignore names: history, packages, and where we write.

    Args:
        root: the artifact root.
    """
    ours = [Context.from_environment().home]
    if "://" not in root:
        ours.append(Path(root).absolute())
    directory = directory.absolute()
    inside = [path.relative_to(directory) for path in ours if directory in path.parents]
    return [".git", ".venv", ".lingflow", *(f"/{path}" for path in inside)]


def follow(client: Any, name: str, where: str, settings: JobSettings, output: JobOutput) -> Ended:
    """Wait for the end of a job, passing on what it says.

    Raises:
        SystemFault: the server is away for longer than `patience_s` or has forgotten the job; or the job is running and
            neither said anything nor changed its state for `heartbeat_s`, and was stopped.
    """
    answered, before = time.monotonic(), ""
    with Tail(client, name, output) as tail:
        while True:
            now = time.monotonic()
            try:
                info = client.get_job_info(name)
            except Exception as error:
                if _is_missing(error):
                    raise SystemFault(f"{where}: is not known there any more (head restarted?); run again") from None
                if now - answered > settings.patience_s:
                    reason = _reason(error)
                    raise SystemFault(
                        f"{where}: no answer for {now - answered:.0f} s ({reason}); run again to go on"
                    ) from None
            else:
                answered = now
                if info.status.value != before:
                    before, output.last_news = info.status.value, now
                    if before not in TERMINAL:
                        events.emit("log", step=output.label, text=f"{where} is {before.lower()}")
                if before in TERMINAL:
                    tail.finish()
                    return Ended(name, before, info.message or "", info.driver_exit_code)
                silent = now - output.last_news
                if before == "RUNNING" and settings.heartbeat_s is not None and silent > settings.heartbeat_s:
                    stop(client, name)
                    raise SystemFault(f"{where}: said nothing for {silent:.0f} s and was stopped; run again to go on")
            time.sleep(POLL_SECONDS)


def stop(client: Any, name: str) -> None:
    """Tell a job to stop and wait until it has, as long as it may take to save; never fails."""
    until = time.monotonic() + STOP_SECONDS + 5
    with contextlib.suppress(Exception):
        client.stop_job(name)
        while _state(client, name) not in (*TERMINAL, None) and time.monotonic() < until:
            time.sleep(0.5)


class Tail:
    """Passes a job's output on from a thread; a broken connection is made again, and nothing is said twice."""

    def __init__(self, client: Any, name: str, output: JobOutput) -> None:
        self._client = client
        self._name = name
        self._output = output
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"tail-{name}", daemon=True)

    def __enter__(self) -> Tail:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def finish(self) -> None:
        """The job has ended: what the thread has not got by now is asked for at once."""
        with self._lock:
            self._done.set()
            with contextlib.suppress(Exception):
                self._output.feed(self._client.get_job_logs(self._name)[self._output.characters :])

    def _run(self) -> None:
        while not self._done.is_set():
            try:
                asyncio.run(self._listen())
                return  # the server closes when the job has ended
            except Exception:
                self._done.wait(POLL_SECONDS)

    async def _listen(self) -> None:
        skip = self._output.characters
        async for text in self._client.tail_job_logs(self._name):
            with self._lock:
                if self._done.is_set():
                    return
                self._output.feed(text[skip:])
            skip = max(0, skip - len(text))


def _under_way(client: Any, job: Job) -> str | None:
    """The attempt that has not ended."""
    attempt = 1
    with contextlib.suppress(Exception):
        while (state := _state(client, job.name(attempt))) is not None:
            if state not in TERMINAL:
                return job.name(attempt)
            attempt += 1
    return None


def _state(client: Any, name: str) -> str | None:
    """None: there is no such job."""
    try:
        return str(client.get_job_info(name).status.value)
    except RuntimeError as error:
        if _is_missing(error):
            return None
        raise


def _is_missing(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "status code 404" in str(error)


def _named(error: Exception, address: str) -> SystemFault | UserError:
    if type(error).__name__ == "AuthenticationError":
        return UserError(f"RAY_ADDRESS: {address} asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN")
    if isinstance(error, UserError):
        return error
    return SystemFault(f"RAY_ADDRESS: no Ray job server answers as it should at {address} ({_reason(error)})")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """These variables are not there for the time being."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
