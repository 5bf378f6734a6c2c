"""Writes kuberay_schema.json from KubeRay's CRDs: what they admit, without their texts.

    git clone --branch v1.7.0 https://github.com/ray-project/kuberay
    python tests/infra/make_kuberay_schema.py kuberay/helm-chart/kuberay-operator/crds v1.7.0

The result is a JSON Schema with one definition per kind (RayCluster, RayJob, RayService). It is stricter than the CRDs
in one way: an unknown field, which Kubernetes would drop in silence, is an error. Their rules in CEL are not in it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

TARGET = Path(__file__).with_name("kuberay_schema.json")
KINDS = ("rayclusters", "rayjobs", "rayservices")
KEPT = ("type", "enum", "required", "minimum", "maximum", "minLength", "maxLength", "pattern", "minItems", "maxItems")
SHARED_BYTES = 120  # a structure longer than this that occurs twice is written once


def main(crds: Path, version: str) -> None:
    kinds = {}
    for plural in KINDS:
        crd = yaml.safe_load((crds / f"ray.io_{plural}.yaml").read_text())
        served = next(one for one in crd["spec"]["versions"] if one["name"] == "v1")
        kinds[crd["spec"]["names"]["kind"]] = structure(served["schema"]["openAPIV3Schema"])
    for kind, schema in kinds.items():
        schema["properties"] |= {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}}
        schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
        schema["properties"].pop("status", None)  # the operator's
        schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    counts: dict[str, int] = {}
    for schema in kinds.values():
        count(schema, counts)
    definitions: dict[str, Any] = {}
    for kind, schema in kinds.items():
        definitions[kind] = share(schema, counts, definitions, top=True)
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Structure of the custom resources of KubeRay {version}, ray.io/v1",
        "$defs": definitions,
    }
    TARGET.write_text(json.dumps(document, separators=(",", ":"), sort_keys=True) + "\n")


def structure(node: dict[str, Any]) -> dict[str, Any]:
    """A node of a structural OpenAPI schema as JSON Schema."""
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"], **{name: node[name] for name in ("pattern",) if name in node}}
    kept: dict[str, Any] = {name: node[name] for name in KEPT if name in node}
    if "properties" in node:
        kept["properties"] = {name: structure(inner) for name, inner in node["properties"].items()}
    if isinstance(node.get("additionalProperties"), dict):
        kept["additionalProperties"] = structure(node["additionalProperties"])
    elif "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
        kept["additionalProperties"] = False
    if "items" in node:
        kept["items"] = structure(node["items"])
    if node.get("nullable"):
        kept["type"] = [kept["type"], "null"]
    return kept


def count(node: Any, counts: dict[str, int]) -> None:
    if isinstance(node, dict):
        counts[text(node)] = counts.get(text(node), 0) + 1
        for inner in node.values():
            count(inner, counts)


def share(node: Any, counts: dict[str, int], definitions: dict[str, Any], top: bool = False) -> Any:
    """`node` with each long structure that occurs twice replaced by a reference."""
    if not isinstance(node, dict):
        return node
    whole = text(node)
    is_schema = "type" in node and not isinstance(node["type"], dict)  # else a mapping of properties
    if is_schema and not top and len(whole) > SHARED_BYTES and counts[whole] > 1:
        name = hashlib.sha256(whole.encode()).hexdigest()[:10]
        if name not in definitions:
            definitions[name] = {}
            definitions[name] = {key: share(inner, counts, definitions) for key, inner in node.items()}
        return {"$ref": f"#/$defs/{name}"}
    return {key: share(inner, counts, definitions) for key, inner in node.items()}


def text(node: Any) -> str:
    return json.dumps(node, sort_keys=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
