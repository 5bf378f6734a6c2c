"""The RayJob that runs one step: a Ray cluster of its own, which KubeRay makes, submits the job to, and takes down.

Pure functions from a job and its settings to a manifest; `ling_flow.flow.kuberay_jobs` talks to Kubernetes.

Retries are the step's and not KubeRay's (`backoffLimit: 0`): each of KubeRay's would build a whole cluster before the
step could say whether one makes sense. The operator submits over HTTP, so that no submitter pod takes part in gang
scheduling.
"""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from typing import Any

import yaml

from ling_flow.errors import UserError
from ling_flow.flow.component import Resources
from ling_flow.flow.job_settings import ClusterSettings, JobSettings
from ling_flow.flow.jobs import STOP_SECONDS, Job

API_VERSION = "ray.io/v1"
FINGERPRINT = "ling-flow/fingerprint"  # annotations
ROOT = "ling-flow/artifact-root"
STEP = "ling-flow/step"
_GIB = 2**30


@dataclass(frozen=True)
class Owner:
    """The Argo Workflow of a Kubeflow run: when it is deleted, Kubernetes deletes the job with it."""

    name: str
    uid: str


def ray_job(
    job: Job, name: str, namespace: str, image: str, settings: JobSettings, owner: Owner | None
) -> dict[str, Any]:
    """The manifest of the attempt `name`.

    Raises:
        UserError: the artifact root is a directory that no volume of the pods holds.
    """
    cluster = settings.cluster
    _check_root(job, cluster)
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "labels": {"app.kubernetes.io/part-of": "ling-flow", **cluster.labels},
        "annotations": {FINGERPRINT: job.fingerprint, ROOT: job.root, STEP: job.label},
    }
    if owner is not None:
        metadata["ownerReferences"] = [
            {
                "apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": owner.name, "uid": owner.uid,
                "controller": False, "blockOwnerDeletion": False,
            }
        ]  # fmt: skip
    spec: dict[str, Any] = {
        "submissionMode": "HTTPMode",
        "jobId": name,
        "entrypoint": job.entrypoint(name),
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}),
        "metadata": job.notes,
        "backoffLimit": 0,
        "activeDeadlineSeconds": cluster.deadline_s,
        "preRunningDeadlineSeconds": cluster.pending_deadline_s,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": cluster.ttl_s,
        "rayClusterSpec": ray_cluster(job.resources, image, cluster),
    }
    if job.reserved is not None:  # without it the job's process runs on the head
        spec["entrypointNumCpus"] = job.reserved.cpus
        if job.reserved.gpus:
            spec["entrypointNumGpus"] = job.reserved.gpus
    return {"apiVersion": API_VERSION, "kind": "RayJob", "metadata": metadata, "spec": spec}


def ray_cluster(resources: Resources, image: str, cluster: ClusterSettings) -> dict[str, Any]:
    """`rayClusterSpec`: a head that only steers and `workers` nodes of `resources`; without workers the head works."""
    alone = cluster.workers == 0
    head_start = {"dashboard-host": "0.0.0.0"}
    if not alone:
        head_start["num-cpus"] = "0"
    spec: dict[str, Any] = {
        "rayVersion": importlib.metadata.version("ray"),
        "headGroupSpec": {
            "rayStartParams": head_start,
            "template": _pod("ray-head", resources if alone else cluster.head, image, cluster, works=alone),
        },
    }
    if not alone:
        spec["workerGroupSpecs"] = [
            {
                "groupName": "workers",
                "replicas": cluster.workers,
                "minReplicas": cluster.workers,
                "maxReplicas": cluster.workers,
                "rayStartParams": {},
                "template": _pod("ray-worker", resources, image, cluster, works=True),
            }
        ]
    return spec


def image_of(cluster: ClusterSettings) -> str:
    """The image of a job's pods; the step's own where the settings name none."""
    from ling_flow.flow.kfp_face import DEFAULT_IMAGE

    return cluster.image or os.environ.get("LING_FLOW_IMAGE") or DEFAULT_IMAGE


def _pod(name: str, resources: Resources, image: str, cluster: ClusterSettings, works: bool) -> dict[str, Any]:
    """A pod template. Requests are limits: Ray plans with all that it is given."""
    amount: dict[str, str] = {"cpu": _plain(resources.cpus), "memory": f"{int(resources.memory_gib * _GIB)}"}
    if works and resources.gpus:
        amount[cluster.accelerator] = str(resources.gpus)
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": _bytes(cluster.shared_memory_gib)}}
    ]
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    for index, volume in enumerate(cluster.volumes):
        volumes.append({"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": volume.claim}})
        mounts.append({"name": f"claim-{index}", "mountPath": volume.path})
    container = {
        "name": name,
        "image": image,
        "env": [
            {"name": secret.env, "valueFrom": {"secretKeyRef": {"name": secret.secret, "key": secret.key}}}
            for secret in cluster.secrets
        ],
        "resources": {"requests": amount, "limits": amount},
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec: dict[str, Any] = {
        "containers": [container],
        "volumes": volumes,
        "automountServiceAccountToken": False,  # the job talks to no Kubernetes
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "terminationGracePeriodSeconds": STOP_SECONDS + 5,
    }
    if cluster.service_account:
        spec["serviceAccountName"] = cluster.service_account
    if works and cluster.node_selector:
        spec["nodeSelector"] = cluster.node_selector
    if works and cluster.tolerations:
        spec["tolerations"] = list(cluster.tolerations)
    return {"metadata": {"labels": {"app.kubernetes.io/part-of": "ling-flow", **cluster.labels}}, "spec": spec}


def _check_root(job: Job, cluster: ClusterSettings) -> None:
    if "://" in job.root:
        return
    inside = any(f"{job.root}/".startswith(volume.path.rstrip("/") + "/") for volume in cluster.volumes)
    if not inside:
        raise UserError(
            f"LING_FLOW_ARTIFACTS: {job.root} is a directory that a RayJob's pods do not see; give an object store "
            "(s3://…), or mount its volume (LING_FLOW_JOB: cluster.volumes)"
        )


def _plain(number: float) -> str:
    return f"{number:g}"


def _bytes(gib: float) -> str:
    return str(int(gib * _GIB))
