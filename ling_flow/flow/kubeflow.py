"""Kubeflow Pipelines over its published API (v2beta1): upload a compiled DAG, run it, follow it, list runs.

The generated client `kfp_server_api` is called directly. `kfp.Client` above it prints, keeps a context file in the home
directory, has no time limits, and waits for ever for a run that was canceled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ling_flow.errors import LingFlowError, SystemFault, UserError
from ling_flow.flow.identity import code_version

POLL_SECONDS = 5.0
PATIENCE_SECONDS = 300.0  # a server may be away for so long while a run is followed
REQUEST_SECONDS = (10, 60)  # to connect, and for an answer
ENDED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
TOKEN = "KFP_TOKEN"
_PAGE = 100


class RunFailed(LingFlowError):
    """The run ended without having succeeded."""


class RunCanceled(LingFlowError):
    """Somebody ended the run."""

    exit_code = 130  # that of an interrupted local run


@dataclass(frozen=True)
class Run:
    """A run as people see it; `state` is KFP's, `created` and `finished` are ISO 8601 texts, "" where unknown."""

    run_id: str
    name: str
    state: str
    link: str
    experiment_id: str
    created: str = ""
    finished: str = ""
    error: str = ""


@dataclass(frozen=True)
class Submitted:
    """What was made on the server for a run."""

    run: Run
    pipeline: str
    version: str
    experiment: str


class Kubeflow:
    """The server at `host`."""

    def __init__(self, host: str, namespace: str | None = None, token: str | None = None) -> None:
        """
        Raises:
            UserError: `host` is no URL, the server wants a (better) token, or is no server of Kubeflow Pipelines.
            SystemFault: nobody answers there.
        """
        import kfp_server_api as api

        if not re.match(r"https?://[^/]", host):
            raise UserError(f"--host: must be the URL of Kubeflow Pipelines, like http://HOST:8080; got '{host}'")
        self.host = host.rstrip("/").removesuffix("/#").removesuffix("/apis/v2beta1")
        self.namespace = namespace
        configuration = api.Configuration(host=self.host)
        configuration.retries = False  # ours are by the clock
        if os.environ.get("SSL_CERT_FILE"):
            configuration.ssl_ca_cert = os.environ["SSL_CERT_FILE"]
        if token:
            configuration.api_key["authorization"] = token
            configuration.api_key_prefix["authorization"] = "Bearer"
        client = api.ApiClient(configuration)
        self._api = api
        self._runs = api.RunServiceApi(client)
        self._experiments = api.ExperimentServiceApi(client)
        self._pipelines = api.PipelineServiceApi(client)
        self._uploads = api.PipelineUploadServiceApi(client)
        with self._errors(""):
            # As it comes: the generated client would take a login page for an answer without fields.
            answer = api.HealthzServiceApi(client).healthz_service_get_healthz(
                _preload_content=False, _request_timeout=REQUEST_SECONDS
            )
            if not isinstance(json.loads(answer.data), dict):
                raise ValueError("no object")

    def submit(
        self,
        package: Path,
        pipeline: str,
        arguments: Mapping[str, Any],
        experiment: str,
        name: str,
        service_account: str | None = None,
        pipeline_root: str | None = None,
    ) -> Submitted:
        """Upload a compiled DAG as a version of `pipeline`, where it is not there yet, and start a run of it.

        Args:
            name: of the run.
        """
        version_name = version_of(package)
        pipeline_id = self._pipeline(pipeline)
        version_id = self._version(package, pipeline, pipeline_id, version_name)
        experiment_id = self._experiment(experiment, make=True)
        body = self._api.V2beta1Run(
            experiment_id=experiment_id,
            display_name=name,
            pipeline_version_reference=self._api.V2beta1PipelineVersionReference(
                pipeline_id=pipeline_id, pipeline_version_id=version_id
            ),
            runtime_config=self._api.V2beta1RuntimeConfig(parameters=dict(arguments), pipeline_root=pipeline_root),
            service_account=service_account,
        )
        made = self._call(f"run {name}", self._runs.run_service_create_run, body)
        return Submitted(self._run(made), pipeline, version_name, experiment)

    def wait(self, run: Run, told: Callable[[str], None]) -> Run:
        """Follow a run to its end; `told` is given one line for each change.

        Raises:
            SystemFault: the server is away for longer than five minutes. The run may go on.
        """
        said: dict[str, str] = {}
        answered = time.monotonic()
        while True:
            try:
                now = self._call(f"run {run.run_id}", self._runs.run_service_get_run, run.run_id)
            except SystemFault:
                if time.monotonic() - answered > PATIENCE_SECONDS:
                    raise
            else:
                answered = time.monotonic()
                for line in _changes(now, said):
                    told(line)
                if now.state in ENDED:
                    return self._run(now)
            time.sleep(POLL_SECONDS)

    def runs(self, experiment: str | None, limit: int) -> list[Run]:
        """The newest runs first.

        Raises:
            UserError: there is no such experiment.
        """
        given: dict[str, Any] = {"sort_by": "created_at desc", "page_size": min(limit, _PAGE)}
        if experiment is not None:
            given["experiment_id"] = self._experiment(experiment, make=False)
        elif self.namespace:
            given["namespace"] = self.namespace
        found: list[Run] = []
        while len(found) < limit:
            page = self._call("runs", self._runs.run_service_list_runs, **given)
            found += [self._run(one) for one in page.runs or ()]
            if not page.next_page_token:
                break
            given["page_token"] = page.next_page_token
        return found[:limit]

    def _pipeline(self, name: str) -> str:
        def find() -> str | None:
            page = self._call(
                f"pipeline {name}", self._pipelines.pipeline_service_list_pipelines,
                filter=_named(name), **self._scope(),
            )  # fmt: skip
            return str(page.pipelines[0].pipeline_id) if page.pipelines else None

        def make() -> str:
            body = self._api.V2beta1Pipeline(display_name=name, namespace=self.namespace)
            made = self._call(f"pipeline {name}", self._pipelines.pipeline_service_create_pipeline, body)
            return str(made.pipeline_id)

        return _found_or_made(find, make)

    def _version(self, package: Path, pipeline: str, pipeline_id: str, name: str) -> str:
        where = f"pipeline {pipeline}, version {name}"

        def find() -> str | None:
            page = self._call(
                where, self._pipelines.pipeline_service_list_pipeline_versions, pipeline_id, filter=_named(name)
            )
            return str(page.pipeline_versions[0].pipeline_version_id) if page.pipeline_versions else None

        def make() -> str:
            made = self._call(
                where, self._uploads.upload_pipeline_version, str(package), name=name, pipelineid=pipeline_id
            )
            return str(made.pipeline_version_id)

        return _found_or_made(find, make)

    def _experiment(self, name: str, make: bool) -> str:
        def find() -> str | None:
            page = self._call(
                f"experiment {name}", self._experiments.experiment_service_list_experiments,
                filter=_named(name), **self._scope(),
            )  # fmt: skip
            return str(page.experiments[0].experiment_id) if page.experiments else None

        def create() -> str:
            if not make:
                raise UserError(f"--experiment {name}: there is none of that name at {self.host}")
            body = self._api.V2beta1Experiment(display_name=name, namespace=self.namespace)
            made = self._call(f"experiment {name}", self._experiments.experiment_service_create_experiment, body)
            return str(made.experiment_id)

        return _found_or_made(find, create)

    def _scope(self) -> dict[str, str]:
        return {"namespace": self.namespace} if self.namespace else {}

    def _run(self, run: Any) -> Run:
        return Run(
            run_id=run.run_id,
            name=run.display_name,
            state=run.state or "PENDING",
            link=f"{self.host}/#/runs/details/{run.run_id}",
            experiment_id=run.experiment_id or "",
            created=run.created_at.isoformat() if run.created_at else "",
            finished=run.finished_at.isoformat() if run.finished_at and run.state in ENDED else "",
            error=(run.error.message or "") if run.error else "",
        )

    def _call(self, what: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with self._errors(what):
            return call(*arguments, **named, _request_timeout=REQUEST_SECONDS)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        from urllib3.exceptions import HTTPError

        where = f"Kubeflow Pipelines at {self.host}"
        about = f"{what}: " if what else ""
        try:
            yield
        except self._api.ApiException as error:
            said = _message(error)
            if error.status in (401, 403):
                hint = f"set {TOKEN} to a token of yours" if error.status == 401 else f"is {TOKEN} the right one?"
                raise UserError(f"{about}{where} refuses ({error.status} {said}); {hint}") from None
            if error.status == 409:
                raise _Exists(f"{about}{where}: {said}") from None
            if error.status == 404 and not what:
                raise UserError(f"--host: nothing at {self.host} speaks KFP's API; the URL ends before /apis") from None
            if error.status is not None and 400 <= error.status < 500 and error.status not in (408, 429):
                raise UserError(f"{about}{where} refuses ({error.status} {said})") from None
            raise SystemFault(f"{about}{where} failed ({error.status} {said})") from None
        except (HTTPError, OSError) as error:
            raise SystemFault(f"{about}{where} does not answer ({_reason(error)})") from None
        except (ValueError, TypeError) as error:  # no JSON, or not of the published form: a login page, for example
            raise UserError(
                f"{about}{self.host} answers, but not as KFP's API does ({_reason(error)}); is it a login page? "
                f"set {TOKEN}, or give the URL of the API"
            ) from None


class _Exists(SystemFault):
    """Somebody else has made it since we looked."""


def version_of(package: Path) -> str:
    """The name of a pipeline's version: code version and digest of the compiled file."""
    digest = hashlib.sha256(package.read_bytes()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', code_version())}-{digest}"


def _found_or_made(find: Callable[[], str | None], make: Callable[[], str]) -> str:
    found = find()
    if found is not None:
        return found
    try:
        return make()
    except _Exists:
        found = find()
        if found is None:
            raise
        return found


def _named(name: str) -> str:
    """KFP's filter for an exact name."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _changes(run: Any, said: dict[str, str]) -> Iterator[str]:
    """One line for the run and each of its tasks whose state is not the one in `said`."""
    details = run.run_details.task_details if run.run_details else None
    for task in details or ():
        name, state = task.display_name or "", task.state or ""
        if not state or name.endswith("-driver") or name in ("root", "executor") or said.get(task.task_id) == state:
            continue
        said[task.task_id] = state
        error = f": {task.error.message}" if task.error and task.error.message else ""
        yield f"{name} {state.lower()}{error}"
    state = run.state or "PENDING"
    if said.get("") != state:
        said[""] = state
        yield f"run {run.display_name} {state.lower()}"


def _message(error: Any) -> str:
    """What the server says, without its headers."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body or ""
    try:
        content = json.loads(body)
        body = content.get("message") or content.get("error_message") or content.get("error") or body
    except (ValueError, AttributeError):
        pass
    text = " ".join(str(body).split())
    return (text if text and not text.startswith("<") else str(error.reason))[:300]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
