"""A profile: where and how the steps of a DAG run on Kubeflow Pipelines, read from YAML (infra/profiles/).

Nothing in it bears identity and nothing in it says what is trained. Secrets are named, never held: their values are put
into a step's environment by Kubernetes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field

from ling_flow.config import StrictModel, merge, parse, read_yaml
from ling_flow.errors import UserError
from ling_flow.flow.component import Component, Resources
from ling_flow.flow.context import RunOn
from ling_flow.flow.job_settings import ClaimMount, JobSettings, SecretEnv
from ling_flow.redact import has_password, secret_name

SCRATCH = "/scratch"  # where a step's home is
LAUNCHER = Resources(cpus=0.5, memory_gib=1)  # of a pod that only starts a Ray job and waits for it
_SECRETS = "keep it in a Kubernetes secret and name that under secrets"
_RESERVED = ("LING_FLOW_", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "RAY_ADDRESS")


class Toleration(StrictModel):
    """A taint that pods may bear; the fields are Kubernetes' own."""

    key: str = Field(description="Key of the taint")
    operator: Literal["Equal", "Exists"] = Field("Equal", description="Exists: any value")
    value: str | None = Field(None, description="Value of the taint, with Equal")
    effect: Literal["NoExecute", "NoSchedule", "PreferNoSchedule"] | None = Field(None, description="null: all effects")


class Retries(StrictModel):
    """How often Kubeflow starts a failed step again. A step goes on from its last checkpoint."""

    count: int = Field(2, ge=0, le=100, description="Tries after the first")
    wait_s: int = Field(30, ge=0, description="Before the first of them, seconds")
    factor: float = Field(2, ge=1, description="Each further wait is so many times longer")

    def window_s(self, timeout_s: int) -> int:
        """No try is begun later than this after the first one's beginning, seconds: room for all of them.

        Argo counts its limit from there and KFP's default is an hour, after which a longer step would not be retried.
        """
        waits = sum(self.wait_s * self.factor**index for index in range(self.count))
        return (self.count + 1) * timeout_s + round(waits)


class StepSettings(StrictModel):
    """How a step runs; for one component, what is given here is laid over `steps`."""

    image: str | None = Field(None, description="Image with this package, best by digest; null: the profile's")
    resources: Resources | None = Field(None, description="Requests and limits; null: what the component declares")
    accelerator: str = Field("nvidia.com/gpu", description="Kubernetes' name of the GPU resource")
    node_selector: dict[str, str] = Field({}, description="Labels that the node must have")
    tolerations: tuple[Toleration, ...] = Field((), description="Taints that the pod tolerates")
    env: dict[str, str] = Field({}, description="Plain variables; never a secret")
    secrets: tuple[SecretEnv, ...] = Field((), description="Variables from Kubernetes secrets")
    shared_memory_gib: float | None = Field(None, gt=0, description="/dev/shm in memory, GiB; null: the node's 64 MiB")
    scratch_gib: float = Field(20, gt=0, description="Limit of the step's home on the node's disk, GiB")
    retries: Retries = Field(Retries(), description="After a failure of the system; wrong configs fail before")
    timeout_s: int = Field(7 * 24 * 3600, gt=0, description="Longest life of one try, seconds")
    run_on: RunOn = Field("process", description="process: in the step's pod; ray-job: at ray_address; rayjob: KubeRay")
    ray_address: str | None = Field(None, pattern=r"^https?://", description="Ray job server, with ray-job")
    job: JobSettings = Field(JobSettings(), description="Of Ray jobs; what is set above is put into it")


class KfpSettings(StrictModel):
    """The Kubeflow Pipelines server and what a run is there."""

    host: str | None = Field(None, pattern=r"^https?://", description="URL of its API; --host and KFP_HOST win")
    namespace: str | None = Field(None, description="Of the user, where the server has several users")
    experiment: str = Field("ling_flow", description="Where runs are listed; made when missing")
    service_account: str | None = Field(None, description="Of the run's pods; null: Kubeflow's default")
    pipeline_root: str | None = Field(None, description="For Kubeflow's own small artifacts; null: the server's")
    ttl_s: int | None = Field(None, ge=0, description="A finished workflow is deleted after so long, seconds")
    deadline_s: int | None = Field(None, gt=0, description="Longest life of a whole run, seconds")


class Profile(StrictModel):
    """Where a DAG runs."""

    image: str = Field(description="Image with this package, best by digest")
    pull_secrets: tuple[str, ...] = Field((), description="Names of the registry's secrets")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field("IfNotPresent", description="Kubernetes' policy")
    kfp: KfpSettings = Field(KfpSettings(), description="The server, and what a run is there")
    artifacts: str = Field(description="Artifact root: an object store (s3://…) or a directory on one of `volumes`")
    mlflow: str | None = Field(None, description="Tracking URI as seen by the pods; null: no tracking")
    exit_handler: bool = Field(True, description="A last task closes the run in MLflow, whatever became of the others")
    run_as_user: int | None = Field(1000, ge=1, description="User id of the steps; null: the image's")
    volumes: tuple[ClaimMount, ...] = Field((), description="Claims mounted into every step")
    steps: StepSettings = Field(StepSettings(), description="How every step runs")
    components: dict[str, dict[str, Any]] = Field({}, description="By component: what differs from `steps`")

    def of(self, component: Component) -> StepSettings:
        """How a step of `component` runs: the profile's steps with the component's own laid over.

        Secrets of the component are added to those of all steps; other lists are replaced.
        """
        base = self.steps.model_dump(mode="json", exclude_unset=True)
        own = self.components.get(component.name, {})
        settings = parse(StepSettings, merge(base, own), f"components.{component.name}")
        secrets = {secret.env: secret for secret in (*self.steps.secrets, *settings.secrets)}
        if component.runs_on == "process":
            settings = settings.model_copy(update={"run_on": "process"})
        return settings.model_copy(
            update={
                "secrets": tuple(secrets.values()),
                "image": settings.image or self.image,
                "resources": settings.resources or component.resources,
            }
        )

    def environment(self, settings: StepSettings) -> dict[str, str]:
        """The plain variables of a step."""
        given = {
            **settings.env,
            "LING_FLOW_HOME": SCRATCH,
            "LING_FLOW_ARTIFACTS": self.artifacts,
            "LING_FLOW_IMAGE": str(settings.image),
            "LING_FLOW_RUN_ON": settings.run_on,
        }
        if self.mlflow:
            given["MLFLOW_TRACKING_URI"] = self.mlflow
        if settings.ray_address:
            given["RAY_ADDRESS"] = settings.ray_address
        # A step that runs in its pod looks for its RayService in the namespace that is named here (deploy).
        if settings.run_on != "process" or settings.job.cluster.namespace:
            given["LING_FLOW_JOB"] = self._job(settings)
        return given

    def pod_resources(self, settings: StepSettings) -> Resources:
        """What the step's own pod asks for: next to nothing where a Ray job does the work."""
        assert settings.resources is not None
        return settings.resources if settings.run_on == "process" else LAUNCHER

    def _job(self, settings: StepSettings) -> str:
        """LING_FLOW_JOB: the pods of a RayJob are given what the step's pod would have been given."""
        tolerations = [one.model_dump(mode="json", exclude_none=True) for one in settings.tolerations]
        cluster: dict[str, Any] = {
            "image": settings.image,
            "accelerator": settings.accelerator,
            "node_selector": settings.node_selector,
            "tolerations": tolerations,
            "secrets": [secret.model_dump() for secret in settings.secrets],
            "volumes": [volume.model_dump() for volume in self.volumes],
            "deadline_s": settings.timeout_s,
        }
        if settings.shared_memory_gib is not None:
            cluster["shared_memory_gib"] = settings.shared_memory_gib
        assert settings.resources is not None
        derived = {"resources": settings.resources.model_dump(), "env": settings.env, "cluster": cluster}
        job = merge(derived, settings.job.model_dump(mode="json", exclude_unset=True))
        return json.dumps(job, sort_keys=True)


def read_profile(name: str) -> Profile:
    """A profile by path, or `local` for infra/profiles/local.yaml.

    Raises:
        UserError: there is none, or something in it is wrong; one line that names the file and the field.
    """
    path = _find(name)
    profile = parse(Profile, read_yaml(path), str(path))
    _check(profile, path)
    return profile


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    places = [Path.cwd() / "infra" / "profiles", Path(__file__).parents[2] / "infra" / "profiles"]
    for place in places:
        if (place / f"{name}.yaml").is_file():
            return place / f"{name}.yaml"
    known = sorted({path.stem for place in places for path in place.glob("*.yaml")})
    raise UserError(f"--profile {name}: not found; known: {', '.join(known) or 'none here'}, or a path to a .yaml file")


def _check(profile: Profile, path: Path) -> None:
    """What the fields' types cannot say."""
    layers = {"steps": profile.steps}
    for name, own in profile.components.items():
        where = f"{path}.components.{name}"
        parse(StepSettings, own, where)  # for an error that names the component's own field
        merged = merge(profile.steps.model_dump(mode="json", exclude_unset=True), own)
        layers[f"components.{name}"] = parse(StepSettings, merged, where)
    for name in ("mlflow", "artifacts"):
        if has_password(getattr(profile, name) or ""):
            raise UserError(
                f"{path}.{name}: user and password would be readable by all who see the pipeline; {_SECRETS}"
            )
    for layer, settings in layers.items():
        where = f"{path}.{layer}"
        if has_password(settings.ray_address or ""):
            raise UserError(f"{where}.ray_address: user and password would be readable by all; {_SECRETS}")
        _check_variables(settings, where)
        if settings.run_on == "ray-job" and not settings.ray_address:
            raise UserError(f"{where}.ray_address: is needed with run_on: ray-job, like http://HOST:8265")
        for toleration in settings.tolerations:
            if toleration.operator == "Exists" and toleration.value is not None:
                raise UserError(f"{where}.tolerations: {toleration.key}: with operator Exists there is no value")
    if "://" not in profile.artifacts and not _on_volume(profile.artifacts, profile.volumes):
        raise UserError(
            f"{path}.artifacts: {profile.artifacts} is a directory on none of the volumes; give an object store "
            "(s3://…) or mount its claim (volumes)"
        )
    if profile.mlflow and profile.mlflow.startswith(("sqlite:", "file:", "/")):
        raise UserError(f"{path}.mlflow: must be a server's URL (http://…); pods share no database file")


def _check_variables(settings: StepSettings, where: str) -> None:
    secret = {one.env for one in settings.secrets}
    for field, given in (("env", settings.env), ("job.env", settings.job.env)):
        for name, value in given.items():
            if name.startswith(_RESERVED):
                raise UserError(f"{where}.{field}.{name}: is set by the profile's own fields")
            if name in secret:
                raise UserError(f"{where}.{field}.{name}: comes from a secret already")
            if secret_name(name) or has_password(value):
                raise UserError(f"{where}.{field}.{name}: would be readable by all who see the pipeline; {_SECRETS}")


def _on_volume(directory: str, volumes: Iterable[ClaimMount]) -> bool:
    path = PurePosixPath(directory)
    return path.is_absolute() and any(path.is_relative_to(volume.path) for volume in volumes)
