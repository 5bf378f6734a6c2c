"""Run the trials of a sweep as Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ling_flow.errors import LingFlowError, SystemFault, UserError
from ling_flow.scaling.design import TrialResult, TrialSpec

ATTEMPTS = 2


@dataclass(frozen=True)
class Task:
    """A trial to run. Its corpus travels by path, not through the object store."""

    spec: TrialSpec
    fingerprint: str
    corpus_path: Path
    gpus: float = 0


def run_task(task: Task) -> TrialResult:
    """One trial in one thread; runs in a Ray worker, which sees the machine's GPUs whether it was given any or not."""
    import torch

    from ling_flow.scaling.trial import run_trial

    torch.set_num_threads(1)
    device = torch.device("cuda" if task.gpus > 0 else "cpu")
    return run_trial(task.spec, task.fingerprint, task.corpus_path, device)


def run_tasks(
    tasks: Sequence[Task],
    on_done: Callable[[TrialResult], None],
    function: Callable[[Task], TrialResult] = run_task,
) -> None:
    """Run `function` on all `tasks`, one CPU each and the GPUs that it says; `on_done` is called for each as it
    finishes.

    A trial that fails is tried again. One that keeps failing does not stop the others.

    Raises:
        UserError: a trial met an error of the user's.
        SystemFault: trials kept failing; the line names them.
    """
    import ray

    remote = ray.remote(num_cpus=1, max_retries=0)(function)

    def start(task: Task) -> Any:
        return remote.options(num_gpus=task.gpus).remote(task)

    running = {start(task): (task, 1) for task in tasks}
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
                running[start(task)] = (task, attempt + 1)
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
