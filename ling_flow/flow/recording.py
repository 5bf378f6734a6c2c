"""What a step read and made, told to its tracker: datasets with digests of their content, models and where they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from ling_flow.flow.artifact import ArtifactStore, Manifest, Ref
from ling_flow.flow.component import Dataset, Model
from ling_flow.flow.tracking import NullTracker


def record_inputs(tracker: NullTracker, label: str, sources: Iterable[tuple[Ref, Manifest]]) -> None:
    """The datasets and models among a step's inputs: each with the manifest of the artifact that it is an output of."""
    for ref, manifest in sources:
        kind = manifest.outputs[ref.output].kind
        if kind == Dataset.schema_title:
            tracker.dataset(ref.output, str(ref), content_digest(manifest, ref.output), label)
        elif kind == Model.schema_title:
            tracker.uses_model(str(ref))


def record_outputs(tracker: NullTracker, manifest: Manifest, store: ArtifactStore) -> None:
    """The datasets and models that a step made; of a corpus also each of its sources."""
    for name, output in manifest.outputs.items():
        ref = store.ref(manifest.component, manifest.fingerprint, name)
        directory = store.local / manifest.component / manifest.fingerprint / name
        if output.kind == Dataset.schema_title:
            tracker.dataset(name, ref, content_digest(manifest, name), "output")
            corpus = directory / "corpus.json"
            for source, record in (json.loads(corpus.read_text())["sources"] if corpus.is_file() else {}).items():
                tracker.dataset(source, f"{ref}/shards/{source}", record["train"]["digest"], "source")
        elif output.kind == Model.schema_title:
            config = directory / "config.json"
            architecture = json.loads(config.read_text()) if config.is_file() else {}
            tags = {"ling_flow.component": manifest.component, "ling_flow.code_version": manifest.code_version}
            tracker.model(manifest.label, ref, architecture, tags)


def content_digest(manifest: Manifest, output: str) -> str:
    """SHA-256 over names and digests of an output's files."""
    lines = [f"{file.path} {file.sha256}" for file in manifest.files if file.path.split("/", 1)[0] == output]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
