"""The Kubernetes manifests: whole, valid, and no more rights than needed. None of it needs a cluster or the network."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.kustomize import Manifest, build, containers
from tests.infra.schemas import errors

REPOSITORY = Path(__file__).parents[2]
KUBERNETES = REPOSITORY / "infra" / "kubernetes"
OVERLAYS = ["local", "gpu"]


def key(manifest: Manifest) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> dict[tuple[str, str], Manifest]:
    return {key(one): one for one in build(KUBERNETES / "overlays" / request.param)}


def test_every_manifest_is_valid(overlay: dict[tuple[str, str], Manifest]) -> None:
    assert {name: problems for name, one in overlay.items() if (problems := errors(one))} == {}
    assert len(overlay) == 17


def test_the_schemas_see_mistakes(overlay: dict[tuple[str, str], Manifest]) -> None:
    mlflow = overlay["Deployment", "mlflow"]
    mlflow["spec"]["template"]["spec"]["containers"][0]["imag"] = "x"
    assert "imag" in errors(mlflow)[0]
    cluster = overlay["RayCluster", "ling-flow"]
    cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    assert sorted(error.partition(":")[0] for error in errors(cluster)) == [
        "spec.headGroupSpec.rayStartParams.num-cpus",
        "spec.workerGroupSpecs.0.template.spec.containers.0",
    ]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("name", OVERLAYS)
def test_kubectl_makes_the_same(name: str) -> None:
    directory = KUBERNETES / "overlays" / name
    done = subprocess.run(["kubectl", "kustomize", str(directory)], capture_output=True, text=True, check=True)
    made = {key(one): one for one in yaml.load_all(done.stdout, yaml.CSafeLoader)}
    assert made == {key(one): one for one in build(directory)}


def test_containers_are_limited_and_confined(overlay: dict[tuple[str, str], Manifest]) -> None:
    for name, manifest in overlay.items():
        for container in containers(manifest):
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert {"cpu", "memory"} <= set(limits) and {"cpu", "memory"} <= set(requests), name
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert ":" in container["image"] and not container["image"].endswith(":latest"), name


def test_pods_are_nobody_in_particular(overlay: dict[tuple[str, str], Manifest]) -> None:
    for spec in _pod_specs(list(overlay.values())):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert ("ServiceAccount", spec["serviceAccountName"]) in overlay


def test_the_server_is_probed(overlay: dict[tuple[str, str], Manifest]) -> None:
    (server,) = overlay["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(server)


def test_the_server_goes_by_the_names_that_the_docs_use(overlay: dict[tuple[str, str], Manifest]) -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    hosts = overlay["ConfigMap", "ling-flow-mlflow"]["data"]["hosts"].split(",")
    for name in ("mlflow.ling-flow.svc:5000", "127.0.0.1:5000", "localhost:5000"):
        assert is_allowed_host_header(hosts, name), name
    assert not is_allowed_host_header(hosts, "elsewhere.example.com:5000")


def test_steps_may_make_ray_jobs_and_little_else(overlay: dict[tuple[str, str], Manifest]) -> None:
    rules = {rule["resources"][0]: rule for rule in overlay["Role", "ling-flow-step"]["rules"]}
    assert set(rules["rayjobs"]["verbs"]) == {"get", "create", "delete"}
    assert rules["rayservices"]["resourceNames"] == ["chat"]
    assert "*" not in json.dumps(list(rules.values()))
    assert rules["secrets"]["resourceNames"] and rules["configmaps"]["resourceNames"]
    assert not any(kind.startswith("Cluster") for kind, _ in overlay)
    (subject,) = overlay["RoleBinding", "ling-flow-step"]["subjects"]
    assert subject["namespace"] == overlay["ServiceAccount", "ling-flow-step"]["metadata"]["namespace"]


def test_nothing_is_open_by_default(overlay: dict[tuple[str, str], Manifest]) -> None:
    assert overlay["NetworkPolicy", "default-deny"]["spec"] == {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
    }
    for (kind, name), manifest in overlay.items():
        for rule in manifest["spec"].get("ingress", ()) if kind == "NetworkPolicy" else ():
            assert rule.get("from"), name  # an empty one would mean everybody


def test_secrets_are_named_and_not_held(overlay: dict[tuple[str, str], Manifest]) -> None:
    assert not any(kind == "Secret" for kind, _ in overlay)
    named = set()
    for manifest in overlay.values():
        for container in containers(manifest):
            for variable in container.get("env", ()):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    named.add((reference["name"], reference["key"]))
                else:
                    assert not any(word in variable["name"] for word in ("PASSWORD", "SECRET", "KEY_ID", "TOKEN"))
    assert {name for name, _ in named} == {
        "ling-flow-mlflow", "ling-flow-mlflow-server", "ling-flow-postgres", "ling-flow-s3",
    }  # fmt: skip


def test_profiles_and_manifests_speak_of_the_same_things() -> None:
    from ling_flow.flow.profile import read_profile

    held = {
        (reference["name"], reference["key"])
        for manifest in build(KUBERNETES / "overlays" / "gpu")
        for container in containers(manifest)
        for variable in container.get("env", ())
        if (reference := variable.get("valueFrom", {}).get("secretKeyRef"))
    }
    accounts = {name for kind, name in map(key, build(KUBERNETES / "base")) if kind == "ServiceAccount"}
    for name in ("local", "gpu"):
        profile = read_profile(name)
        assert {(secret.secret, secret.key) for secret in profile.steps.secrets} <= held
        used = {profile.kfp.service_account, profile.steps.job.cluster.service_account} - {None}
        assert used <= accounts
        assert profile.mlflow == "http://mlflow.ling-flow.svc:5000"


def test_the_service_names_an_application_that_exists(overlay: dict[tuple[str, str], Manifest]) -> None:
    config: dict[str, Any] = yaml.safe_load(overlay["RayService", "chat"]["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    assert application["args"] == {"model": "models:/ling-tiny@champion"}  # a deployment changes it
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(config)


def test_versions_are_those_we_build_with(overlay: dict[tuple[str, str], Manifest]) -> None:
    from ling_flow import __version__

    pinned = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split() if "==" in line)
    for kind, path in (("RayCluster", ("spec",)), ("RayService", ("spec", "rayClusterConfig"))):
        for (found, _), manifest in overlay.items():
            if found == kind:
                spec = manifest
                for part in path:
                    spec = spec[part]
                assert spec["rayVersion"] == pinned["ray"]
    for manifest in overlay.values():
        for container in containers(manifest):
            assert container["image"].rpartition(":")[2].startswith(__version__)


def _pod_specs(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, dict):
        inner = [spec for value in node.values() for spec in _pod_specs(value)]
        return [node, *inner] if "containers" in node else inner
    return [spec for value in node for spec in _pod_specs(value)] if isinstance(node, list) else []
