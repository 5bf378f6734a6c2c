"""RayJobs: manifests against the structure of KubeRay's CRDs, and their life against a stand-in for Kubernetes' API.

No Kubernetes runs here: what KubeRay would do is what the tests say it did. `test_ray_jobs.py` lets such a manifest's
command run on a real Ray.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy.draw import DrawConfig, draw

from ling_flow.errors import SystemFault, UserError
from ling_flow.flow import kuberay_jobs
from ling_flow.flow.component import Resources
from ling_flow.flow.context import Context
from ling_flow.flow.job_settings import ClaimMount, ClusterSettings, JobSettings, SecretEnv
from ling_flow.flow.jobs import Ended, Job, JobOutput, failure, job_of
from ling_flow.flow.kube_api import Kubernetes
from ling_flow.flow.kuberay import FINGERPRINT, Owner, ray_job
from ling_flow.flow.step import identify, run_step
from tests.flow.kubernetes_api import KubernetesStandIn
from tests.infra.schemas import kuberay_errors

pytestmark = pytest.mark.usefixtures("home")

FULL = JobSettings(
    resources=Resources(cpus=8, memory_gib=64, gpus=8),
    heartbeat_s=None,
    cluster=ClusterSettings(
        namespace="team",
        image="registry/ling-flow:1",
        workers=2,
        node_selector={"gpu": "h100"},
        tolerations=({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},),
        service_account="ray",
        secrets=(SecretEnv(env="AWS_SECRET_ACCESS_KEY", secret="s3", key="secret-key"),),
        volumes=(ClaimMount(claim="scratch", path="/scratch"),),
        labels={"kueue.x-k8s.io/queue-name": "training"},
    ),
)


def job(root: str = "s3://bucket/artifacts", settings: JobSettings = FULL) -> Job:
    context = Context.from_environment()
    return job_of(identify(draw, DrawConfig(), {}, root, context), context, settings, rebuild=False)


def manifest(made: Job | None = None, settings: JobSettings = FULL, owner: Owner | None = None) -> dict[str, Any]:
    made = made or job(settings=settings)
    return ray_job(made, made.name(1), "team", settings.cluster.image or "image", settings, owner)


def check(made: dict[str, Any]) -> None:
    assert kuberay_errors(made) == []


@pytest.mark.parametrize("settings", [FULL, JobSettings(), JobSettings(cluster=ClusterSettings(workers=0))])
def test_the_manifest_has_the_structure_of_the_crd(settings: JobSettings) -> None:
    check(manifest(settings=settings, owner=Owner("run-x", "0-1")))
    broken = manifest(settings=settings)
    broken["spec"]["rayClusterSpec"]["headGroupSpec"]["tempalte"] = {}
    with pytest.raises(AssertionError, match="tempalte"):
        check(broken)


def test_what_the_manifest_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
    made = manifest(owner=Owner("run-x", "0-1"))
    spec, cluster = made["spec"], made["spec"]["rayClusterSpec"]
    assert "topsecret" not in json.dumps(made)
    assert (
        made["metadata"]["ownerReferences"][0] | {"uid": "0-1", "kind": "Workflow"}
        == (made["metadata"]["ownerReferences"][0])
    )
    assert (spec["submissionMode"], spec["backoffLimit"], spec["jobId"]) == ("HTTPMode", 0, made["metadata"]["name"])
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] == 3600
    assert (spec["activeDeadlineSeconds"], spec["preRunningDeadlineSeconds"]) == (7 * 24 * 3600, 3600)
    assert (spec["entrypointNumCpus"], spec["entrypointNumGpus"]) == (8, 8)
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"  # a head without GPUs, which nothing waits for
    assert (workers["replicas"], workers["maxReplicas"]) == (2, 2)
    pod = workers["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": str(64 * 2**30), "nvidia.com/gpu": "8"}
    assert container["env"] == [
        {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "secret-key"}}}
    ]
    assert pod["nodeSelector"] == {"gpu": "h100"} and "nodeSelector" not in head["template"]["spec"]
    assert {"name": "claim-0", "mountPath": "/scratch"} in container["volumeMounts"]
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "25"}}


def test_artifacts_must_be_where_pods_see_them() -> None:
    check(manifest(job("/scratch/artifacts")))
    with pytest.raises(UserError, match="LING_FLOW_ARTIFACTS: /home/me is a directory that a RayJob's pods do not see"):
        manifest(job("/home/me"))


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesStandIn]:
    server = KubernetesStandIn()
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(kuberay_jobs, "POLL_SECONDS", 0.02)
    yield server
    server.close()


def settings(**changes: Any) -> JobSettings:
    return JobSettings(**{"patience_s": 0.3, **changes})


def run(changed: JobSettings | None = None) -> Ended:
    changed = changed or settings()
    return kuberay_jobs.run(job(settings=changed), changed, JobOutput("draw"))


def say(api: KubernetesStandIn, name: str, *states: dict[str, str]) -> None:
    """What KubeRay writes into the status from now on, one state every 0.1 s."""

    def write() -> None:
        for state in states:
            api.set_status(name, **state)
            time.sleep(0.1)

    threading.Thread(target=write, daemon=True).start()


def state(deployment: str, job_state: str = "", **more: str) -> dict[str, str]:
    return {"jobDeploymentStatus": deployment, "jobStatus": job_state, **more}


def test_a_job_is_created_and_waited_for(api: KubernetesStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    name = job(settings=settings()).name(1)
    steps = [state("Initializing"), state("Running", "RUNNING"), state("Running", "SUCCEEDED")]
    api.on_create = lambda made: say(api, name, *steps, state("Complete", "SUCCEEDED"))
    assert run() == Ended(name, "SUCCEEDED")
    check({key: value for key, value in api.objects[api.path(name)].items() if key != "status"})
    told = capsys.readouterr().err
    assert f"RayJob default/{name}: Running, RUNNING" in told and "Complete, SUCCEEDED" in told


def test_a_running_job_is_attached_to_and_an_ended_one_followed_by_the_next(api: KubernetesStandIn) -> None:
    made = job(settings=settings())
    first, second, third = (made.name(attempt) for attempt in (1, 2, 3))
    old = {"metadata": {"name": first, "annotations": {FINGERPRINT: made.fingerprint}}}
    api.put({**old, "status": state("Failed", "FAILED", reason="AppFailed")})
    api.put({"metadata": {"name": second, "annotations": {FINGERPRINT: "another"}}, "status": state("Running")})
    api.on_create = lambda made: say(api, third, state("Running", "RUNNING"), state("Complete", "SUCCEEDED"))
    assert run().name == third
    api.put({**old, "status": state("Running", "RUNNING")})
    say(api, first, state("Running", "RUNNING"), state("Complete", "SUCCEEDED"))
    api.requests.clear()
    assert run().name == first
    assert {method for method, _ in api.requests} == {"GET"}


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        (
            state("Failed", "", reason="PreRunningDeadlineExceeded", message="too long"),
            "PreRunningDeadlineExceeded: too",
        ),
        (state("Failed", "FAILED", reason="AppFailed"), "AppFailed"),
        (state("ValidationFailed"), "ValidationFailed, never ran"),
        (state("Complete", "FAILED"), "Complete, FAILED"),
    ],
)
def test_the_reason_of_a_failure_is_told(api: KubernetesStandIn, ends: dict[str, str], text: str) -> None:
    name = job(settings=settings()).name(1)
    api.on_create = lambda made: say(api, name, ends)
    error = failure(run(), JobOutput("draw"))
    assert isinstance(error, SystemFault) and text in str(error)


def test_a_deployment_that_does_not_follow_its_job_is_left_behind(
    api: KubernetesStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kuberay_jobs, "AGREE_SECONDS", 0.3)
    name = job(settings=settings()).name(1)
    api.on_create = lambda made: say(api, name, state("Running", "SUCCEEDED"))
    assert run().succeeded


def test_a_job_without_a_sign_of_life_is_deleted(api: KubernetesStandIn) -> None:
    name = job(settings=settings()).name(1)
    api.on_create = lambda made: say(api, name, state("Running", "RUNNING"))
    with pytest.raises(SystemFault, match="no sign of life for 0 s, deleted"):
        run(settings(heartbeat_s=0.3))
    assert api.objects == {}


def test_a_step_that_is_told_to_end_deletes_its_job(api: KubernetesStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kuberay_jobs, "follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert api.objects == {} and api.requests[-1][0] == "DELETE"


def test_told_to_end_as_it_creates_its_job_a_step_deletes_it(
    api: KubernetesStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Kubernetes.create

    def interrupted(*arguments: Any) -> bool:
        create(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Kubernetes, "create", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert api.objects == {} and api.requests[-1][0] == "DELETE"


def test_what_can_go_wrong_with_the_api(api: KubernetesStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    name = job(settings=settings()).name(1)

    api.on_create = lambda made: api.objects.clear()
    with pytest.raises(SystemFault, match=f"RayJob default/{name}: was deleted"):
        run()
    api.refuse = (403, "rayjobs.ray.io is forbidden")
    with pytest.raises(UserError, match=r"Kubernetes refuses: 403 Forbidden: .*rayjobs.ray.io is forbidden"):
        run()
    api.refuse = (503, "etcd is away")
    with pytest.raises(SystemFault, match="Kubernetes answers 503"):
        run()
    api.refuse = None

    def leave(made: dict[str, Any]) -> None:
        threading.Timer(0.2, api.close).start()

    api.on_create = leave
    with pytest.raises(SystemFault, match=r"Kubernetes does not answer .*, for 0 s; run again"):
        run()
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    with pytest.raises(UserError, match="KUBECONFIG: no way to a cluster"):
        run()


def test_the_workflow_of_a_kubeflow_run_owns_the_job(
    api: KubernetesStandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = job(settings=settings()).name(1)
    monkeypatch.setenv("LING_FLOW_WORKFLOW", "run-x")
    api.on_create = lambda made: say(api, name, state("Complete", "SUCCEEDED"))
    run()
    assert "ownerReferences" not in api.objects.pop(api.path(name))["metadata"]
    assert "workflow run-x cannot be read" in capsys.readouterr().err
    workflow = api.path("run-x", plural="workflows", group="argoproj.io/v1alpha1")
    api.put({"metadata": {"name": "run-x", "uid": "0-1"}}, workflow)
    run()
    assert api.objects[api.path(name)]["metadata"]["ownerReferences"][0]["uid"] == "0-1"


def test_a_step_whose_job_wrote_elsewhere_says_so(api: KubernetesStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LING_FLOW_RUN_ON", "rayjob")
    monkeypatch.setenv("LING_FLOW_JOB", '{"cluster": {"volumes": [{"claim": "c", "path": "/"}]}}')
    api.on_create = lambda made: say(api, made["metadata"]["name"], state("Complete", "SUCCEEDED"))
    with pytest.raises(UserError, match=r"succeeded, but .* is not there; the job must see the artifact root"):
        run_step(draw, DrawConfig(), {})
