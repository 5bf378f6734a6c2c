"""A DAG as data: the compiled KFP graph, its nodes as our components, and the plan (what is cached, what runs, why).

KFP executes the graph, here and on a cluster; this module only reads the PipelineSpec that KFP's own compiler makes.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ling_flow.config import identity_of, parse
from ling_flow.errors import LingFlowError, SystemFault, UserError
from ling_flow.flow.artifact import ArtifactStore, Manifest, changed_input, content_digest
from ling_flow.flow.component import Component
from ling_flow.flow.identity import code_version, fingerprint
from ling_flow.flow.kfp_face import ENTRY_POINT, config_parameters, load_component

if TYPE_CHECKING:
    from ling_flow.flow.profile import Profile

_EXACT = 2**53
_TYPES = {str: "STRING", int: "NUMBER_INTEGER", float: "NUMBER_DOUBLE", bool: "BOOLEAN"}  # what is given, to KFP
_CHANNEL = "pipelinechannel--"  # KFP's prefix of the task inputs that an f-string is made of
_PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['(" + _CHANNEL + r"[^']*)'\]\}\}")


@dataclass(frozen=True)
class LoadedDag:
    """A pipeline function found by name or file, and its PipelineSpec as plain data."""

    name: str
    pipeline: Any
    spec: dict[str, Any]

    @property
    def parameters(self) -> dict[str, Any]:
        """Pipeline parameters and their defaults (None where there is none)."""
        declared = self.declared
        return {
            name: _typed(declared[name].get("defaultValue"), declared[name]["parameterType"])
            for name in sorted(declared)
        }

    @property
    def declared(self) -> dict[str, Any]:
        """Pipeline parameters as the PipelineSpec declares them."""
        parameters: dict[str, Any] = self.spec["root"].get("inputDefinitions", {}).get("parameters", {})
        return parameters


@dataclass(frozen=True)
class Node:
    """One task of a DAG, resolved: which component, with which config and inputs, and whether its artifact is there.

    Steps whose components give them the same label are numbered in the order of the plan: `use`, `use-2`…
    """

    task: str
    label: str
    numbered: bool
    component: Component
    config: Any
    inputs: Mapping[str, str | None]  # input name → reference "<root>/<component>/<fingerprint>/<output>"
    fingerprint: str
    manifest: Manifest | None  # of the artifact that it is served from
    reason: str
    needs: tuple[str, ...] = field(default=())  # labels of the nodes it waits for

    @property
    def cached(self) -> bool:
        """Whether it is served from its artifact."""
        return self.manifest is not None

    @property
    def state(self) -> str:
        """`cached` or `run`."""
        return "cached" if self.cached else "run"


def load_dag(name: str) -> LoadedDag:
    """Find a pipeline: `lifecycle` is `dags/lifecycle.py`, else a path to a file; the function is called like the file.

    Raises:
        UserError: no such DAG, or the file defines no KFP pipeline of that name.
    """
    from google.protobuf import json_format

    module = _load_module(name)
    function_name = Path(name).stem
    pipeline = getattr(module, function_name, None)
    if pipeline is None or not hasattr(pipeline, "pipeline_spec"):
        raise UserError(f"{name}: defines no @dsl.pipeline function called {function_name!r}")
    return LoadedDag(function_name, pipeline, json_format.MessageToDict(pipeline.pipeline_spec))


def _load_module(name: str) -> Any:
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name}: no such file")
        sys.path.insert(0, str(Path.cwd()))  # a DAG of one's own imports components of one's own
        spec = importlib.util.spec_from_file_location(_module_name(path), path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # KFP reads a function's source through its module
        try:
            spec.loader.exec_module(module)
        except LingFlowError:
            raise
        except (Exception, SystemExit) as error:
            reason = f"{_where(error, path)}{type(error).__name__}: {error}"
            raise UserError(f"{name}: cannot be imported ({reason})") from None
        return module
    if not re.fullmatch(r"\w+", name) or importlib.util.find_spec(f"dags.{name}") is None:
        raise UserError(f"DAG {name!r}: not found; known: {', '.join(known_dags())}, or a path to a .py file")
    return importlib.import_module(f"dags.{name}")


def _module_name(path: Path) -> str:
    """What the module of a DAG's file is called: as the file, so that steps find components declared in it; but not
    where that is the name of something else, such as the package whose components it uses."""
    try:
        known = importlib.util.find_spec(path.stem)
    except (ImportError, ValueError):  # not a name that can be imported
        return f"_dag_{path.stem}"
    if known is None or (known.origin and Path(known.origin).resolve() == path.resolve()):
        return path.stem
    return f"_dag_{path.stem}"


def _where(error: BaseException, path: Path) -> str:
    """The line of the file that an error came from."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
        line = frame.lineno if Path(frame.filename) == path else line
    return f"line {line}: " if line else ""


def known_dags() -> list[str]:
    """Names of the pipelines in `dags/`."""
    spec = importlib.util.find_spec("dags")
    places = list(spec.submodule_search_locations or []) if spec else []
    return sorted(path.stem for place in places for path in Path(place).glob("*.py") if not path.stem.startswith("_"))


def pipeline_arguments(dag: LoadedDag, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` (preset, overrides, seed…) as arguments of the pipeline, defaults filled in.

    Raises:
        UserError: the pipeline has no such parameter, or it does not take such a value.
    """
    defaults = dag.parameters
    arguments = dict(defaults)
    for name, value in given.items():
        if name not in defaults:
            raise UserError(f"DAG {dag.name!r} takes no parameter {name!r}; it takes: {', '.join(defaults) or 'none'}")
        parameter_type = dag.declared[name]["parameterType"]
        arguments[name] = _typed(value, parameter_type)
        if _TYPES.get(type(arguments[name])) != parameter_type:
            raise UserError(
                f"DAG {dag.name!r}: parameter {name!r} is a {parameter_type} there; it cannot be given as {value!r}"
            )
    for name, value in arguments.items():
        if dag.declared[name]["parameterType"] == "NUMBER_INTEGER":
            _check_exact(value, f"DAG {dag.name!r}: parameter {name!r}")
    return arguments


def make_plan(
    dag: LoadedDag, arguments: Mapping[str, Any], store: ArtifactStore, rebuild: frozenset[str]
) -> list[Node]:
    """Resolve every node in execution order: planners are evaluated, fingerprints follow from configs and edges.

    Raises:
        UserError: a config is wrong (the line names phase and field), or `rebuild` names no node.
    """
    nodes: dict[str, Node] = {}
    results: dict[str, BaseModel] = {}
    tasks = dag.spec["root"]["dag"]["tasks"]
    for task in _in_order(tasks):
        component = _component_of(dag.spec, tasks[task])
        node = _resolve(dag, task, tasks[task], component, arguments, nodes, results, store, rebuild)
        nodes[task] = node
        if component.planner:
            results[task] = component.evaluate(node.config)
    labels = [node.label for node in nodes.values()]
    for label in sorted(rebuild - set(labels)):
        raise UserError(f"--rebuild {label}: no such step; steps are {', '.join(labels)}")
    return list(nodes.values())


def _in_order(tasks: Mapping[str, Any]) -> list[str]:
    """Task names so that each comes after those it depends on, and otherwise by name and KFP's number.

    Protobuf's maps have no order of their own; KFP numbers the tasks of one component as they were written.
    """

    def by_number(task: str) -> tuple[str, int]:
        name, _, number = task.rpartition("-")
        return (name, int(number)) if number.isdecimal() else (task, 1)

    ordered: list[str] = []
    waiting = sorted(tasks, key=by_number)
    while waiting:
        ready = next((task for task in waiting if set(tasks[task].get("dependentTasks", ())) <= set(ordered)), None)
        if ready is None:
            raise UserError(f"the graph has a cycle among {', '.join(waiting)}")
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


def _component_of(spec: Mapping[str, Any], task: Mapping[str, Any]) -> Component:
    name = task["componentRef"]["name"]
    executor = spec["components"][name].get("executorLabel")
    container = spec["deploymentSpec"]["executors"].get(executor, {}).get("container", {})
    found = ENTRY_POINT.search(" ".join([*container.get("command", ()), *container.get("args", ())]))
    if not found:
        raise UserError(
            f"task {task['taskInfo']['name']!r}: is not made by a component's .kfp, so its identity is unknown"
        )
    return load_component(found[1])


def _resolve(
    dag: LoadedDag,
    task: str,
    spec: Mapping[str, Any],
    component: Component,
    arguments: Mapping[str, Any],
    nodes: Mapping[str, Node],
    results: Mapping[str, BaseModel],
    store: ArtifactStore,
    rebuild: frozenset[str],
) -> Node:
    sources = spec.get("inputs", {}).get("parameters", {})
    given = {name: _parameter(dag, task, source, arguments, results) for name, source in sources.items()}
    for name, value in given.items():
        if isinstance(value, int) or config_parameters(component).get(name, (str, None))[0] is int:
            _check_exact(value, f"task {task!r}: {name.removeprefix(_CHANNEL)!r}")
    given = {name: _filled(task, given[name], given) for name in given if not name.startswith(_CHANNEL)}
    config = component.parse_config(given if component.planner else given.get("config", "{}"))
    if component.resolve:
        config = component.resolve(config)
    inputs: dict[str, str | None] = {name: None for name in component.inputs}
    identities: dict[str, str] = {}
    contents: dict[str, str] = {}  # of the inputs that are there and stay
    upstream = {}
    edges = spec.get("inputs", {}).get("artifacts", {})
    for name in (name for name in component.inputs if name in edges):  # protobuf's maps have no order of their own
        if "componentInputArtifact" in edges[name]:
            parameter = edges[name]["componentInputArtifact"]
            raise UserError(
                f"DAG {dag.name!r}: its parameter {parameter!r} is an artifact, which cannot be given from here; let a "
                "step of the DAG make it"
            )
        edge = edges[name]["taskOutputArtifact"]
        producer = nodes[edge["producerTask"]]
        identities[name] = f"{producer.fingerprint}/{edge['outputArtifactKey']}"
        inputs[name] = store.ref(producer.component.name, producer.fingerprint, edge["outputArtifactKey"])
        upstream[producer.label] = producer
        if producer.manifest is not None:
            contents[name] = content_digest(producer.manifest, edge["outputArtifactKey"])
    key = fingerprint(component.name, component.version, config, identities)
    own = component.label_of(config)
    label = _free_label(own, key, nodes.values())
    manifest, reason = _judge(component, config, label, key, upstream, contents, store, rebuild)
    needs = tuple(nodes[name].label for name in nodes if name in spec.get("dependentTasks", ()))
    return Node(task, label, label != own, component, config, inputs, key, manifest, reason, needs)


def _free_label(own: str, key: str, nodes: Iterable[Node]) -> str:
    """`own`, or with a number where another step has it; twice the same step has one label."""
    taken = {node.label: node.fingerprint for node in nodes}
    candidates = itertools.chain([own], (f"{own}-{number}" for number in itertools.count(2)))
    return next(label for label in candidates if taken.get(label, key) == key)


def _parameter(
    dag: LoadedDag, task: str, source: Mapping[str, Any], arguments: Mapping[str, Any], results: Mapping[str, BaseModel]
) -> Any:
    if "runtimeValue" in source:
        return source["runtimeValue"]["constant"]
    if "componentInputParameter" in source:
        return arguments[source["componentInputParameter"]]
    output = source["taskOutputParameter"]
    if output["producerTask"] not in results:
        raise UserError(f"task {task!r}: its config comes from {output['producerTask']!r}, which is no planner")
    value = getattr(results[output["producerTask"]], output["outputParameterKey"])
    return value.model_dump_json() if isinstance(value, BaseModel) else value


def _filled(task: str, value: Any, given: Mapping[str, Any]) -> Any:
    """An f-string over pipeline parameters as `kfp.local` fills it in: numbers come to it as doubles, so 3 is "3.0"."""
    if not isinstance(value, str):
        return value

    def text(found: re.Match[str]) -> str:
        part = given[found[1]]
        number = isinstance(part, int) and not isinstance(part, bool)
        return part if isinstance(part, str) else json.dumps(float(part) if number else part)

    filled = _PLACEHOLDER.sub(text, value)
    unknown = re.search(r"\{\{\$\..*?\}\}", _PLACEHOLDER.sub("", value))
    if unknown:
        raise UserError(
            f"task {task!r}: its config holds {unknown[0]}, which is known only while it runs; leave it out"
        )
    return filled


def _typed(value: Any, parameter_type: str) -> Any:
    """A number as KFP's `parameter_type` wants it: protobuf's Struct turns integers into doubles."""
    kind = {"NUMBER_INTEGER": int, "NUMBER_DOUBLE": float}.get(parameter_type)
    return kind(value) if kind and isinstance(value, int | float) and not isinstance(value, bool) else value


def _check_exact(value: Any, where: str) -> None:
    """
    Raises:
        UserError: an integer that KFP, whose numbers are doubles, would round.
    """
    if isinstance(value, int | float) and abs(value) >= _EXACT:
        raise UserError(f"{where} is {value}: integers from 2^53 on would not be exact in KFP; give a smaller one")


def _judge(
    component: Component,
    config: BaseModel,
    label: str,
    key: str,
    upstream: Mapping[str, Node],
    contents: Mapping[str, str],
    store: ArtifactStore,
    rebuild: frozenset[str],
) -> tuple[Manifest | None, str]:
    """The manifest of the artifact that the node is served from (None where it runs), and why in one sentence.

    Args:
        contents: input name → digest of what it holds, of the inputs that are not made again.
    """
    if label in rebuild:
        return None, "asked for by --rebuild"
    manifest = store.manifest(component.name, key)
    if manifest is None:
        return None, _why_missing(component, label, key, identity_of(config), upstream, store)
    known = {name: parent for name, parent in manifest.inputs.items() if name in contents}
    if changed := changed_input(manifest.model_copy(update={"inputs": known}), contents):
        return None, changed
    store.check_sizes(manifest)
    result = parse(
        component.result_model, manifest.result, f"{store.root}/{component.name}/{key}/manifest.json: result"
    )
    try:
        stands = component.still_valid is None or component.still_valid(config, result, store.local)
    except SystemFault as error:  # the step will ask again
        return manifest, f"done before, but whether its effect still stands is not known: {error}"
    if not stands:
        return (
            None,
            "its effect is gone: the registered version or the endpoint it made is no longer the one that is asked for",
        )
    if redone := [name for name, node in upstream.items() if not node.cached]:
        return manifest, f"done before; redone if {', '.join(redone)} gives other content now"
    if manifest.code_version != code_version():
        return manifest, f"made by other code, {manifest.code_version}; --rebuild {label} redoes it"
    return manifest, ""


def _why_missing(
    component: Component,
    label: str,
    key: str,
    identity: Mapping[str, Any],
    upstream: Mapping[str, Node],
    store: ArtifactStore,
) -> str:
    """What differs from the newest artifact of the same step."""
    waiting = [name for name, node in upstream.items() if not node.cached]
    if component.resumable and store.partial(component.name, key).is_dir():
        return "begun earlier and not finished; goes on from its last checkpoint"
    if waiting:
        return f"needs {', '.join(waiting)}"
    newest: Manifest | None = None
    for path in (store.local / component.name).glob(
        "*/manifest.json"
    ):  # of a remote store, those that were copied here
        if path.parent.name.endswith((".partial", ".old")):
            continue
        manifest = store.manifest(component.name, path.parent.name)
        if manifest and manifest.label == label and (newest is None or manifest.created > newest.created):
            newest = manifest
    if newest is None:
        return "no artifact yet"
    if newest.version != component.version:
        return f"the component's version rose from {newest.version} to {component.version}"
    changes = list(_differences(newest.identity, identity))
    if not changes:
        return f"other inputs than {newest.fingerprint}"
    return "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """`path: old → new` for each leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif old != new:
        shown = (text if len(text) <= 40 else f"{text[:37]}…" for text in (str(old), str(new)))
        yield f"{path}: {' → '.join(shown)}"


def compile_to(dag: LoadedDag, path: Path, profile: Profile | None = None, where: str = "profile") -> None:
    """Write the DAG as KFP's IR YAML, whole or not at all; for Kubernetes, as a profile says, with a second document.

    Raises:
        UserError: the file is not called .yaml, or cannot be written; or the profile (`where`) does not fit the DAG.
    """
    from kfp import compiler

    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: the file must end in .yaml, as Kubeflow Pipelines wants it")
    pipeline = dag.pipeline
    if profile is not None:
        from ling_flow.flow.kubeflow_tasks import with_profile

        pipeline = with_profile(pipeline, profile, where)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}.yaml")
    try:
        compiler.Compiler().compile(pipeline, str(temporary))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)
