"""RayJobs on Kubernetes: find or create the one of a step, wait for its end, pass on what it says.

The step's pod is disposable: the job's name comes from the fingerprint, so the next try of the step attaches to it. Two
states count, that of the deployment and that of the job; neither is trusted alone, and neither for ever: a job that is
said to run, but has neither put out anything nor changed its state for `heartbeat_s`, has failed.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

from ling_flow.errors import LingFlowError, SystemFault
from ling_flow.flow import events, ray_jobs
from ling_flow.flow.job_settings import JobSettings
from ling_flow.flow.jobs import Ended, Job, JobOutput
from ling_flow.flow.kube_api import RAY_JOBS, Kubernetes, own_namespace
from ling_flow.flow.kuberay import FINGERPRINT, image_of, ray_job

POLL_SECONDS = 2.0
AGREE_SECONDS = 120.0  # the deployment's state follows the job's; one that does not is left behind
_OVER = ("Complete", "Failed", "ValidationFailed")


def run(job: Job, settings: JobSettings, output: JobOutput) -> Ended:
    """Create the step's RayJob or attach to it, and wait for its end.

    Raises:
        UserError: no way to a cluster, or it refuses.
        SystemFault: the API server is away for too long, the job was deleted, or it stands still.
    """
    api = Kubernetes()
    namespace = settings.cluster.namespace or own_namespace()
    name = None
    try:
        name = submit(api, job, namespace, settings)
        return follow(api, namespace, name, f"RayJob {namespace}/{name}", settings, output)
    except BaseException as error:
        if not isinstance(error, Exception):  # told to end
            name = name or _under_way(api, job, namespace)  # its creation may have reached the server
            if name is not None:
                events.emit("log", step=job.label, text=f"stopping RayJob {namespace}/{name}")
                stop(api, namespace, name)
        raise


def submit(api: Kubernetes, job: Job, namespace: str, settings: JobSettings) -> str:
    """Create the RayJob, or find an attempt of it that is under way; its name."""
    owner = None
    workflow = os.environ.get("LING_FLOW_WORKFLOW")
    if workflow:
        owner = api.workflow(namespace, workflow)
        if owner is None:
            text = f"workflow {workflow} cannot be read: if the run is deleted, the job lives on until its deadline"
            events.emit("log", step=job.label, text=text)
    attempt = 1
    while True:
        name = job.name(attempt)
        there = api.get(RAY_JOBS, namespace, name)
        if there is None:
            manifest = ray_job(job, name, namespace, image_of(settings.cluster), settings, owner)
            if api.create(RAY_JOBS, namespace, manifest):
                return name
            continue  # another launcher was faster; look again
        if _lives(there, job, name):
            events.emit("log", step=job.label, text=f"attaching to RayJob {namespace}/{name}")
            return name
        attempt += 1


def _lives(there: dict[str, Any], job: Job, name: str) -> bool:
    """Whether a RayJob is an attempt of ours that has not ended."""
    ours = there["metadata"].get("annotations", {}).get(FINGERPRINT) == job.fingerprint
    return ours and "deletionTimestamp" not in there["metadata"] and _ended(name, there) is None


def _under_way(api: Kubernetes, job: Job, namespace: str) -> str | None:
    """The attempt that has not ended."""
    attempt = 1
    with contextlib.suppress(Exception):
        while (there := api.get(RAY_JOBS, namespace, job.name(attempt))) is not None:
            if _lives(there, job, job.name(attempt)):
                return job.name(attempt)
            attempt += 1
    return None


def follow(api: Kubernetes, namespace: str, name: str, where: str, settings: JobSettings, output: JobOutput) -> Ended:
    """Wait for the end of a RayJob, passing on what it says as soon as its dashboard can be reached.

    Raises:
        SystemFault: see `run`.
    """
    answered, before, over_since = time.monotonic(), "", None
    with contextlib.ExitStack() as stack:
        tail: ray_jobs.Tail | None = None
        while True:
            now = time.monotonic()
            try:
                there = api.get(RAY_JOBS, namespace, name)
            except SystemFault as error:
                if now - answered > settings.patience_s:
                    raise SystemFault(f"{error}, for {now - answered:.0f} s; run again to go on") from None
                time.sleep(POLL_SECONDS)
                continue
            answered = now
            if there is None:
                raise SystemFault(f"{where}: was deleted; run again to go on")
            state = _state(there)
            if state != before:
                before, output.last_news = state, now
                events.emit("log", step=output.label, text=f"{where}: {state}")
            if tail is None:
                tail = _tail(there, name, output)
                if tail is not None:
                    stack.enter_context(tail)
            ended = _ended(name, there)
            job_over = there.get("status", {}).get("jobStatus") in ray_jobs.TERMINAL
            over_since = (over_since or now) if job_over else None
            if ended is None and over_since is not None and now - over_since > AGREE_SECONDS:
                ended = Ended(name, there["status"]["jobStatus"], there["status"].get("message", ""))
            if ended is not None:
                if tail is not None:
                    tail.finish()
                return ended
            silent = now - output.last_news
            running = there.get("status", {}).get("jobDeploymentStatus") == "Running"
            if running and settings.heartbeat_s is not None and silent > settings.heartbeat_s:
                stop(api, namespace, name)
                raise SystemFault(f"{where}: no sign of life for {silent:.0f} s, deleted; run again to go on")
            time.sleep(POLL_SECONDS)


def stop(api: Kubernetes, namespace: str, name: str) -> None:
    """Let the job save, where its dashboard can be reached, and delete it with its cluster; never fails."""
    with contextlib.suppress(Exception):
        there = api.get(RAY_JOBS, namespace, name)
        client = _dashboard(there) if there is not None and _ended(name, there) is None else None
        if client is not None:
            ray_jobs.stop(client, name)
    with contextlib.suppress(LingFlowError):
        api.delete(RAY_JOBS, namespace, name)


def _state(there: dict[str, Any]) -> str:
    status = there.get("status", {})
    states = [status.get("jobDeploymentStatus") or "New", status.get("jobStatus", ""), status.get("reason", "")]
    return ", ".join(state for state in states if state)


def _ended(name: str, there: dict[str, Any]) -> Ended | None:
    """How it ended; None while it has not. The deployment must be over, and the job's state says how."""
    status = there.get("status", {})
    deployment, state = status.get("jobDeploymentStatus"), status.get("jobStatus", "")
    if deployment not in _OVER:
        return None
    message = ": ".join(text for text in (status.get("reason", ""), status.get("message", "")) if text)
    if deployment == "Complete" and state in ("SUCCEEDED", "STOPPED"):
        return Ended(name, state, message)
    return Ended(name, "FAILED", message or f"{deployment}, {state or 'never ran'}")


def _tail(there: dict[str, Any], name: str, output: JobOutput) -> ray_jobs.Tail | None:
    client = _dashboard(there)
    return ray_jobs.Tail(client, name, output) if client is not None else None


def _dashboard(there: dict[str, Any]) -> Any:
    """A client of the job's own dashboard; None while there is none, or a network policy is in the way."""
    status = there.get("status", {})
    url = status.get("dashboardURL")
    if not url or status.get("jobStatus") in ("", None):
        return None
    with contextlib.suppress(LingFlowError):
        return ray_jobs.connect(url if "://" in url else f"http://{url}")
    return None
