"""Run the trials of a sweep as Ray tasks, on the cluster at RAY_ADDRESS or on a Ray of our own while it lasts."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ling_flow.errors import LingFlowError, SystemFault, UserError
from ling_flow.private_ray import prepare_private_ray
from ling_flow.scaling.design import TrialResult, TrialSpec

ATTEMPTS = 2


@dataclass(frozen=True)
class Task:
    """A trial to run. Its corpus travels by path, not through the object store."""

    spec: TrialSpec
    fingerprint: str
    corpus_path: Path


@contextmanager
def ray_running(workers: int | None) -> Iterator[None]:
    """A connected Ray; only what is started here is shut down.

    Args:
        workers: CPUs of a Ray started here; None: one per core. A cluster that runs already brings its own.

    Raises:
        SystemFault: RAY_ADDRESS is set, but no cluster answers there.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        prepare_private_ray()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning for each task without GPU
    import ray

    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    if address:
        _check_answers(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _no_cluster(address, error) from None
    else:
        cores = workers or len(os.sched_getaffinity(0))
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes where nobody listens.

    Raises:
        SystemFault: nobody listens at `address`, a `host:port` with or without `ray://`.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: Exception) -> SystemFault:
    return SystemFault(f"RAY_ADDRESS: no Ray cluster answers at {address} ({error})")


def run_task(task: Task) -> TrialResult:
    """One trial in one thread; runs in a Ray worker."""
    import torch

    from ling_flow.scaling.trial import run_trial

    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return run_trial(task.spec, task.fingerprint, task.corpus_path, device)


def run_tasks(
    tasks: Sequence[Task],
    on_done: Callable[[TrialResult], None],
    gpus_per_trial: float = 0,
    function: Callable[[Task], TrialResult] = run_task,
) -> None:
    """Run `function` on all `tasks`, one CPU each; `on_done` is called for each as it finishes.

    A trial that fails is tried again. One that keeps failing does not stop the others.

    Raises:
        UserError: a trial met an error of the user's.
        SystemFault: trials kept failing; the line names them.
    """
    import ray

    remote = ray.remote(num_cpus=1, num_gpus=gpus_per_trial, max_retries=0)(function)
    running = {remote.remote(task): (task, 1) for task in tasks}
    failed: dict[str, Exception] = {}
    while running:
        (ready, *_), _ = ray.wait(list(running), num_returns=1)
        task, attempt = running.pop(ready)
        try:
            result = ray.get(ready)
        except UserError as error:
            for left in running:
                ray.cancel(left, force=True)
            raise UserError(str(_cause(error))) from None
        except Exception as error:
            if attempt < ATTEMPTS:
                running[remote.remote(task)] = (task, attempt + 1)
            else:
                failed[task.spec.name] = error
        else:
            on_done(result)
    if failed:
        name, last = next(iter(failed.items()))
        cause = _cause(last)
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise SystemFault(
            f"{len(failed)} of {len(tasks)} trials failed {ATTEMPTS} times ({', '.join(failed)}); "
            f"{name}: {lines[-1]}; the finished ones are kept"
        ) from (None if isinstance(cause, LingFlowError) else last)


def _cause(error: Exception) -> BaseException:
    """What was raised in the worker, without Ray's wrapping."""
    return getattr(error, "cause", None) or error
