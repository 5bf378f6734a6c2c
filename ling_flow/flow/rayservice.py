"""Which model a RayService serves: changed without a gap, and changed back where the new one does not answer.

The RayService itself belongs to whoever runs the cluster (`infra/kubernetes`): image, hardware and secrets are there.
A deployment changes the model in its application's arguments and the mark on its pods. Because of the mark KubeRay
makes a second cluster and sends requests there only when its model is loaded; the old one answers until then.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from typing import Any

import yaml

from ling_flow.errors import LingFlowError, SystemFault, UserError
from ling_flow.flow.kube_api import RAY_SERVICES, Kubernetes

MODEL = "ling-flow/model"  # annotation of the pods
POLL_SECONDS = 2.0
PORT = 8000


def service_url(namespace: str, name: str) -> str:
    """Inside the cluster; KubeRay names the Service so."""
    return f"http://{name}-serve-svc.{namespace}.svc:{PORT}"


def with_model(manifest: dict[str, Any], model_uri: str) -> dict[str, Any]:
    """The RayService `manifest` with another model.

    Raises:
        UserError: it has not exactly one application with an argument `model`.
    """
    changed = copy.deepcopy(manifest)
    where = f"RayService {changed['metadata']['name']}"
    config = yaml.safe_load(changed["spec"].get("serveConfigV2") or "") or {}
    applications = config.get("applications") or []
    if len(applications) != 1 or "model" not in (applications[0].get("args") or {}):
        raise UserError(f"{where}: serveConfigV2 must hold one application with the argument 'model'")
    applications[0]["args"]["model"] = model_uri
    changed["spec"]["serveConfigV2"] = yaml.safe_dump(config, sort_keys=False)
    cluster = changed["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
        group["template"].setdefault("metadata", {}).setdefault("annotations", {})[MODEL] = model_uri
    return changed


def switch(
    api: Kubernetes, namespace: str, name: str, model_uri: str, serves: Callable[[], bool], seconds: float
) -> dict[str, Any]:
    """Have the RayService serve another model, and wait until it does.

    Args:
        model_uri: `models:/NAME/VERSION`; an alias would mean another model tomorrow.
        serves: whether the new model answers where clients ask.
        seconds: it may take so long; then the old model is put back.

    Returns:
        What was there before, for `restore`.

    Raises:
        UserError: there is no such RayService, or it is not one of ours.
        SystemFault: it did not come up in time, and the old one is put back.
    """
    before = api.get(RAY_SERVICES, namespace, name)
    if before is None:
        raise UserError(f"rayservice: there is no RayService {name} in namespace {namespace}; apply infra/kubernetes")
    changed = with_model(before, model_uri)
    if changed["spec"] != before["spec"]:
        api.replace(RAY_SERVICES, namespace, changed)
    try:
        _wait(api, namespace, name, serves, seconds)
    except BaseException:
        restore(api, namespace, before)
        raise
    return before


def restore(api: Kubernetes, namespace: str, before: dict[str, Any]) -> None:
    """Put back what a RayService was; never fails, because a better error is under way."""
    with contextlib.suppress(LingFlowError):
        now = api.get(RAY_SERVICES, namespace, before["metadata"]["name"])
        if now is not None and now["spec"] != before["spec"]:
            api.replace(RAY_SERVICES, namespace, {**now, "spec": before["spec"]})


def _wait(api: Kubernetes, namespace: str, name: str, serves: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while True:
        there: dict[str, Any] = {}
        with contextlib.suppress(SystemFault):  # the API server may be away for a while
            there = api.get(RAY_SERVICES, namespace, name) or {}
        ready = _condition(there, "Ready")
        if ready.get("status") == "True" and serves():
            return
        if time.monotonic() > until:
            reason = f"{ready.get('reason', 'no state')}: {ready.get('message', '')}".rstrip(": ")
            raise SystemFault(
                f"RayService {namespace}/{name}: does not serve the new model after {seconds:.0f} s ({reason}); "
                "the old one is put back"
            )
        time.sleep(POLL_SECONDS)


def _condition(there: dict[str, Any], kind: str) -> dict[str, str]:
    conditions = there.get("status", {}).get("conditions", [])
    return next((condition for condition in conditions if condition.get("type") == kind), {})
