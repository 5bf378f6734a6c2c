"""The workers of a stage under Ray Train, which starts them again when one dies.

Ray Train is not given our checkpoints: workers that start again open the stage as any other try does, from its newest
whole checkpoint. So a run goes on in the same way whatever ended it, with Ray or without.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from components.pretrain import PretrainResult
from components.pretrain.worker import Forwarder, Job, Listener, WorkerDefect, cause, portable, train_stage
from components.ray_cluster import check_alive, ray_running
from ling_flow.errors import LingFlowError, SystemFault
from ling_flow.parallel.data import WorkerLost
from ling_flow.training.stopping import sigterm_noticed

LISTEN_SECONDS = 0.2
WATCH_SECONDS = 0.5


@dataclass(frozen=True)
class RayRun:
    """How Ray Train runs a stage.

    Attributes:
        name: of the run. Runs that differ must have different ones: Ray Train goes on from a run of the same name.
        storage: path or fsspec URL where Ray Train keeps its record of the run while it lasts.
        restarts: of all workers after one died, before the stage fails.
    """

    name: str
    storage: str
    workers: int
    restarts: int


def train_on_ray(job: Job, run: RayRun, listener: Listener) -> PretrainResult:
    """Train the stage on the cluster at RAY_ADDRESS, or on a Ray of our own while it lasts.

    Raises:
        LingFlowError: a worker raised it; or workers, or Ray itself, died, which is a SystemFault.
        WorkerDefect: workers raised anything else, in every try.
    """
    with ray_running(cpus=run.workers * job.threads), sigterm_noticed() as told:
        import ray
        from ray.exceptions import RayError, RayTaskError

        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        # Ray Train's own settings: it hands on those of the process that calls it, which is the actor's.
        asked = {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}
        place = {"num_cpus": 0, "label_selector": here, "runtime_env": {"env_vars": asked} if asked else None}
        actor = ray.remote(concurrency_groups={"fit": 1}, **place)(Conductor).remote()
        fit = actor.fit.options(concurrency_group="fit").remote(job, run)
        try:
            ended = False
            while not ended:  # no call here may block for long: Ray would end this process if it died meanwhile
                ended = bool(ray.wait([fit], timeout=LISTEN_SECONDS)[0])
                check_alive()
                for kind, words, figures in ray.get(actor.take.remote(told())):
                    getattr(listener, kind)(*words, **figures)
            end: PretrainResult | Exception = ray.get(fit)
        except RayTaskError:
            raise
        except RayError as error:
            raise SystemFault(f"Ray died under the stage ({_first_line(error)}); run again to go on") from error
        finally:
            actor.take.remote(True)  # if we leave early, nobody goes on without us
    if isinstance(end, Exception):
        raise end
    return end


class Conductor:
    """An actor that runs Ray Train, and stands between its workers and the step."""

    def __init__(self) -> None:
        self._calls: list[tuple[Any, ...]] = []
        self._stop = False

    def fit(self, job: Job, run: RayRun) -> PretrainResult | Exception:
        """The result, or what went wrong. Leaves nothing at `run.storage`."""
        import fsspec
        import ray
        from pyarrow.fs import FSSpecHandler, PyFileSystem
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
        from ray.train.torch import TorchTrainer

        class OnlyDeaths(UserCallback):
            """Ends the run where another try would meet the same: what this raises, Ray Train does not try again."""

            def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
                for error in worker_exceptions.values():
                    if isinstance(error, LingFlowError) and not isinstance(error, WorkerLost):
                        raise error

        files, path = fsspec.core.url_to_fs(run.storage)
        gpus = ray.cluster_resources().get("GPU", 0) > 0
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": job, "conductor": ray.get_runtime_context().current_actor},
            scaling_config=ScalingConfig(
                num_workers=run.workers,
                use_gpu=gpus,
                resources_per_worker=None if gpus else {"CPU": job.threads},
            ),
            run_config=RunConfig(
                name=run.name,
                storage_path=path,
                storage_filesystem=PyFileSystem(FSSpecHandler(files)),
                failure_config=FailureConfig(max_failures=run.restarts, controller_failure_limit=run.restarts),
                callbacks=[OnlyDeaths()],
            ),
        )
        try:
            result: PretrainResult = trainer.fit().return_value
            return result
        except TrainingFailedError as error:
            return _failure(error, job, run)
        finally:
            record = f"{path}/{run.name}"
            if files.exists(record):
                files.rm(record, recursive=True)

    def tell(self, *call: Any) -> bool:
        """The workers' side. Returns whether to stop."""
        self._calls.append(call)
        return self._stop

    def take(self, stop: bool) -> list[tuple[Any, ...]]:
        """The step's side: what was told since the last time."""
        self._stop = self._stop or stop
        calls, self._calls = self._calls, []
        return calls


def _work(given: dict[str, Any]) -> PretrainResult | None:
    """What each worker runs, in the process group that Ray Train made."""
    threading.Thread(target=_end_with_raylet, daemon=True).start()
    line = _Line(given["conductor"])
    try:
        return train_stage(given["job"], Forwarder(line.send), nullcontext(line.told_to_stop))
    except Exception as error:
        raise portable(error) from None
    finally:
        line.wait()


def _end_with_raylet() -> None:
    """Of itself a worker goes on for 10 s and longer, and could still write while the next try trains."""
    raylet = os.getppid()
    while os.getppid() == raylet:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


class _Line:
    """A worker's line to the conductor; it waits for no answer until all is said."""

    def __init__(self, conductor: Any) -> None:
        self._conductor = conductor
        self._answers: list[Any] = []

    def send(self, kind: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._answers.append(self._conductor.tell.remote(kind, arguments, options))

    def told_to_stop(self) -> bool:
        import ray

        if not self._answers:
            return False
        there, self._answers = ray.wait(self._answers, num_returns=len(self._answers), timeout=0)
        return any(ray.get(there))

    def wait(self) -> None:
        import ray

        ray.get(self._answers)


def _failure(error: Exception, job: Job, run: RayRun) -> Exception:
    """What a failed run of Ray Train means."""
    from ray.train import ControllerError, WorkerGroupError

    if isinstance(error, WorkerGroupError):
        failures = error.worker_failures
        ours = [e for e in failures.values() if isinstance(e, (LingFlowError, WorkerDefect))]
        deaths = [f"worker {rank} died, after {run.restarts} restarts" for rank, e in failures.items() if e not in ours]
        return cause(ours, deaths)
    reason = error.controller_failure if isinstance(error, ControllerError) else error
    if isinstance(reason, LingFlowError):
        return reason
    needs = f"{run.workers} workers of {job.threads} threads"
    return SystemFault(f"Ray Train could not run {needs}: {_first_line(reason)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
