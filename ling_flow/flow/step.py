"""Run one step: find its artifact or make it.

resolve config → fingerprint → artifact there? return at once (nothing heavy is imported) → lock → run the body in a
partial directory → hash, commit. A body that fails leaves no artifact; what a resumable one wrote stays for its next
try.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ling_flow.config import canonical_json, identity_of, parse, plain
from ling_flow.errors import LingFlowError, SystemFault, UserError
from ling_flow.flow import events
from ling_flow.flow.artifact import (
    BEGUN,
    SCHEMA_VERSION,
    ArtifactStore,
    Manifest,
    OutputRecord,
    Parent,
    Ref,
    changed_input,
    content_digest,
)
from ling_flow.flow.component import HTML, Component, Input, Output, Step
from ling_flow.flow.context import Context, RunOn, spin_briefly
from ling_flow.flow.identity import code_version, fingerprint
from ling_flow.flow.recording import record_inputs, record_outputs

if TYPE_CHECKING:
    from ling_flow.flow.tracking import NullTracker


@dataclass(frozen=True)
class Outcome:
    """What a step gave.

    Attributes:
        result: the component's result model.
        refs: output name → reference, to be given to other steps anywhere.
        seconds: what making the artifact took, also when it was not made now (`cached`).
    """

    component: Component
    label: str
    fingerprint: str
    cached: bool
    result: Any
    refs: dict[str, str]
    seconds: float
    manifest: Manifest
    store: ArtifactStore

    def path(self, name: str) -> Path:
        """Local directory of an output; on a remote root it is copied here first."""
        if not self.store.remote:
            return Path(self.refs[name])
        return self.store.open(self.component.name, self.fingerprint, name)[0]

    @property
    def outputs(self) -> dict[str, Path]:
        """Output name → local directory."""
        return {name: self.path(name) for name in self.refs}


@dataclass(frozen=True)
class Identified:
    """A step whose identity is known: `config` resolved, `key` its fingerprint, `parents` as in the manifest."""

    component: Component
    config: Any
    refs: dict[str, Ref]
    parents: dict[str, Parent]
    key: str
    label: str
    store: ArtifactStore
    cache: Path

    @property
    def contents(self) -> dict[str, str]:
        """Input name → digest of what it holds."""
        return {name: parent.digest for name, parent in self.parents.items()}

    def find(self, tell: bool = True) -> Outcome | None:
        """The step's finished artifact, if it is there, comes from what its inputs hold, and its side effects stand.

        Args:
            tell: log why one that is there is not taken.
        """
        return _find(self, tell)


def identify(
    component: Component,
    config: Any,
    inputs: Mapping[str, str | Path | None],
    root: str | Path | None,
    context: Context,
) -> Identified:
    """Which artifact a step makes.

    Raises:
        UserError: an input is missing, of the wrong kind, unknown or damaged.
        SystemFault: an object store does not answer.
    """
    cache = context.home / "cache"
    store = ArtifactStore(root or context.artifacts, cache)
    if component.resolve:
        config = component.resolve(config)
    given = _check_inputs(component, inputs, cache)
    refs = {name: ref for name, (ref, _) in given.items()}
    parents = {name: _parent(ref, manifest) for name, (ref, manifest) in given.items()}
    identity = {name: parent.fingerprint for name, parent in parents.items()}
    key = fingerprint(component.name, component.version, config, identity)
    label = context.labels.get(key) or component.label_of(config)
    return Identified(component, config, refs, parents, key, label, store, cache)


def run_step(
    component: Component,
    config: Any,
    inputs: Mapping[str, str | Path | None],
    *,
    root: str | Path | None = None,
    tracker: NullTracker | None = None,
    rebuild: bool = False,
    run_on: RunOn | None = None,
) -> Outcome:
    """Make the step's artifact, or return the one that is there.

    Args:
        run_on: where, whatever component and environment say; None: where they say (`ling_flow.flow.context`).

    Raises:
        UserError: an input is missing, of the wrong kind, unknown or damaged; or the artifact found is damaged.
        SystemFault: a disk is full, an object store does not answer.
    """
    spin_briefly()
    context = Context.from_environment()
    found = identify(component, config, inputs, root, context)
    config, key, label, store = found.config, found.key, found.label, found.store
    rebuild = rebuild or context.no_cache or label in context.rebuild
    where = run_on or (context.run_on if component.runs_on_of(config) != "process" else "process")

    outcome = None if rebuild else found.find()
    kfp_run_id = os.environ.get("LING_FLOW_KFP_RUN_ID")
    if outcome is not None and kfp_run_id and context.tracking_uri:
        from ling_flow.flow.tracking import record_cached_on_kfp

        record_cached_on_kfp(context.tracking_uri, kfp_run_id, label, outcome.manifest)
    if outcome is None and where != "process":
        from ling_flow.flow.jobs import run_as_job

        outcome = run_as_job(found, where, context, rebuild)
    if outcome is None:
        with store.lock(
            component.name, key, lambda: events.emit("log", step=label, text="waiting: another process makes it")
        ):
            outcome = None if rebuild else found.find(tell=False)  # made while we waited
            if outcome is None:
                if store.remote:
                    from ling_flow.flow.preflight import check_artifacts

                    check_artifacts(store, write=True)  # before anything is spent
                found, given, sources = _open_inputs(found)
                if tracker is None:
                    from ling_flow.flow.tracking import open_tracker

                    tracker = open_tracker(context)
                try:
                    outcome = _make(found, given, sources, tracker, rebuild)
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT):
                        raise SystemFault(f"{label}: no space left for {error.filename or store.local}") from error
                    raise
    events.emit(
        "done", step=label, fingerprint=key, cached=outcome.cached, seconds=outcome.seconds,
        result=outcome.manifest.result, outputs=outcome.refs,
    )  # fmt: skip
    return outcome


TOLD_TO_END = (signal.SIGTERM, 128 + signal.SIGTERM)  # exit codes of Ray's handler, and of ours


def exit_on_sigterm() -> None:
    """For a process that is one step: being told to end (a deleted pod) unwinds the step, which then clears up."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _check_inputs(
    component: Component, inputs: Mapping[str, str | Path | None], cache: Path
) -> dict[str, tuple[Ref, Manifest]]:
    """The inputs given, as references to artifacts that exist and have the declared kind; files are not read yet."""
    refs = {}
    for name, spec in component.inputs.items():
        given = inputs.get(name)
        if given is None:
            if not spec.optional:
                raise UserError(
                    f"{component.name}: input '{name}' is missing; give it a step's output ({spec.kind.__name__})"
                )
            continue
        ref = Ref.parse(given)
        manifest = ArtifactStore(ref.root, cache).manifest(ref.component, ref.fingerprint)
        if manifest is None:
            raise UserError(
                f"{component.name}: input '{name}': {given} is not a step's output (no manifest.json above it)"
            )
        if ref.output not in manifest.outputs:
            known = ", ".join(manifest.outputs) or "none"
            raise UserError(f"{component.name}: input '{name}': {given}: no such output; {ref.component} has: {known}")
        kind = manifest.outputs[ref.output].kind
        if kind != spec.kind.schema_title:
            raise UserError(f"{component.name}: input '{name}' must be a {spec.kind.__name__}, but {given} is a {kind}")
        refs[name] = (ref, manifest)
    unknown = set(inputs) - set(component.inputs)
    if unknown:
        known = ", ".join(component.inputs) or "none"
        raise UserError(f"{component.name}: no input called '{min(unknown)}'; inputs: {known}")
    return refs


def _parent(ref: Ref, manifest: Manifest) -> Parent:
    identity = f"{ref.fingerprint}/{ref.output}"
    return Parent(ref=str(ref), fingerprint=identity, digest=content_digest(manifest, ref.output))


def _open_inputs(step: Identified) -> tuple[Identified, dict[str, Input[Any]], list[tuple[Ref, Manifest]]]:
    """The inputs as verified local directories, what each is an output of, and the step with what they held then."""
    inputs, sources, parents = {}, [], {}
    for name, ref in step.refs.items():
        try:
            path, manifest = ArtifactStore(ref.root, step.cache).open(ref.component, ref.fingerprint, ref.output)
        except UserError:
            _blame_rebuilt_input(step)
            raise
        inputs[name] = Input[Any](str(ref), path, ref.fingerprint, manifest.outputs[ref.output].contract)
        sources.append((ref, manifest))
        parents[name] = _parent(ref, manifest)
    return replace(step, parents=parents), inputs, sources


def _rebuilt_input(step: Identified, patient: bool = False) -> str:
    """Which input is no longer what it was, in a sentence; "" where all are."""
    for name, ref in step.refs.items():
        manifest = ArtifactStore(ref.root, step.cache).manifest(ref.component, ref.fingerprint, patient)
        if manifest is None or content_digest(manifest, ref.output) != step.contents[name]:
            return f"{step.label}: input {name} ({ref}) was rebuilt meanwhile; run again"
    return ""


def _blame_rebuilt_input(step: Identified) -> None:
    """Called when something failed that may have read files which another process was putting others in place of.

    Raises:
        SystemFault: so it was.
    """
    rebuilt = ""
    with contextlib.suppress(LingFlowError):
        rebuilt = _rebuilt_input(step)
    if rebuilt:
        raise SystemFault(rebuilt)


def _find(step: Identified, tell: bool) -> Outcome | None:
    component, label, store = step.component, step.label, step.store
    manifest = store.manifest(component.name, step.key)
    if manifest is None:
        return None
    reason = changed_input(manifest, step.contents)
    if not reason:
        store.check_sizes(manifest)
        try:
            outcome = _outcome(component, label, manifest, store, cached=True)
        except UserError as error:
            raise UserError(f"{error}; it was made by other code, run again with --rebuild {label}") from None
        if not component.still_valid or component.still_valid(step.config, outcome.result, store.local):
            return outcome
        reason = "its effect is gone, or is asked for elsewhere"
    if tell:
        events.emit("log", step=label, text=f"was done before, but {reason}: doing it again")
    return None


def _make(
    step: Identified,
    inputs: Mapping[str, Input[Any]],
    sources: list[tuple[Ref, Manifest]],
    tracker: NullTracker,
    rebuild: bool,
) -> Outcome:
    """Run the body and commit what it made."""
    component, config, label, key, store = step.component, step.config, step.label, step.key, step.store
    partial = store.partial(component.name, key)
    outputs: dict[str, Output[Any]] = {name: Output(partial / name) for name in component.outputs}
    _begin(step, partial, rebuild)
    for output in outputs.values():
        output.path.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {**dict.fromkeys(component.inputs), **inputs, **outputs}
    if component.takes_step:
        arguments["step"] = Step(label, store.local, tracker, code_version())

    dumped = plain(config)
    events.emit("start", step=label, component=component.name, fingerprint=key)
    lineage = {name: parent.model_dump() for name, parent in step.parents.items()}
    tracker.start_step(label, component.name, key, dumped, lineage)
    record_inputs(tracker, label, sources)
    started = time.monotonic()
    try:
        result = _run_body(step, arguments)
        _check_result(component, label, result, outputs)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            component=component.name,
            label=label,
            version=component.version,
            fingerprint=key,
            config=dumped,
            identity=identity_of(config),
            inputs=step.parents,
            outputs={
                name: OutputRecord(kind=component.outputs[name].kind.schema_title, contract=output.contract)
                for name, output in outputs.items()
            },
            result=_written_result(component, result),
            files=store.describe_files(component.name, key),
            code_version=code_version(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - started, 3),
        )
        outcome = _outcome(component, label, manifest, store, cached=False)
        rebuilt = _rebuilt_input(step, patient=True)
        if rebuilt:
            raise SystemFault(rebuilt)
        store.commit(manifest)
    except BaseException:
        if not component.resumable:
            shutil.rmtree(partial, ignore_errors=True)
        tracker.finish({}, "failed")
        raise
    try:
        record_outputs(tracker, manifest, store)
    except Exception as error:  # the artifact is there, whatever becomes of its record
        events.emit("log", step=label, text=f"its outputs are not recorded ({type(error).__name__}: {error})")
    tracker.finish(manifest.result, "finished")
    return outcome


def _begin(step: Identified, partial: Path, rebuild: bool) -> None:
    """Make the partial directory, or keep what an earlier try of a resumable step left: one that read the same content
    and, in a rebuild, belongs to the same run of the DAG.
    """
    run = os.environ.get("LING_FLOW_KFP_RUN_ID") or os.environ.get("LING_FLOW_RUNNER_LOCK") or ""
    begun = {"rebuilt_in": run if rebuild else "", "inputs": step.contents}
    mark = partial / BEGUN
    try:
        before = json.loads(mark.read_text())
    except (FileNotFoundError, ValueError):
        before = None
    same_content = before is None or before.get("inputs") == step.contents
    keep = bool(run) and before == begun if rebuild else same_content
    if not (keep and step.component.resumable):
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(begun))


def _run_body(step: Identified, arguments: Mapping[str, Any]) -> Any:
    """
    Raises:
        SystemFault: the body failed, and an input is no longer what it was.
    """
    try:
        return step.component.body(step.config, **arguments)
    except SystemExit as leave:
        if leave.code in TOLD_TO_END:
            raise
        raise RuntimeError(f"{step.component.name} called {left(leave)}") from leave
    except Exception:
        _blame_rebuilt_input(step)
        raise


def left(leave: SystemExit) -> str:
    """The call by which code left the process, and what it should do instead."""
    code = "" if leave.code is None else repr(leave.code)
    return f"sys.exit({code}); it must return its result or raise an error"


def _written_result(component: Component, result: Any) -> dict[str, Any]:
    """
    Raises:
        TypeError: what would be written could not be read back.
    """
    try:
        written = plain(result)
        parse(component.result_model, json.loads(canonical_json(written)), "result")
    except (UserError, ValueError) as error:
        raise TypeError(f"{component.name} returned what cannot be read back: {error}") from None
    return written


def _check_result(component: Component, label: str, result: Any, outputs: Mapping[str, Output[Any]]) -> None:
    """
    Raises:
        TypeError: the body broke its declaration.
        UserError: a number of the result or of a contract is not finite, so training diverged.
    """
    if not isinstance(result, component.result_model):
        raise TypeError(
            f"{component.name} returned a {type(result).__name__}, declared {component.result_model.__name__}"
        )
    for name, value in _numbers("", result.model_dump()):
        if not math.isfinite(value):
            raise UserError(f"{label}: result {name} is {value}: the computation diverged with this config")
    for name, output in outputs.items():
        for path, value in _numbers(name, output.contract):
            if not math.isfinite(value):
                raise UserError(f"{label}: contract {path} is {value}: all its numbers must be finite")
        if component.outputs[name].kind is HTML and not (output.path / "index.html").is_file():
            raise TypeError(f"{component.name} wrote no {name}/index.html, which an HTML output needs")


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every float in a dumped model, by its path."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _numbers(f"{name}.{key}" if name else str(key), part)


def _outcome(component: Component, label: str, manifest: Manifest, store: ArtifactStore, cached: bool) -> Outcome:
    directory = f"{store.root}/{manifest.component}/{manifest.fingerprint}"
    result = parse(component.result_model, manifest.result, f"{directory}/manifest.json: result")
    refs = {name: store.ref(manifest.component, manifest.fingerprint, name) for name in manifest.outputs}
    return Outcome(component, label, manifest.fingerprint, cached, result, refs, manifest.seconds, manifest, store)
