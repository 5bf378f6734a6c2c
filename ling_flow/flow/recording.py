"""What a step read and made, told to its tracker: datasets with digests of their content, models and where they lie."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ling_flow.flow.artifact import ArtifactStore, Manifest, Ref, content_digest
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
            corpus = _read(directory / "corpus.json")
            for source, record in corpus_sources(corpus).items():
                tracker.dataset(source, f"{ref}/shards/{source}", record["train"]["digest"], "source")
        elif output.kind == Model.schema_title:
            config = _read(directory / "config.json")
            architecture = config if isinstance(config, dict) else {}
            tags = {"ling_flow.component": manifest.component, "ling_flow.code_version": manifest.code_version}
            tracker.model(manifest.label, ref, architecture, tags)


def corpus_sources(corpus: Any) -> dict[str, Any]:
    """Source name → its record, of what a `corpus.json` holds; {} of a file that is none of ours."""
    sources = corpus.get("sources") if isinstance(corpus, dict) else None
    if not isinstance(sources, dict) or not all(map(_is_source, sources.values())):
        return {}
    return sources


def _is_source(record: Any) -> bool:
    halves = [record.get(half) if isinstance(record, dict) else None for half in ("train", "validation")]
    return all(
        isinstance(half, dict) and isinstance(half.get("digest"), str) and isinstance(half.get("tokens"), int)
        for half in halves
    )


def _read(path: Path) -> Any:
    """A JSON file that anyone may have written; None where it is not there or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
