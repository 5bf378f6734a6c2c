"""Run a DAG on this machine through `kfp.local`: KFP's own code executes the graph, each step in a process or a
container of its own.

KFP prints much and says little: its output goes to a log file, the steps speak through their event file, and the caller
gets a failed step's own error.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.console import Console

from ling_flow.config import StrictModel, parse
from ling_flow.errors import LingFlowError, SystemFault, UserError
from ling_flow.flow.context import Context
from ling_flow.flow.dag import LoadedDag, Node
from ling_flow.flow.identity import code_version
from ling_flow.flow.live import StepState, Watcher

Runner = Literal["subprocess", "docker"]


class DefectError(LingFlowError):
    """A step failed by a defect of ours; the message carries its traceback."""


OPEN_RUN = "mlflow.json"


class OpenRun(StrictModel):
    """What `mlflow.json` in the directory of a run holds, as long as its run in MLflow is open."""

    tracking_uri: str = Field(description="the store")
    run_id: str = Field(description="the run there")
    status: str = Field("killed", description="how it ended, if nobody comes to say otherwise")


@dataclass(frozen=True)
class DagRun:
    """A finished run."""

    seconds: float
    steps: list[StepState]
    mlflow_run_id: str | None
    directory: Path

    def to_json(self) -> dict[str, Any]:
        """The object that `lingflow run --json` prints last."""
        return {
            "status": "succeeded",
            "seconds": round(self.seconds, 2),
            "mlflow_run_id": self.mlflow_run_id,
            "phases": {
                step.label: {
                    "seconds": round(step.seconds, 2),
                    "cached": step.status == "cached",
                    "metrics": {
                        name: value for name, value in step.result.items() if not isinstance(value, dict | list)
                    },
                    "artifacts": step.outputs,
                }
                for step in self.steps
            },
        }


def run_local(
    dag: LoadedDag,
    arguments: Mapping[str, Any],
    plan: Sequence[Node],
    context: Context,
    console: Console,
    rebuild: frozenset[str] = frozenset(),
    no_cache: bool = False,
    runner: Runner = "subprocess",
    mounts: Sequence[Path] = (),
) -> DagRun:
    """Execute `dag`; finished steps are served from their artifacts, killed ones go on from their last checkpoint.

    Args:
        rebuild: labels of the steps to redo although their artifacts exist; `no_cache`: all of them.
        mounts: files and directories outside the home that steps in containers may read.

    Raises:
        UserError, SystemFault, DefectError: the failed step's own error, with its name in front.
    """
    from ling_flow.flow.preflight import check_temporary
    from ling_flow.flow.tracking import default_tracking_uri, finish_dag_run, start_dag_run

    if runner == "subprocess":
        check_temporary()
    directory = _run_directory(context.home, dag.name)
    tracking_uri = context.tracking_uri or default_tracking_uri(context.home)
    started = time.monotonic()
    (directory / "plan.json").write_text(json.dumps([_summary(node) for node in plan], indent=1))
    parent = start_dag_run(
        tracking_uri,
        dag.name,
        str(arguments.get("preset", "")),
        _overrides(arguments),
        code_version(),
        {"ling_flow.seed": str(arguments.get("seed", ""))},
    )
    environment = {
        "LING_FLOW_HOME": str(context.home),
        "LING_FLOW_ARTIFACTS": context.artifacts,
        "LING_FLOW_EVENTS": str(directory / "events.jsonl"),
        "LING_FLOW_REBUILD": json.dumps(sorted(rebuild)),
        "LING_FLOW_NO_CACHE": "1" if no_cache else "",
        "LING_FLOW_LABELS": json.dumps({node.fingerprint: node.label for node in plan if node.numbered}),
        "LING_FLOW_PARENT_RUN_ID": parent or "",
        "MLFLOW_TRACKING_URI": tracking_uri,
        "LING_FLOW_RUNNER_LOCK": str(directory / "runner.lock"),
        "LING_FLOW_RUNNER": runner,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")])),
    }
    status = "failed"
    watcher = Watcher(directory / "events.jsonl", [node.label for node in plan], console)
    try:
        with _lock(directory), watcher, _environment(environment), _termination_as_interrupt():
            if parent:
                note = OpenRun(tracking_uri=tracking_uri, run_id=parent)
                (directory / OPEN_RUN).write_text(note.model_dump_json())
                _close_abandoned(context.home, tracking_uri)
            if runner == "docker":
                _execute_in_containers(dag, arguments, directory, context, tracking_uri, mounts, console)
            else:
                from kfp import local

                _execute(dag, arguments, directory, local.SubprocessRunner(use_venv=False))
        for state in (watcher.steps[node.label] for node in plan):
            if state.status not in ("done", "cached"):
                raise _ended_early(state, directory)
        status = "finished"
    except LingFlowError:
        raise
    except Exception as error:
        if early := _unfinished_before(watcher, error):
            raise _ended_early(early, directory) from None
        if not isinstance(error, RuntimeError):  # kfp.local's only word for a failed task
            raise
        raise _failure_of(watcher, directory, error) from None
    except KeyboardInterrupt:
        status = "killed"
        raise
    finally:
        if parent:
            _record_cached(tracking_uri, parent, plan, watcher)
            if finish_dag_run(tracking_uri, parent, status):
                (directory / OPEN_RUN).unlink(missing_ok=True)
            else:
                note = OpenRun(tracking_uri=tracking_uri, run_id=parent, status=status)
                (directory / OPEN_RUN).write_text(note.model_dump_json())
    steps = {
        node.label: watcher.steps[node.label] for node in plan
    }  # of others, such as the store, words may have come
    return DagRun(time.monotonic() - started, list(steps.values()), parent, directory)


def _record_cached(tracking_uri: str, parent: str, plan: Sequence[Node], watcher: Watcher) -> None:
    """A cached step returns before it would import MLflow; its place in the run tree is filled here."""
    from ling_flow.flow.tracking import record_cached

    for node in {node.label: node for node in plan}.values():
        state = watcher.steps[node.label]
        if state.status == "cached":
            config, inputs = node.config.model_dump(mode="json"), {name: ref or "" for name, ref in node.inputs.items()}
            record_cached(
                tracking_uri,
                parent,
                node.label,
                node.component.name,
                node.fingerprint,
                config,
                inputs,
                state.result,
                node.manifest.code_version if node.manifest else "",
            )


def _run_directory(home: Path, name: str) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    directory = home / "runs" / f"{name}-{stamp}-{os.getpid()}"
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{home}: cannot be written to ({error.strerror}); set LING_FLOW_HOME to another directory"
        ) from None
    return directory


def _summary(node: Node) -> dict[str, Any]:
    return {
        "step": node.label,
        "component": node.component.name,
        "fingerprint": node.fingerprint,
        "state": node.state,
        "reason": node.reason,
        "config": node.config.model_dump(mode="json"),
        "inputs": node.inputs,
    }


def _execute(dag: LoadedDag, arguments: Mapping[str, Any], directory: Path, runner: Any) -> None:
    """KFP runs the graph; what it and the steps print goes to `log.txt`."""
    from kfp import local

    from ling_flow.flow.processes import kfp_starts_steps_whole

    with (
        (directory / "log.txt").open("w", buffering=1) as log,
        contextlib.redirect_stdout(log),
        warnings.catch_warnings(),
        kfp_starts_steps_whole(log),
    ):
        warnings.simplefilter("ignore")  # about our image's name, and about requests that only a cluster honours
        local.init(runner=runner, pipeline_root=str(directory / "kfp"))
        dag.pipeline(**arguments)


def _execute_in_containers(
    dag: LoadedDag,
    arguments: Mapping[str, Any],
    directory: Path,
    context: Context,
    tracking_uri: str,
    mounts: Sequence[Path],
    console: Console,
) -> None:
    """The same with each step in its image; what still runs at the end is stopped.

    Raises:
        UserError: an image is missing, or a file lies where containers do not see it.
        SystemFault: no engine answers, or it went away.
    """
    from docker.errors import DockerException
    from kfp import local
    from requests import RequestException

    from ling_flow.flow import containers

    containers.check_tracking(context, tracking_uri)
    engine = containers.Engine.connect()
    users = set()
    for image in sorted(containers.images_of(dag.spec)):
        engine.name_of(image)
        users.add(engine.user_of(image))
        built_from = engine.code_version_of(image)
        if built_from != code_version():
            console.print(
                f"image {image} was built from {built_from or 'unknown code'}; this is {code_version()}",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
    if len(users) > 1:
        raise UserError(f"the images of {dag.name} have different users; files of one step would be closed to the next")
    user = users.pop()
    (directory / "kfp").mkdir()
    containers.hand_over(context, directory, user)
    try:
        engine.remove_ended(context.home)
        with containers.kfp_loses_no_exit_code():
            runner = local.DockerRunner(**containers.runner_arguments(user, context, directory.name, mounts))
            _execute(dag, arguments, directory, runner)
    except (DockerException, RequestException) as error:
        raise SystemFault(f"the container engine failed: {error}") from None


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Held while this process lives: steps, in containers too, look at it and end when it is free."""
    with (directory / "runner.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _close_abandoned(home: Path, tracking_uri: str) -> None:
    """Close in MLflow the DAG runs of this home that could not: they were killed, or the store was away. Their locks
    are free."""
    from ling_flow.flow.tracking import finish_dag_run

    for path in sorted(home.glob(f"runs/*/{OPEN_RUN}")):
        # A held lock: it runs, as this one does. Others are not ours to read, or not whole.
        with contextlib.suppress(OSError, UserError):
            note = parse(OpenRun, path.read_text(), str(path))
            with (path.parent / "runner.lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if note.tracking_uri == tracking_uri and finish_dag_run(tracking_uri, note.run_id, note.status):
                    path.unlink(missing_ok=True)


def _overrides(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameter `overrides`, nested; a DAG of one's own may mean something else by that name."""
    given = arguments.get("overrides") or {}
    try:
        nested = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        nested = given
    return nested if isinstance(nested, Mapping) else {"overrides": given}


def _unfinished_before(watcher: Watcher, error: Exception) -> StepState | None:
    """The step that ended without a word before a later one failed: KFP took it for done. One runs at a time."""
    running = sorted(
        (state for state in watcher.steps.values() if state.status == "running"), key=lambda state: state.started
    )
    another = any(watcher.failed()) or len(running) > 1 or not isinstance(error, RuntimeError)
    return running[0] if running and another else None


def _ended_early(state: StepState, directory: Path) -> DefectError:
    return DefectError(
        f"{state.label}: ended with exit code 0 before it was finished; its body must return its result, and not leave "
        f"the process (sys.exit, os._exit). Log: {directory / 'log.txt'}"
    )


def _failure_of(watcher: Watcher, directory: Path, error: RuntimeError) -> LingFlowError:
    """The failed step's own error. A step that died without a word was killed from outside: the system's fault."""
    log = directory / "log.txt"
    for state in watcher.failed():
        assert state.error is not None
        message = state.error["message"]
        if not message.startswith(state.label):
            message = f"{state.label}: {message}"
        if state.error["kind"] == "user":
            return UserError(message)
        if state.error["kind"] == "system":
            return SystemFault(message)
        return DefectError(
            f"{message}\n{state.error.get('traceback', '')}(this is a defect of ling_flow; full log: {log})"
        )
    running = [state.label for state in watcher.steps.values() if state.status == "running"]
    last = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-4:]
    who = running[0] if running else str(error)
    return SystemFault(
        f"{who}: died without a word (killed, or out of memory?); run again to go on. Log: {log}\n" + "\n".join(last)
    )


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Steps inherit the environment: set ours for the time of the run, and unset what is empty."""
    before = {name: os.environ.get(name) for name in changes}
    for name, value in changes.items():
        os.environ.pop(name, None)
        if value:
            os.environ[name] = value
    try:
        yield
    finally:
        for name, old in before.items():
            os.environ.pop(name, None)
            if old is not None:
                os.environ[name] = old


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP (a closed terminal) end the run as Ctrl-C does: steps see that their runner is gone and stop.

    A signal that is ignored (nohup) stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
