"""Another model for a RayService, against a stand-in for Kubernetes' API; on a real Ray Serve in `test_ray_jobs.py`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ling_flow.errors import SystemFault, UserError
from ling_flow.flow import rayservice
from ling_flow.flow.kube_api import Kubernetes
from ling_flow.flow.rayservice import MODEL, switch, with_model
from tests.conftest import REPOSITORY
from tests.flow.kubernetes_api import KubernetesStandIn
from tests.infra.schemas import kuberay_errors

PATH = KubernetesStandIn.path("chat", plural="rayservices")
NEW = "models:/ling-tiny/2"


def manifest() -> dict[str, Any]:
    """The RayService of our manifests."""
    documents = yaml.safe_load_all((REPOSITORY / "infra/kubernetes/base/ray-service.yaml").read_text())
    return next(document for document in documents if document["kind"] == "RayService")


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesStandIn]:
    server = KubernetesStandIn()
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(rayservice, "POLL_SECONDS", 0.02)
    server.put({**manifest(), "status": {}}, PATH)
    yield server
    server.close()


def ready(status: str, message: str = "") -> dict[str, Any]:
    return {"conditions": [{"type": "Ready", "status": status, "reason": "Because", "message": message}]}


def test_another_model_means_another_cluster() -> None:
    changed = with_model(manifest(), NEW)
    assert kuberay_errors(changed) == []
    (application,) = yaml.safe_load(changed["spec"]["serveConfigV2"])["applications"]
    assert application["args"] == {"model": NEW}
    cluster = changed["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["metadata"]["annotations"] == {MODEL: NEW}
    assert changed["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    assert with_model(changed, NEW) == changed


def test_a_foreign_service_is_not_touched(api: KubernetesStandIn) -> None:
    foreign = manifest()
    foreign["spec"]["serveConfigV2"] = "applications: []"
    api.put(foreign, PATH)
    with pytest.raises(UserError, match="RayService chat: serveConfigV2 must hold one application with the argument"):
        switch(Kubernetes(), "default", "chat", NEW, lambda: True, 1)
    with pytest.raises(UserError, match="there is no RayService chat in namespace elsewhere; apply infra/kubernetes"):
        switch(Kubernetes(), "elsewhere", "chat", NEW, lambda: True, 1)


def test_it_waits_until_the_service_is_ready_and_the_new_model_answers(api: KubernetesStandIn) -> None:
    asked: list[str] = []

    def serves() -> bool:
        asked.append(api.objects[PATH]["spec"]["serveConfigV2"])
        return len(asked) > 2

    api.on_replace = lambda made: made.update(status=ready("True"))
    before = switch(Kubernetes(), "default", "chat", NEW, serves, 10)
    assert len(asked) == 3 and NEW in asked[0]
    assert before["spec"] == manifest()["spec"]
    api.requests.clear()
    switch(Kubernetes(), "default", "chat", NEW, lambda: True, 10)  # nothing to change
    assert {method for method, _ in api.requests} == {"GET"}


@pytest.mark.parametrize(("status", "serves"), [("False", True), ("True", False)])
def test_a_model_that_does_not_come_up_is_taken_back(api: KubernetesStandIn, status: str, serves: bool) -> None:
    api.on_replace = lambda made: made.update(status=ready(status, "no GPUs"))
    with pytest.raises(SystemFault, match=r"after 0 s \(Because: no GPUs\); the old one is put back"):
        switch(Kubernetes(), "default", "chat", NEW, lambda: serves, 0.1)
    assert api.objects[PATH]["spec"] == manifest()["spec"]


def test_two_deployments_at_once_do_not_overwrite_each_other(api: KubernetesStandIn) -> None:
    mine = Kubernetes()
    read = mine.get("rayservices", "default", "chat")
    assert read is not None
    other = copy.deepcopy(read)
    mine.replace("rayservices", "default", with_model(other, NEW))
    with pytest.raises(SystemFault, match="409 Conflict"):
        mine.replace("rayservices", "default", with_model(read, "models:/ling-tiny/3"))
