"""MLflow runs: one per DAG run, a child per step, a grandchild per trial. Tracking never ends or delays a training run.

A step only queues what it has to say; one background thread talks to the store. While the store is away the queue
grows, one warning is printed, and everything is sent when the store is back. Where the environment names a run
(MLFLOW_RUN_ID, given by the server side of Kubeflow Pipelines) the step adopts that run instead of making one. On a
cluster nobody makes the run of the DAG beforehand: LING_FLOW_KFP_RUN_ID names the run of Kubeflow Pipelines, and the
steps find the DAG's run by it, or the first of them makes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ling_flow.errors import LingFlowError, SystemFault
from ling_flow.flow import events, identity
from ling_flow.flow import mlflow_store as store
from ling_flow.flow.context import Context
from ling_flow.flow.mlflow_store import EXPERIMENT, default_tracking_uri
from ling_flow.flow.outbox import Outbox

__all__ = [
    "NullTracker",
    "Tracker",
    "default_tracking_uri",
    "finish_dag_run",
    "finish_kfp_run",
    "open_tracker",
    "record_cached",
    "record_cached_on_kfp",
    "start_dag_run",
]

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from ling_flow.flow.artifact import Manifest

FINISH_SECONDS = 10.0  # how long the end of a step may wait for a store that never answered
RETURN_SECONDS = 120.0  # and for one that did, and will be back


class NullTracker:
    """Takes everything and records nothing: the tracker of a step that runs without a tracking store."""

    run_id: str | None = None

    def start_step(
        self,
        label: str,
        component: str,
        fingerprint: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Mapping[str, str]],
    ) -> None:
        """The step begins; `inputs` as in the artifact's manifest: name → `ref`, `fingerprint`."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at training step `step`."""

    def trial(self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """One finished trial of a sweep: a run below the step's run."""

    def artifact(self, path: Path) -> None:
        """A small file (a plot, a report) to keep with the run; it is copied before the call returns."""

    def dataset(self, name: str, source: str, digest: str, context: str) -> None:
        """A dataset the step read or made: `source` path or URL, `digest` of its content, `context` what it was for."""

    def model(self, name: str, path: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """A model whose files stay at `path` (the reference of an output), as an external LoggedModel."""

    def uses_model(self, path: str) -> None:
        """The step read the model at `path`: its LoggedModel, if there is one, becomes an input of the run."""

    def finish(self, result: Mapping[str, Any], status: str = "finished") -> None:
        """The step ends, `status` is finished, failed or killed; waits at most ten seconds for a store that has not
        answered since the step began, two minutes for one that has."""


class Tracker(NullTracker):
    """A step's run in MLflow. Make it with `open_tracker`."""

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        parent: str | None,
        adopted: str | None,
        kfp_run_id: str | None = None,
        ray_job_id: str | None = None,
    ) -> None:
        self._tracking_uri = tracking_uri
        self._experiment = experiment
        self._parent = parent
        self._adopted = adopted
        self._kfp_run_id = kfp_run_id
        self._platform_tags = store.platform_tags(kfp_run_id, ray_job_id)
        self._label = "tracking"
        self._fingerprint = ""
        self._client: MlflowClient | None = None
        self._outbox = Outbox(f"tracking store {tracking_uri}", self._warn, store.passing)
        self._connected = self._outbox.put(self._connect)

    def start_step(
        self,
        label: str,
        component: str,
        fingerprint: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Mapping[str, str]],
    ) -> None:
        self._label, self._fingerprint = label, fingerprint
        refs = {name: parent["ref"] for name, parent in inputs.items()}
        tags = {**store.step_tags(component, fingerprint, refs, identity.code_version()), **self._platform_tags}
        started = store.now_ms()
        self._outbox.put(lambda: self._open_run(label, tags, started))
        self._outbox.put(lambda: store.log_config(self._api, self._run, config))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        now = store.now_ms()
        self._outbox.put_points(self._log_points, [(name, float(value), now, step) for name, value in values.items()])

    def trial(self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        now = store.now_ms()
        run: Future[str] = self._outbox.put(
            lambda: store.create_run(self._api, self._experiment, name, {"ling_flow.trial": name}, self._run, now)
        )
        self._outbox.put(lambda: store.log_config(self._api, run.result(0), params))
        self._outbox.put(lambda: store.log_result(self._api, run.result(0), metrics))
        self._outbox.put(lambda: self._api.set_terminated(run.result(0), "FINISHED", now))

    def artifact(self, path: Path) -> None:
        # Copied now: the step's directory may be renamed before the store is back.
        directory = Path(tempfile.mkdtemp(prefix="ling_flow-"))
        copy = directory / path.name
        shutil.copyfile(path, copy)

        def send() -> None:
            self._api.log_artifact(self._run, str(copy))
            shutil.rmtree(directory, ignore_errors=True)

        self._outbox.put(send)

    def dataset(self, name: str, source: str, digest: str, context: str) -> None:
        self._outbox.put(lambda: store.log_dataset(self._api, self._run, name, source, digest, context))

    def model(self, name: str, path: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        tags = {store.FINGERPRINT_TAG: self._fingerprint, **self._platform_tags, **tags}
        self._outbox.put(lambda: store.log_model(self._api, self._experiment, self._run, name, path, params, tags))

    def uses_model(self, path: str) -> None:
        self._outbox.put(lambda: store.log_model_input(self._api, self._experiment, self._run, path))

    def finish(self, result: Mapping[str, Any], status: str = "finished") -> None:
        self._outbox.put(lambda: store.log_result(self._api, self._run, result))
        if self._adopted is None:  # an adopted run is closed by whoever made it, and has the parent that it gave it
            self._outbox.put(lambda: self._tell_parent(result))
            ended = store.now_ms()
            self._outbox.put(lambda: self._api.set_terminated(self._run, status.upper(), ended))
        with contextlib.suppress(Exception):  # importing MLflow is no sign of a store that is away
            self._connected.result(RETURN_SECONDS)
        self._outbox.close(FINISH_SECONDS if self.run_id is None else RETURN_SECONDS)

    def _warn(self, text: str) -> None:
        events.emit("log", step=self._label, text=text)

    # What follows runs on the outbox's thread.

    @property
    def _api(self) -> MlflowClient:
        if self._client is None:
            raise ValueError("there is no connection")
        return self._client

    @property
    def _run(self) -> str:
        if self.run_id is None:
            raise ValueError("the step has no run")
        return self.run_id

    def _connect(self) -> None:
        self._client = store.connect(self._tracking_uri)

    def _open_run(self, label: str, tags: dict[str, str], started: int) -> None:
        if self._kfp_run_id and not self._adopted and not self._parent:
            self._parent = store.kfp_parent(self._api, self._experiment, self._kfp_run_id)
        above = self._adopted or self._parent
        if above is not None:
            self._experiment = str(self._api.get_run(above).info.experiment_id)
        else:
            self._experiment = store.experiment_id(self._api, self._experiment)
        if self._adopted is None:
            self.run_id = store.create_run(self._api, self._experiment, label, tags, self._parent, started)
            return
        for key, value in tags.items():
            self._api.set_tag(self._adopted, key, value)
        self.run_id = self._adopted

    def _tell_parent(self, result: Mapping[str, Any]) -> None:
        if self._parent is not None:
            store.log_result(self._api, self._parent, result, _prefix(self._label))

    def _log_points(self, points: list[tuple[str, float, int, int]]) -> None:
        store.log_points(self._api, self._run, points)


def _prefix(label: str) -> str:
    """What a step's metrics begin with in the run above it: its label, without what MLflow takes in no name."""
    return re.sub(r"[^\w. -]", "_", label) + "."


def open_tracker(context: Context, experiment: str = EXPERIMENT) -> NullTracker:
    """The tracker of a step; returns at once, whatever the state of the store. No tracking URI: nothing is recorded.

    MLFLOW_RUN_ID in the environment means: adopt that run. The variable is taken out of the environment, because MLflow
    ignores any other parent while it is there.
    """
    if context.tracking_uri is None:
        return NullTracker()
    adopted = os.environ.pop("MLFLOW_RUN_ID", None) or None
    kfp_run_id = os.environ.get("LING_FLOW_KFP_RUN_ID") or None
    # The second name is for a driver that the Jobs API did not start itself.
    ray_job_id = os.environ.get("RAY_JOB_SUBMISSION_ID") or os.environ.get("LING_FLOW_RAY_JOB") or None
    return Tracker(context.tracking_uri, experiment, context.parent_run_id, adopted, kfp_run_id, ray_job_id)


def start_dag_run(
    tracking_uri: str,
    name: str,
    preset: str,
    overrides: Mapping[str, Any],
    code_version: str,
    tags: Mapping[str, str] | None = None,
    experiment: str = EXPERIMENT,
) -> str | None:
    """The run of a whole DAG run; its id, or None (and one warning) where the store is away.

    Args:
        name: what people will see in the list of runs.
        overrides: what was laid over the preset, nested.
    """
    try:
        with store.reaching(tracking_uri):
            client = store.connect(tracking_uri)
            experiment = store.experiment_id(client, experiment)
            all_tags = {**(tags or {}), "ling_flow.preset": preset, store.CODE_TAG: code_version}
            run = store.create_run(client, experiment, name, all_tags, None, store.now_ms())
            store.log_config(client, run, {"preset": preset, **overrides})
            return run
    except LingFlowError as error:
        events.emit("log", step=name, text=f"{error}; this run is not recorded")
        return None


def finish_dag_run(tracking_uri: str, run_id: str, status: str) -> bool:
    """Close the run of a DAG run, and as killed those of its steps that never came to close theirs.

    Returns:
        False where the store is away, and it can be done later. What the store refuses is told, and so settled.
    """
    try:
        with store.reaching(tracking_uri):
            client = store.connect(tracking_uri)
            _close_tree(client, run_id, status)
    except LingFlowError as error:
        events.emit("log", step="tracking", text=f"{error}; run {run_id} of this DAG stays open there")
        return not isinstance(error, SystemFault)
    return True


def finish_kfp_run(tracking_uri: str, kfp_run_id: str, status: str) -> str | None:
    """Close the run that belongs to a run of Kubeflow Pipelines, as `finish_dag_run` does; its id, None where no step
    of that run ever spoke to the store.

    Raises:
        SystemFault: the store is away. An exit handler is retried, and should be.
    """
    with store.reaching(tracking_uri):
        client = store.connect(tracking_uri)
        run_id = store.find_kfp_parent(client, store.experiment_id(client, EXPERIMENT), kfp_run_id)
        if run_id is not None:
            _close_tree(client, run_id, status)
        return run_id


def _close_tree(client: MlflowClient, run_id: str, status: str) -> None:
    experiment = client.get_run(run_id).info.experiment_id
    unfinished = f"tags.`{store.PARENT_TAG}` = '{run_id}' and attributes.status = 'RUNNING'"
    for run in client.search_runs([experiment], unfinished):
        client.set_terminated(run.info.run_id, "KILLED")
    client.set_terminated(run_id, status.upper())


def record_cached(
    tracking_uri: str,
    parent_run_id: str,
    label: str,
    component: str,
    fingerprint: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    result: Mapping[str, Any],
    made_by: str,
) -> None:
    """Record a step that was not run because its artifact was there: a child run with the same config and result.

    Args:
        inputs: input name → reference.
        made_by: version of the code that made the artifact.
    """
    try:
        with store.reaching(tracking_uri):
            client = store.connect(tracking_uri)
            experiment = client.get_run(parent_run_id).info.experiment_id
            tags = {**store.step_tags(component, fingerprint, inputs, made_by), "ling_flow.cached": "true"}
            run = store.create_run(client, experiment, label, tags, parent_run_id, store.now_ms())
            try:
                store.log_config(client, run, config)
                store.log_result(client, run, result)
                store.log_result(client, parent_run_id, result, _prefix(label))
            finally:
                client.set_terminated(run, "FINISHED")
    except LingFlowError as error:
        events.emit("log", step=label, text=f"{error}; the cached step is not recorded")


def record_cached_on_kfp(tracking_uri: str, kfp_run_id: str, label: str, manifest: Manifest) -> None:
    """The same, by the step itself, below the run of a Kubeflow run: there, no process drives the DAG.

    Whatever the store answers, the step has what it was asked for: no error leaves this function.
    """
    inputs = {name: parent.ref for name, parent in manifest.inputs.items()}
    try:
        with store.reaching(tracking_uri):
            above = store.kfp_parent(store.connect(tracking_uri), EXPERIMENT, kfp_run_id)
        record_cached(
            tracking_uri,
            above,
            label,
            manifest.component,
            manifest.fingerprint,
            manifest.config,
            inputs,
            manifest.result,
            manifest.code_version,
        )
    except Exception as error:
        events.emit("log", step=label, text=f"{error}; the cached step is not recorded")
