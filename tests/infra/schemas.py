"""Checks of Kubernetes manifests, offline: core kinds by Kubernetes' schemas, KubeRay's by kuberay_schema.json."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KUBERNETES = "1.34"
_SCHEMA = Path(__file__).with_name("kuberay_schema.json")


@functools.cache
def _kuberay() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(_SCHEMA.read_text())
    return loaded


def kuberay_errors(manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with a RayCluster, RayJob or RayService; one line each, with the path."""
    from jsonschema import Draft202012Validator

    schema = {"$ref": f"#/$defs/{manifest['kind']}", **_kuberay()}
    found = Draft202012Validator(schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def errors(manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with a manifest of any kind that we use."""
    if str(manifest["apiVersion"]).startswith("ray.io/"):
        return kuberay_errors(manifest)
    import kubernetes_validate

    try:
        kubernetes_validate.validate(dict(manifest), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []
