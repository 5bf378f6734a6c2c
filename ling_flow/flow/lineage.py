"""From a model back to what it was made of: version → steps → checkpoints → corpus → shards, read from manifests."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ling_flow.config import StrictModel
from ling_flow.errors import UserError
from ling_flow.flow import mlflow_store as store
from ling_flow.flow.artifact import MANIFEST, ArtifactStore, Manifest, Ref, is_foreign
from ling_flow.flow.context import Context
from ling_flow.flow.promotion import Registry, Version
from ling_flow.flow.recording import corpus_sources

if TYPE_CHECKING:
    from rich.tree import Tree

FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION, models:/m-… or a model directory"
UNKNOWN = "unknown"  # fingerprint of a model that none of our steps made


@dataclass(frozen=True)
class ModelRef:
    """A model that was found.

    Attributes:
        uri: what was asked for.
        name: the registered model's name, or the directory's.
        path: verified local directory of the checkpoint.
        fingerprint: of the artifact; "unknown" for a directory that none of our steps made.
        artifact: reference of the artifact's output, None for such a directory.
        version: number in the registry, None where it was not asked for through the registry.
    """

    uri: str
    name: str
    path: Path
    fingerprint: str
    artifact: str | None
    version: int | None
    cache: Path


class SourceRecord(StrictModel):
    """One source of a corpus."""

    tokens: int = Field(description="tokens, validation included")
    train_digest: str = Field(description="SHA-256 of the training shard")
    validation_digest: str = Field(description="SHA-256 of the validation shard")


class LineageNode(StrictModel):
    """An output of a step, and what that step was given."""

    artifact: str = Field(description="reference")
    component: str = Field(description="component that made it")
    fingerprint: str = Field(description="fingerprint of the step")
    output: str = Field(description="name of the output")
    present: bool = Field(description="whether the artifact is still there; without it nothing further back is known")
    code_version: str = Field(default="", description="version of the code that made it")
    created: str = Field(default="", description="when, UTC, ISO 8601")
    result: dict[str, Any] = Field(default={}, description="the step's result")
    sources: dict[str, SourceRecord] = Field(default={}, description="for a corpus: what it was made of")
    inputs: dict[str, LineageNode] = Field(default={}, description="what the step was given, by input name")


class Lineage(StrictModel):
    """A model and everything behind it."""

    uri: str = Field(description="what was asked for")
    name: str = Field(description="the registered model's name, or the directory's")
    version: int | None = Field(description="number in the registry")
    fingerprint: str = Field(description="fingerprint of the model's artifact")
    model: LineageNode = Field(description="the model's artifact")


def resolve_model(uri: str, context: Context) -> ModelRef:
    """Find the model behind a URI.

    Args:
        uri: `models:/name@alias`, `models:/name/3`, `models:/m-…` (a LoggedModel), or a directory: an artifact's, one
            inside an artifact (a single checkpoint), or any Hugging Face checkpoint.

    Raises:
        UserError: there is no such model, or its files are missing or damaged.
        SystemFault: the registry cannot be reached.
    """
    cache = context.home / "cache"
    if uri.startswith("models:/"):
        name, version, artifact = _registered(uri, context)
        ref = Ref.parse(artifact)
        path, _ = ArtifactStore(ref.root, cache).open(ref.component, ref.fingerprint, ref.output)
        return ModelRef(uri, name, path, ref.fingerprint, artifact, version, cache)
    path = Path(uri).absolute()
    if not path.is_dir():
        raise UserError(f"{uri}: no such model; expected {FORMS}")
    found = _output_above(path, cache)
    if found is None:
        if not (path / "config.json").is_file():
            raise UserError(f"{uri}: holds no config.json, so it is not a model; expected {FORMS}")
        return ModelRef(uri, path.name, path, UNKNOWN, None, None, cache)
    ref, inside = found
    verified, _ = ArtifactStore(ref.root, cache).open(ref.component, ref.fingerprint, ref.output)
    return ModelRef(uri, ref.component, verified / inside, ref.fingerprint, str(ref), None, cache)


def lineage_tree(model: ModelRef) -> Lineage:
    """Everything behind a model.

    Raises:
        UserError: none of our steps made it, so nothing is known.
    """
    if model.artifact is None:
        raise UserError(
            f"{model.uri}: was not made by a step (no step's {MANIFEST} above it), so its lineage is not known"
        )
    root = _node(Ref.parse(model.artifact), model.cache, {})
    return Lineage(uri=model.uri, name=model.name, version=model.version, fingerprint=model.fingerprint, model=root)


def render_tree(lineage: Lineage) -> Tree:
    """The lineage for a terminal; an artifact that several steps were given is spelled out once."""
    from rich.markup import escape
    from rich.tree import Tree

    version = f" version {lineage.version}" if lineage.version is not None else ""
    tree = Tree(f"[bold]{escape(lineage.name)}[/bold]{version}  [dim]{escape(lineage.uri)}[/dim]")
    seen: set[str] = set()

    def add(branch: Tree, label: str, node: LineageNode) -> None:
        title = f"{label}[bold]{node.component}[/bold]/{node.output} [cyan]{node.fingerprint}[/cyan]"
        if not node.present:
            branch.add(f"{title}  [red]no longer there[/red]: {escape(node.artifact)}")
            return
        if node.artifact in seen and (node.inputs or node.sources):
            branch.add(f"{title}  [dim]see above[/dim]")
            return
        seen.add(node.artifact)
        child = branch.add(f"{title}  [dim]code {escape(node.code_version)}, {node.created}[/dim]")
        for name, source in node.sources.items():
            digest = source.train_digest.removeprefix("sha256:")[:12]
            child.add(f"source {escape(name)}: {source.tokens:,} tokens, sha256 [cyan]{digest}[/cyan]")
        for name, parent in node.inputs.items():
            add(child, f"{escape(name)} ← ", parent)

    add(tree, "", lineage.model)
    return tree


def _registered(uri: str, context: Context) -> tuple[str, int | None, str]:
    """Name, version number and artifact reference behind a `models:/` URI."""
    registry = Registry.of(context)
    rest = uri.removeprefix("models:/")
    where = f"in {registry.tracking_uri}"
    if re.fullmatch(r"m-[0-9a-f]+", rest):
        tags = registry.logged_model(rest)
        if tags is None:
            raise UserError(f"{uri}: no such logged model {where}")
        name, number, artifact = tags.get("ling_flow.component", rest), None, tags.get(store.ARTIFACT_TAG, "")
    else:
        version = _version(registry, uri, rest, where)
        name, number, artifact = version.name, version.number, version.artifact
    if not artifact:
        raise UserError(f"{uri}: was not registered by ling_flow (it has no tag {store.ARTIFACT_TAG})")
    return name, number, artifact


def _version(registry: Registry, uri: str, rest: str, where: str) -> Version:
    name, at, alias = rest.partition("@")
    if at and name and alias:
        found = registry.by_alias(name, alias)
        missing = f"no model {name} with the alias {alias} {where}"
    else:
        match = re.fullmatch(r"([^/]+)/(\d+)", rest)
        if match is None:
            raise UserError(f"{uri}: not a model URI; expected {FORMS}")
        found = registry.version(match[1], int(match[2]))
        missing = f"no version {match[2]} of a model {match[1]} {where}"
    if found is None:
        raise UserError(f"{uri}: {missing}")
    return found


def _output_above(path: Path, cache: Path) -> tuple[Ref, Path] | None:
    """The output that a directory is, or lies in, and the way from there to it; None outside any artifact.

    Raises:
        UserError: it is the directory of an artifact that does not have exactly one model.
    """
    for directory in (path, *path.parents):
        manifest_file = directory / MANIFEST
        if not manifest_file.is_file() or is_foreign(manifest_file.read_bytes(), directory.name):
            continue
        component, fingerprint = directory.parent.name, directory.name
        manifest = ArtifactStore(directory.parents[1], cache).manifest(component, fingerprint)
        assert manifest is not None
        inside = path.relative_to(directory).parts
        output = inside[0] if inside else _only_model(manifest, path)
        return Ref(str(directory.parents[1]), component, fingerprint, output), Path(*inside[1:])
    return None


def _only_model(manifest: Manifest, path: Path) -> str:
    models = [name for name, output in manifest.outputs.items() if output.kind == "system.Model"]
    if len(models) != 1:
        raise UserError(f"{path}: has {len(models)} models; its outputs are {', '.join(manifest.outputs)}")
    return models[0]


def _node(ref: Ref, cache: Path, known: dict[str, LineageNode]) -> LineageNode:
    artifact = str(ref)
    if artifact not in known:
        manifest = ArtifactStore(ref.root, cache).manifest(ref.component, ref.fingerprint)
        place: dict[str, Any] = {
            "artifact": artifact,
            "component": ref.component,
            "fingerprint": ref.fingerprint,
            "output": ref.output,
        }
        known[artifact] = (
            LineageNode(**place, present=False)
            if manifest is None
            else LineageNode(
                **place,
                present=True,
                code_version=manifest.code_version,
                created=manifest.created,
                result=manifest.result,
                sources=_sources(ref, manifest),
                inputs={name: _node(Ref.parse(parent.ref), cache, known) for name, parent in manifest.inputs.items()},
            )
        )
    return known[artifact]


def _sources(ref: Ref, manifest: Manifest) -> dict[str, SourceRecord]:
    """What a corpus was made of, from its `corpus.json`."""
    if f"{ref.output}/corpus.json" not in [file.path for file in manifest.files]:
        return {}
    import fsspec

    with fsspec.open(f"{ref}/corpus.json", "rb") as file:
        content = file.read()
    try:
        sources = corpus_sources(json.loads(content))
    except (ValueError, RecursionError):  # a file of that name which is not ours
        return {}
    return {
        name: SourceRecord(
            tokens=source["train"]["tokens"] + source["validation"]["tokens"],
            train_digest=source["train"]["digest"],
            validation_digest=source["validation"]["digest"],
        )
        for name, source in sources.items()
    }
