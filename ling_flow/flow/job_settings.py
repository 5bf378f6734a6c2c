"""How a step's Ray jobs are run: what the environment's LING_FLOW_JOB holds as JSON, and a cluster profile as YAML.

None of it bears identity. Secrets are named here, their values never are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from ling_flow.config import StrictModel
from ling_flow.flow.component import Resources


class SecretEnv(StrictModel):
    """An environment variable whose value Kubernetes takes from a secret."""

    env: str = Field(description="Name of the variable")
    secret: str = Field(description="Name of the Secret")
    key: str = Field(description="Key in the Secret")


class ClaimMount(StrictModel):
    """A volume that all pods of a job see."""

    claim: str = Field(description="Name of a PersistentVolumeClaim, ReadWriteMany where there are several nodes")
    path: str = Field(description="Where it is mounted")


class ClusterSettings(StrictModel):
    """The Ray cluster that KubeRay makes for one job."""

    namespace: str | None = Field(None, description="Kubernetes namespace; null: that of the step's own pod")
    image: str | None = Field(None, description="Image with this package; null: LING_FLOW_IMAGE")
    workers: int = Field(1, ge=0, description="Worker nodes beside the head; 0: the head does the work")
    head: Resources = Field(Resources(cpus=2, memory_gib=8), description="Of a head that does no work")
    accelerator: str = Field("nvidia.com/gpu", description="Kubernetes' name of the GPU resource")
    node_selector: dict[str, str] = Field({}, description="Labels of the nodes for the pods that work")
    tolerations: tuple[dict[str, Any], ...] = Field((), description="Kubernetes tolerations of the pods that work")
    service_account: str | None = Field(None, description="Of the job's pods; null: the namespace's default")
    secrets: tuple[SecretEnv, ...] = Field((), description="Variables from secrets, for every pod of the job")
    volumes: tuple[ClaimMount, ...] = Field((), description="Shared volumes, for every pod of the job")
    shared_memory_gib: float = Field(2, gt=0, description="/dev/shm of each pod, where Ray keeps its objects, GiB")
    labels: dict[str, str] = Field({}, description="Labels of the job and its pods, for queues (Kueue) and people")
    deadline_s: int = Field(7 * 24 * 3600, gt=0, description="Longest life of the job, seconds")
    pending_deadline_s: int = Field(3600, gt=0, description="Longest wait until the job runs (GPUs, images), seconds")
    ttl_s: int = Field(3600, ge=0, description="A finished job's cluster is kept for so long, seconds")


class JobSettings(StrictModel):
    """LING_FLOW_JOB."""

    resources: Resources | None = Field(
        None, description="Of one job: reserved at a Ray address, of each working node under KubeRay; null: declared"
    )
    env: dict[str, str] = Field({}, description="Variables of the job; readable by all who see the cluster, no secrets")
    working_dir: Path | None = Field(
        None, description="ray-job: directory uploaded as the job's code, for development; null: the image's"
    )
    patience_s: float = Field(120, gt=0, description="A job server may be away for so long, seconds")
    heartbeat_s: float | None = Field(
        3600, gt=0, description="A running job without output or change of state for so long has failed; null: never"
    )
    cluster: ClusterSettings = Field(ClusterSettings(), description="rayjob: the cluster made for the job")
