"""The calls to MLflow that tracking, promotion and lineage are made of.

MLflow is imported inside the functions, because that takes more than a second.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ling_flow.errors import SystemFault, UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "ling_flow"
FINGERPRINT_TAG = "ling_flow.fingerprint"
ARTIFACT_TAG = "ling_flow.artifact_uri"
CODE_TAG = "ling_flow.code_version"
PARENT_TAG = "mlflow.parentRunId"
KFP_TAG = "ling_flow.kfp_run_id"
RAY_TAG = "ling_flow.ray_job_id"

_PARAM_LIMIT = 6000  # characters of a run parameter; MLflow cuts off the rest
_TAG_LIMIT = 5000  # characters of a run tag
_PARAMS_PER_CALL = 100
_SETTLE_SECONDS = 2.0  # longer than it takes from looking for a run to having made one
REFUSED = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
_PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "IO_ERROR")


def default_tracking_uri(home: Path) -> str:
    """The store used where nobody names one: SQLite in the home directory."""
    return f"sqlite:///{home.absolute()}/mlflow.db"


def connect(tracking_uri: str) -> MlflowClient:
    """A quiet and impatient client of the store at `tracking_uri`; for SQLite the first call makes the database."""
    # MLflow reads these at import or at each request; what the user set wins.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient

    with _alone(tracking_uri):
        return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


@contextmanager
def _alone(tracking_uri: str) -> Iterator[None]:
    """One process at a time where the store is an SQLite file: MLflow makes its tables without a lock."""
    scheme, _, database = tracking_uri.partition(":///")
    if scheme != "sqlite" or not database:
        yield
        return
    Path(database).parent.mkdir(parents=True, exist_ok=True)  # as MLflow does
    with Path(f"{database}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def passing(error: Exception) -> bool:
    """Whether the same call may succeed later: the store is away or busy, rather than of another opinion."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):
        return error.error_code in _PASSING
    return isinstance(error, OSError | OperationalError)


def missing(error: Exception) -> bool:
    """Whether the store says that the thing asked for is not there."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def settled(call: Callable[..., object], *arguments: str) -> None:
    """Make a call that sets a tag or an alias, again where another process set the same one at this moment.

    MLflow looks for the row, then inserts it; the loser of such a race gets the database's complaint.
    """
    from mlflow.exceptions import MlflowException

    for tries_left in (2, 1, 0):
        try:
            call(*arguments)
            return
        except MlflowException as error:
            raced = any(words in str(error) for words in ("UNIQUE constraint", "duplicate key"))
            if not (raced and tries_left):
                raise


@contextmanager
def reaching(tracking_uri: str) -> Iterator[None]:
    """
    Raises:
        SystemFault: the store is away or busy.
        UserError: it refuses; the message names the variables.
    """
    try:
        yield
    except Exception as error:
        from mlflow.exceptions import MlflowException

        reason = " ".join(str(error).split())[:200]
        if passing(error):
            raise SystemFault(f"tracking store {tracking_uri} cannot be used ({reason})") from error
        if not isinstance(error, MlflowException):
            raise
        if error.error_code in REFUSED:
            raise UserError(
                f"MLFLOW_TRACKING_URI {tracking_uri}: refuses the credentials; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) to valid ones"
            ) from None
        if "Invalid Host header" in reason:  # told with the status of a missing permission
            raise UserError(
                f"MLFLOW_TRACKING_URI {tracking_uri}: the server takes no requests under that name; use one of its "
                "MLFLOW_SERVER_ALLOWED_HOSTS, or add this one there"
            ) from None
        if error.error_code == "PERMISSION_DENIED":
            user = os.environ.get("MLFLOW_TRACKING_USERNAME", "this user")
            raise UserError(f"MLFLOW_TRACKING_URI {tracking_uri}: {user} may not do that there ({reason})") from None
        raise UserError(f"MLFLOW_TRACKING_URI {tracking_uri}: refuses ({reason})") from None


def experiment_id(client: MlflowClient, name: str) -> str:
    """Id of the experiment `name`, made if it is not there; SQLite keeps its artifacts in `mlartifacts` beside it."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        scheme, _, database = client.tracking_uri.partition(":///")
        location = (Path(database).absolute().parent / "mlartifacts").as_uri() if scheme == "sqlite" else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was first
                raise
            found = client.get_experiment_by_name(name)
    assert found is not None
    return str(found.experiment_id)


def create_run(
    client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str], parent: str | None, started: int
) -> str:
    """Start a run in experiment id `experiment`, below run id `parent`; `started` in ms since the epoch. Its id."""
    tags = {**tags, PARENT_TAG: parent} if parent else dict(tags)
    return str(client.create_run(experiment, start_time=started, tags=tags, run_name=name).info.run_id)


def find_kfp_parent(client: MlflowClient, experiment: str, kfp_run_id: str) -> str | None:
    """Id of the run that stands for a run of Kubeflow Pipelines; of several the oldest."""
    condition = f"tags.`{KFP_TAG}` = '{kfp_run_id}' and tags.`ling_flow.dag_run` = 'true'"
    found = client.search_runs([experiment], condition)
    return min(((run.info.start_time, run.info.run_id) for run in found), default=(0, None))[1]


def kfp_parent(client: MlflowClient, experiment_name: str, kfp_run_id: str) -> str:
    """The same, made where it is not there. Steps that make it at once agree on the oldest; the others are deleted."""
    experiment = experiment_id(client, experiment_name)
    found = find_kfp_parent(client, experiment, kfp_run_id)
    if found is not None:
        return found
    tags = {KFP_TAG: kfp_run_id, "ling_flow.dag_run": "true"}
    made = create_run(client, experiment, os.environ.get("LING_FLOW_KFP_RUN_NAME") or kfp_run_id, tags, None, now_ms())
    # Clocks differ, so the oldest is not always the first to be seen: all must have been made before one is chosen.
    time.sleep(_SETTLE_SECONDS)
    chosen = find_kfp_parent(client, experiment, kfp_run_id)
    if chosen is None or chosen == made:
        return made
    client.delete_run(made)
    return chosen


def platform_tags(kfp_run_id: str | None, ray_job_id: str | None) -> dict[str, str]:
    """Tags that lead from a run to the platform that ran it."""
    given = {KFP_TAG: kfp_run_id, RAY_TAG: ray_job_id}
    return {name: value for name, value in given.items() if value}


def step_tags(component: str, fingerprint: str, inputs: Mapping[str, str], code_version: str) -> dict[str, str]:
    """The tags of a step's run; `inputs` maps input name → reference."""
    references = {f"ling_flow.input.{name}": ref for name, ref in inputs.items()}
    return {"ling_flow.component": component, FINGERPRINT_TAG: fingerprint, CODE_TAG: code_version, **references}


def log_config(client: MlflowClient, run_id: str, config: Mapping[str, Any]) -> None:
    """A config as run parameters with dotted names, and whole as the artifact `config.json`."""
    from mlflow.entities import Param

    params = [Param(name, text) for name, text in flatten(config).items()]
    for start in range(0, len(params), _PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[start : start + _PARAMS_PER_CALL])
    client.log_dict(run_id, dict(config), "config.json")


def log_points(client: MlflowClient, run_id: str, points: list[tuple[str, float, int, int]]) -> None:
    """Metrics as (name, value, milliseconds since the epoch, step)."""
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(*point) for point in points])


def log_result(client: MlflowClient, run_id: str, result: Mapping[str, Any], prefix: str = "") -> None:
    """A step's result: numbers as metrics `<prefix><field>`, the rest as tags `ling_flow.result.<prefix><field>`."""
    from mlflow.entities import Metric, RunTag

    now = now_ms()
    metrics, tags = [], []
    for name, value in result.items():
        if isinstance(value, int | float):
            metrics.append(Metric(prefix + name, float(value), now, 0))
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            tags.append(RunTag(f"ling_flow.result.{prefix}{name}", text[:_TAG_LIMIT]))
    client.log_batch(run_id, metrics=metrics, tags=tags)


def log_dataset(client: MlflowClient, run_id: str, name: str, source: str, digest: str, context: str) -> None:
    """A dataset as an input of the run; MLflow keeps 36 characters of the digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind = source.partition("://")[0] if "://" in source else "local"
    dataset = Dataset(name, digest[:36], kind, json.dumps({"uri": source}))
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])


def log_model(
    client: MlflowClient,
    experiment: str,
    run_id: str | None,
    name: str,
    path: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
) -> str:
    """A READY LoggedModel whose files stay at `path`, as an output of the run; its id (`m-…`)."""
    from mlflow.entities import LoggedModelOutput

    # `mlflow.create_external_model` does the same through MLflow's global state, which is not ours to change.
    model = client._create_logged_model(
        experiment,
        name=name,
        source_run_id=run_id,
        tags={**tags, ARTIFACT_TAG: path, "mlflow.model.isExternal": "true"},
        params=flatten(params),
        flavor="external",
    )
    client.finalize_logged_model(model.model_id, "READY")
    if run_id is not None:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return str(model.model_id)


def find_model(client: MlflowClient, experiment: str, path: str) -> str | None:
    """Id of the LoggedModel that the producing step made for the model at `path`."""
    found = client.search_logged_models([experiment], f"tags.`{ARTIFACT_TAG}` = '{path}'", max_results=1)
    return str(found[0].model_id) if found else None


def log_model_input(client: MlflowClient, experiment: str, run_id: str, path: str) -> None:
    """The LoggedModel of the model at `path`, if there is one, as an input of the run."""
    from mlflow.entities import LoggedModelInput

    model_id = find_model(client, experiment, path)
    if model_id is not None:
        client.log_inputs(run_id, models=[LoggedModelInput(model_id)])


@contextmanager
def default_store(tracking_uri: str) -> Iterator[None]:
    """Make `tracking_uri` MLflow's own default: its SQL registry looks LoggedModels up there, whatever client asks."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mapping → dotted name → text; lists as JSON; cut at MLflow's limit."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[f"{prefix}{name}"] = text[:_PARAM_LIMIT]
    return flat


def now_ms() -> int:
    """Milliseconds since the epoch, MLflow's unit of time."""
    return int(time.time() * 1000)
