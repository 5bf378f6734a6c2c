"""A step as a Ray job: the step becomes a launcher that submits itself, tells what the job says, reads its artifact.

The job's process runs `python -m components.NAME` with the same config, inputs and artifact root, and makes the
artifact in place. Its name comes from the fingerprint, so that a retried step finds the job that still runs. What it
says on stderr are events (`ling_flow.flow.events`), which become the launcher's own.

What reaches the job: the variables of `SENT`, never a secret. Whoever may look at a Ray cluster can read the command
and the environment of its jobs; secrets are in the environment of the cluster itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ling_flow.config import canonical_json, parse
from ling_flow.errors import LingFlowError, RemoteDefect, SystemFault, UserError
from ling_flow.flow import events
from ling_flow.flow.component import Resources
from ling_flow.flow.context import Context, RunOn
from ling_flow.flow.identity import code_version
from ling_flow.flow.job_settings import JobSettings
from ling_flow.redact import has_password

if TYPE_CHECKING:
    from ling_flow.flow.step import Identified, Outcome

STOP_SECONDS = 25  # a job that is told to stop may save for so long; Kubernetes gives a pod 30
SENT = (
    "LING_FLOW_PARENT_RUN_ID", "LING_FLOW_KFP_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME", "MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION",
    "AWS_DEFAULT_REGION", "FSSPEC_S3_ENDPOINT_URL",
)  # fmt: skip
_NAME_LENGTH = 44  # KubeRay takes 47 for a RayJob; an attempt adds up to three
_OURS = '{"event": "'  # how an event begins


@dataclass(frozen=True)
class Job:
    """One step, ready to be submitted.

    Attributes:
        base: name of the first attempt; the n-th is `name(n)`.
        arguments: of `python -m`, the module first.
        environment: what the job's process gets beside the cluster's own variables.
        reserved: what the job's process asks of Ray; None where it asks Ray itself for workers.
    """

    base: str
    label: str
    component: str
    fingerprint: str
    root: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    resources: Resources
    reserved: Resources | None

    def name(self, attempt: int) -> str:
        """Of an attempt, counted from 1. It is the same for every try of the step, on whatever machine."""
        return self.base if attempt == 1 else f"{self.base}-{attempt}"

    def entrypoint(self, name: str, python: str = "python") -> str:
        """The shell command of the attempt `name`; nothing stands between Ray's signals and the step.

        Args:
            python: the interpreter, as the shell is to read it.
        """
        variables = {**self.environment, "LING_FLOW_RAY_JOB": name}
        given = [f"{key}={shlex.quote(value)}" for key, value in sorted(variables.items())]
        return " ".join(["exec env", *given, python, "-m", *map(shlex.quote, self.arguments)])

    @property
    def notes(self) -> dict[str, str]:
        """What people find beside the job."""
        return {
            "ling_flow.step": self.label,
            "ling_flow.fingerprint": self.fingerprint,
            "ling_flow.root": self.root,
            "ling_flow.code_version": code_version(),
        }


@dataclass(frozen=True)
class Ended:
    """How an attempt ended; `message` is the server's, `exit_code` the process's (negative: a signal) where known."""

    name: str
    state: str
    message: str = ""
    exit_code: int | None = None

    @property
    def succeeded(self) -> bool:
        return self.state == "SUCCEEDED"


class JobOutput:
    """Takes a job's output as it comes, in pieces of any size: events become this process's own, lines are printed."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.characters = 0
        self.last_news = time.monotonic()
        self.error: dict[str, Any] | None = None
        self._line = ""
        self._printed_error: set[str] = set()

    def feed(self, text: str) -> None:
        """The next piece."""
        if not text:
            return
        self.characters += len(text)
        self.last_news = time.monotonic()
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._take(line)

    def close(self) -> None:
        """The last line may have no end."""
        if self._line:
            self._take(self._line)
        self._line = ""

    def _take(self, line: str) -> None:
        if line.startswith(_OURS):
            try:
                event = json.loads(line)
                kind, step = event.pop("event"), event.pop("step")
            except (ValueError, KeyError):
                pass
            else:
                self._take_event(kind, step, event)
                return
        # The job prints its error after its event, as every step does; this process will print it, once.
        if line and line not in self._printed_error and not line.startswith("Running entrypoint for job "):
            print(line, file=sys.stderr, flush=True)

    def _take_event(self, kind: str, step: str, event: dict[str, Any]) -> None:
        event.pop("time", None)
        if kind == "error":
            self.error = event
            self._printed_error = {f"error: {event['message']}", *event.get("traceback", "").splitlines()}
        elif not (step == self.label and kind in ("start", "done")):  # the launcher says that itself
            events.emit(kind, step=step, **event)


def run_as_job(step: Identified, where: RunOn, context: Context, rebuild: bool) -> Outcome:
    """Have the step's artifact made by a job: the one that still runs, or a new one.

    A process that is told to end (SIGTERM, Ctrl-C) stops its job; a killed one leaves it to the next try.

    Raises:
        UserError, SystemFault, RemoteDefect: the job's own error.
        UserError: the settings are wrong; or the job and this process do not see the same artifacts.
        SystemFault: the job server is away for longer than `patience_s`, or the job stands still.
    """
    settings = parse(JobSettings, context.job, "LING_FLOW_JOB")
    job = job_of(step, context, settings, rebuild)
    output = JobOutput(step.label)
    events.emit("start", step=step.label, component=step.component.name, fingerprint=step.key)
    if where == "ray-job":
        from ling_flow.flow import ray_jobs

        ended = ray_jobs.run(job, settings, output)
    else:
        from ling_flow.flow import kuberay_jobs

        ended = kuberay_jobs.run(job, settings, output)
    output.close()
    if not ended.succeeded:
        raise failure(ended, output)
    outcome = step.find()
    if outcome is None:
        raise UserError(
            f"{step.label}: job {ended.name} succeeded, but {job.root}/{job.component}/{job.fingerprint} is not there; "
            "the job must see the artifact root that this step sees, and run the same code"
        )
    return replace(outcome, cached=False)


def job_of(step: Identified, context: Context, settings: JobSettings, rebuild: bool) -> Job:
    """
    Raises:
        UserError: the tracking URI holds a password.
    """
    component, root = step.component, step.store.root
    # Where the artifact goes is part of the name: a job that writes elsewhere does not make it.
    place = hashlib.sha256(root.encode()).hexdigest()[:6]
    short = re.sub("[^a-z0-9]+", "-", component.name.lower())[: _NAME_LENGTH - len(step.key) - len(place) - 2]
    arguments = [component.body.__module__, "--config-json", canonical_json(step.config.model_dump(mode="json"))]
    arguments += ["--root", root, *(word for name, ref in step.refs.items() for word in (f"--{name}", str(ref)))]
    resources = settings.resources or component.resources
    environment = {**_sent(os.environ), **settings.env, "LING_FLOW_RUN_ON": "process", "LING_FLOW_EVENTS": "-"}
    if step.label != component.label_of(step.config):
        environment["LING_FLOW_LABELS"] = json.dumps({step.key: step.label})
    return Job(
        base=f"{short.strip('-')}-{step.key}-{place}",
        label=step.label,
        component=component.name,
        fingerprint=step.key,
        root=root,
        arguments=(*arguments, *(["--rebuild"] if rebuild else [])),
        environment=environment,
        resources=resources,
        reserved=None if component.runs_on_of(step.config) == "ray" else resources,
    )


def failure(ended: Ended, output: JobOutput) -> LingFlowError:
    """The error that a job ended with, of the kind it had there."""
    if output.error is not None:
        message = output.error["message"]
        if output.error["kind"] == "user":
            return UserError(message)
        if output.error["kind"] == "system":
            return SystemFault(message)
        return RemoteDefect(message, output.error.get("traceback", ""))
    reason = " ".join(ended.message.split())
    if ended.state == "STOPPED":
        return SystemFault(f"{output.label}: job {ended.name} was stopped by someone; run again to go on")
    text = f"{output.label}: job {ended.name} ended without a word of its own: {reason or ended.state}"
    if ended.exit_code is not None and 0 < ended.exit_code < 128:
        return UserError(f"{text}; is this package in the job's image or environment?")
    return SystemFault(f"{text}; run again to go on")


def _sent(environment: Mapping[str, str]) -> dict[str, str]:
    sent = {name: environment[name] for name in SENT if environment.get(name)}
    for name, value in sent.items():
        if has_password(value):
            raise UserError(
                f"{name}: holds a password, which would be readable in the job's command; leave it out and give "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to the cluster"
            )
    return sent
