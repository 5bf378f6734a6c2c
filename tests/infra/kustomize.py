"""What `kubectl kustomize` makes of an overlay, for machines without kubectl.

Only what our overlays use: resources, namespace, labels of metadata, images, and JSON 6902 patches with a target. Where
kubectl is there, a test holds this to it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
USED = {"apiVersion", "kind", "resources", "namespace", "labels", "images", "patches"}


def build(directory: Path) -> list[Manifest]:
    """The manifests of an overlay or base.

    Raises:
        ValueError: it uses something that is not known here.
    """
    wanted = yaml.safe_load((directory / "kustomization.yaml").read_text())
    if unknown := set(wanted) - USED:
        raise ValueError(f"{directory}: {sorted(unknown)}")
    manifests: list[Manifest] = []
    for name in wanted.get("resources", ()):
        path = directory / name
        if path.is_dir():
            manifests += build(path)
        else:
            # Anchors make one object of two places; what is patched in one must not change the other.
            manifests += [_unshared(one) for one in yaml.safe_load_all(path.read_text())]
    for patch in wanted.get("patches", ()):
        text = patch.get("patch") or (directory / patch["path"]).read_text()
        chosen = [one for one in manifests if _matches(one, patch["target"])]
        if not chosen:
            raise ValueError(f"{directory}: no target {patch['target']}")
        for manifest in chosen:
            for operation in yaml.safe_load(text):
                _apply(manifest, operation)
    for manifest in manifests:
        _settle(manifest, wanted)
    return manifests


def _settle(manifest: Manifest, wanted: dict[str, Any]) -> None:
    if "namespace" in wanted and manifest["kind"] != "Namespace":
        manifest["metadata"]["namespace"] = wanted["namespace"]
    for labels in wanted.get("labels", ()):
        manifest["metadata"].setdefault("labels", {}).update(labels["pairs"])
    for container in containers(manifest):
        for image in wanted.get("images", ()):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"


def containers(node: Any) -> Iterator[dict[str, Any]]:
    """Every container of a manifest, however deep."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers") and isinstance(value, list):
                yield from value
            else:
                yield from containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from containers(value)


def _unshared(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def _matches(manifest: Manifest, target: dict[str, str]) -> bool:
    return manifest["kind"] == target["kind"] and target.get("name") in (None, manifest["metadata"]["name"])


def _apply(manifest: Manifest, operation: dict[str, Any]) -> None:
    *path, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    node: Any = manifest
    for part in path:
        node = node[int(part)] if isinstance(node, list) else node[part]
    if operation["op"] == "add":
        if isinstance(node, list):
            node.insert(len(node) if last == "-" else int(last), copy.deepcopy(operation["value"]))
        else:
            node[last] = copy.deepcopy(operation["value"])
    elif operation["op"] == "replace":
        key: Any = int(last) if isinstance(node, list) else last
        node[key]  # must be there
        node[key] = copy.deepcopy(operation["value"])
    else:
        raise ValueError(f"{operation['op']}: not known here")
