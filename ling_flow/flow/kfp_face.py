"""The KFP face of a component: a lightweight Python component generated from the declaration.

Its config travels as one JSON string (KFP's numbers are doubles, its dicts lose integers); each result field is an
output parameter. KFP's artifacts are small JSON references `{uri, component, fingerprint, output, kind, contract}`: the
bytes stay in our artifact root, or KFP's launcher would copy every checkpoint into every pod. Only HTML reports are
real files, so that the KFP UI can show them.
"""

from __future__ import annotations

import fcntl
import functools
import importlib
import json
import linecache
import os
import pkgutil
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from ling_flow.config import canonical_json, plain
from ling_flow.errors import SystemFault, UserError
from ling_flow.flow.events import report_failure
from ling_flow.flow.fields import leaves, type_text

if TYPE_CHECKING:
    from ling_flow.flow.component import Component
    from ling_flow.flow.step import Outcome

DEFAULT_IMAGE = "ling-flow:0.1.0"
CONFIG_LIMIT = 64 * 1024  # bytes; a task's whole input is one command line argument, and those end at 128 KiB
ENTRY_POINT = re.compile(r"run_kfp_step\('([\w.]+:\w+)'")  # in the source of every generated component
_NATURAL = (float, int, bool, str)
_RUNNER_POLL_SECONDS = 1.0
_LEAVE_SECONDS = 30.0  # to save and to close its run in, once told to end


def kfp_component(component: Component) -> Any:
    """The component as a `kfp.dsl` component over the image named by LING_FLOW_IMAGE."""
    if component.body.__module__ == "__main__":
        raise UserError(f"{component.name}: declare it in a module, so that a step's process can import it")
    return _build(component.entry_point, os.environ.get("LING_FLOW_IMAGE") or DEFAULT_IMAGE)


@functools.cache
def _build(entry_point: str, image: str) -> Any:
    import typing

    from kfp import dsl

    component = load_component(entry_point)
    source = kfp_source(component)
    filename = f"<ling_flow kfp component {entry_point}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)  # for inspect.getsource
    namespace = {**vars(dsl), "NamedTuple": typing.NamedTuple, "__name__": component.body.__module__}
    exec(
        compile(source, filename, "exec", dont_inherit=True), namespace
    )  # our own __future__ would make texts of types
    return dsl.component(base_image=image, install_kfp_package=False)(namespace[component.name])


def load_component(entry_point: str) -> Component:
    """The component that `module:name` stands for.

    Raises:
        UserError: there is no such module, or no such component in it.
    """
    from ling_flow.flow.component import Component

    module_name, _, name = entry_point.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise UserError(f"{entry_point}: expected MODULE:NAME, like components.pretrain:pretrain")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a component of one's own
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{entry_point}: no module called {error.name}, here or among those installed") from None
    except SyntaxError as error:
        raise UserError(f"{entry_point}: cannot be imported ({error.filename}:{error.lineno}: {error.msg})") from None
    found = getattr(module, name, None)
    if not isinstance(found, Component):
        raise UserError(f"{entry_point}: module {module_name} declares no component '{name}'")
    return found


def component_names() -> list[str]:
    """Names of this project's components, without importing them."""
    import components

    return [module.name for module in pkgutil.iter_modules(components.__path__) if module.ispkg]


def kfp_source(component: Component) -> str:
    """Source of the function that KFP ships to the step: one import and one call, no module globals."""
    needed: list[str] = []
    defaulted: list[str] = []
    for name, (kind, default) in config_parameters(component).items():
        (needed if default is None else defaulted).append(
            f"{name}: {kind.__name__}" + ("" if default is None else f" = {default!r}")
        )
    for spec in component.inputs.values():
        (defaulted if spec.optional else needed).append(
            f"{spec.name}: Input[{spec.kind.__name__}]" + (" = None" if spec.optional else "")
        )
    needed += [f"{spec.name}: Output[{spec.kind.__name__}]" for spec in component.outputs.values()]
    fields = [f"({name!r}, {kind.__name__})" for name, kind in result_parameters(component).items()]
    returns = f" -> NamedTuple('Outputs', [{', '.join(fields)}])" if fields else ""
    config = _names(config_parameters(component)) if component.planner else "config"
    inputs, outputs = _names(component.inputs), _names(component.outputs)
    return (
        f"def {component.name}({', '.join(needed + defaulted)}){returns}:\n"
        f"    {_docstring(component)!r}\n"
        f"    from ling_flow.flow.kfp_face import run_kfp_step\n"
        f"    return run_kfp_step({component.entry_point!r}, {config}, {inputs}, {outputs})\n"
    )


def _names(names: Iterable[str]) -> str:
    """Source of a dict from each name to the variable of that name."""
    return "{" + ", ".join(f"{name!r}: {name}" for name in names) + "}"


def config_parameters(component: Component) -> dict[str, tuple[type, Any]]:
    """KFP parameter → (type, default; None: must be given).

    A planner's config fields stand alone, for pipeline parameters to flow into; any other config is one JSON string.
    """
    if not component.planner:
        return {"config": (str, default_config(component))}
    return {
        name: (
            parameter_type(field.annotation),
            None if field.is_required() else field.get_default(call_default_factory=True),
        )
        for name, field in component.config_model.model_fields.items()
    }


def default_config(component: Component) -> str | None:
    """JSON of the config's defaults, None where a field must be given."""
    try:
        return canonical_json(plain(component.config_model()))
    except ValidationError:
        return None


def result_parameters(component: Component) -> dict[str, type]:
    """Result field → type of its KFP output parameter; what is no number, bool or text travels as JSON text."""
    return {name: parameter_type(field.annotation) for name, field in component.result_model.model_fields.items()}


def parameter_type(annotation: Any) -> type:
    """How KFP carries a field: numbers and bools as themselves, all else as text."""
    return next((kind for kind in _NATURAL if annotation is kind), str)


def run_kfp_step(
    entry_point: str, config: str | Mapping[str, Any], inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> tuple[Any, ...] | None:
    """The body of every generated KFP component; ends the process with the error's exit code when the step fails.

    Args:
        config: JSON text; a mapping of fields for planners.
        inputs: name → KFP artifact that holds a reference, or None.
        outputs: name → KFP artifact to fill.
    """
    from ling_flow.flow.step import TOLD_TO_END, exit_on_sigterm, left, run_step

    exit_on_sigterm()
    label = entry_point.partition(":")[2]
    _end_with_runner()
    try:
        component = load_component(entry_point)
        size = len(config.encode()) if isinstance(config, str) else 0
        if size > CONFIG_LIMIT:
            raise UserError(f"{component.name}: config is {size} bytes of JSON, at most {CONFIG_LIMIT} fit a KFP task")
        parsed = component.parse_config(config)
        label = component.label_of(parsed)
        outcome = run_step(component, parsed, {name: _read_ref(name, artifact) for name, artifact in inputs.items()})
        _fill(outcome, outputs)
        return tuple(_parameter(outcome.result, name) for name in result_parameters(component)) or None
    except SystemExit as leave:
        if leave.code in TOLD_TO_END:
            raise
        raise SystemExit(report_failure(label, RuntimeError(f"{label} called {left(leave)}"))) from None
    except Exception as error:
        raise SystemExit(report_failure(label, error)) from None


def _end_with_runner() -> None:
    """A local step must not train on unseen after `lingflow run` has ended: it is told to end too, and then made to.

    The runner holds a lock on a file while it lives: that is seen from inside a container too, a process id is not.
    """
    path = os.environ.get("LING_FLOW_RUNNER_LOCK")
    if not path:
        return

    def watch() -> None:
        while True:
            time.sleep(_RUNNER_POLL_SECONDS)
            try:
                with open(path, "rb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except FileNotFoundError:
                pass  # its directory was removed
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_LEAVE_SECONDS)
            os._exit(SystemFault.exit_code)

    threading.Thread(target=watch, name="runner-watch", daemon=True).start()


def _read_ref(name: str, artifact: Any) -> str | None:
    if artifact is None:
        return None
    try:
        return str(json.loads(Path(artifact.path).read_text())["uri"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"input '{name}': {artifact.path} is not a reference written by a ling_flow step") from None


def _fill(outcome: Outcome, outputs: Mapping[str, Any]) -> None:
    """Write each KFP output: the reference, or the report itself for HTML."""
    for name, artifact in outputs.items():
        record = outcome.manifest.outputs[name]
        artifact.metadata["fingerprint"] = outcome.fingerprint
        artifact.metadata["uri"] = outcome.refs[name]
        if record.kind == "system.HTML":
            content = (outcome.path(name) / "index.html").read_bytes()
        else:
            reference = {
                "uri": outcome.refs[name],
                "component": outcome.component.name,
                "fingerprint": outcome.fingerprint,
                "output": name,
                **record.model_dump(mode="json"),
            }
            content = json.dumps(reference, indent=1).encode()
        Path(artifact.path).write_bytes(content)
        if record.kind == "system.Metrics":
            for field, kind in result_parameters(outcome.component).items():
                if kind in (float, int):
                    artifact.log_metric(field, getattr(outcome.result, field))


def _parameter(result: BaseModel, name: str) -> Any:
    """A result field as the value of its output parameter."""
    value = plain(result)[name]
    natural = type(result).model_fields[name].annotation in _NATURAL or isinstance(value, str)
    return value if natural else json.dumps(value)


def _docstring(component: Component) -> str:
    """Google style, which KFP reads into the IR: what the step does, each config field, each artifact, each result."""
    fields = []
    for leaf in leaves(component.config_model):
        facts = [leaf.type, *([leaf.constraints] if leaf.constraints else [])]
        facts.append("required" if leaf.required else f"default {json.dumps(leaf.default, ensure_ascii=False)}")
        fields.append(f"{leaf.path} ({', '.join(facts)}): {leaf.description}")
    if component.planner:
        entries = {name: field.description or "" for name, field in component.config_model.model_fields.items()}
    else:
        entries = {"config": f"JSON text of {component.config_model.__name__}. Fields: " + " | ".join(fields)}
    entries |= {
        spec.name: f"{spec.kind.__name__} artifact{' (optional)' if spec.optional else ''}"
        for spec in component.inputs.values()
    }
    returns = {spec.name: f"{spec.kind.__name__} artifact" for spec in component.outputs.values()}
    returns |= {
        name: f"{type_text(field.annotation)}: {field.description or ''}"
        for name, field in component.result_model.model_fields.items()
    }
    return "\n\n".join([component.docs, _section("Args", entries), _section("Returns", returns)])


def _section(title: str, entries: Mapping[str, str]) -> str:
    lines = [f"{name}: {' '.join(text.split())}" for name, text in entries.items()]
    return f"{title}:\n" + textwrap.indent("\n".join(lines), "    ")
