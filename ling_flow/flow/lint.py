"""A graph linter: what KFP compiles without a word and then gets wrong, here or on a cluster.

Each check is a small function over the compiled PipelineSpec (plain data) that yields findings; each finding names the
task and what to do. Measured against kfp 2.17.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ling_flow.errors import UserError
from ling_flow.flow.component import Component
from ling_flow.flow.kfp_face import CONFIG_LIMIT, ENTRY_POINT, load_component

_PARAMETER = re.compile(r"inputs\.parameter_values\['([^']*)'\]")


@dataclass(frozen=True)
class Finding:
    """Something that will go wrong (`error`) or may surprise (`warning`), in local runs, on KFP clusters, or both."""

    check: str
    severity: Literal["error", "warning"]
    where: Literal["local", "kfp", "both"]
    task: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: task '{self.task}': {self.message} [{self.check}, {self.where}]"


@dataclass(frozen=True)
class Graph:
    """What the checks look at: the PipelineSpec, and the arguments the pipeline will be run with."""

    spec: Mapping[str, Any]
    arguments: Mapping[str, Any]

    def tasks(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every task of the pipeline and of the sub-graphs in it (loops, branches, nested pipelines)."""
        for part in (self.spec["root"], *self.spec.get("components", {}).values()):
            yield from part.get("dag", {}).get("tasks", {}).items()

    def container(self, task: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The container that a task runs, None for sub-graphs and importers."""
        component = self.spec.get("components", {}).get(task["componentRef"]["name"], {})
        executors = self.spec.get("deploymentSpec", {}).get("executors", {})
        return executors.get(component.get("executorLabel"), {}).get("container")

    def entry_point(self, task: Mapping[str, Any]) -> str | None:
        """`module:name` of the ling_flow component behind a task, None for anybody else's."""
        found = ENTRY_POINT.search(_command(self.container(task)))
        return found[1] if found else None

    def component(self, task: Mapping[str, Any]) -> Component | None:
        """The ling_flow component behind a task, where it can be imported."""
        entry_point = self.entry_point(task)
        try:
            return load_component(entry_point) if entry_point else None
        except UserError:
            return None

    def pipeline_values(self) -> dict[str, Any]:
        """Pipeline parameters that have a value: a default or an argument."""
        declared = self.spec["root"].get("inputDefinitions", {}).get("parameters", {})
        defaults = {name: given["defaultValue"] for name, given in declared.items() if "defaultValue" in given}
        return {**defaults, **self.arguments}


def lint(spec: Mapping[str, Any], pipeline: Any = None, arguments: Mapping[str, Any] | None = None) -> list[Finding]:
    """All findings about a compiled pipeline, errors first.

    Args:
        spec: the PipelineSpec as plain data (the IR's YAML, or `MessageToDict` of the message).
        pipeline: the `@dsl.pipeline` object or its function; without it the source is not checked.
        arguments: what the pipeline will be run with, over its defaults.
    """
    graph = Graph(spec, arguments or {})
    findings = [finding for check in CHECKS for finding in check(graph)]
    if pipeline is not None:
        findings += python_branches(getattr(pipeline, "pipeline_func", pipeline))
    return sorted(findings, key=lambda finding: finding.severity != "error")


def not_lightweight(graph: Graph) -> Iterator[Finding]:
    """`kfp.local`'s SubprocessRunner runs lightweight Python components only."""
    for name, task in graph.tasks():
        container = graph.container(task)
        if container is None:
            continue
        command = [*container.get("command", ()), *container.get("args", ())]
        baked = command[:3] == ["python3", "-m", "kfp.dsl.executor_main"]
        if baked or not any("kfp.dsl.executor_main" in part for part in command):
            yield Finding(
                "not-lightweight", "error", "local", name,
                "is a container component, which a local run cannot execute; use a component's .kfp",
            )  # fmt: skip


def loop_captures_output(graph: Graph) -> Iterator[Finding]:
    """In `kfp.local`, a ParallelFor body that takes an upstream output parameter gets the loop item in its place."""
    for name, task in graph.tasks():
        iterator = task.get("parameterIterator")
        if iterator is None:
            continue
        for channel, source in task.get("inputs", {}).get("parameters", {}).items():
            if "taskOutputParameter" in source and channel != iterator["items"].get("inputParameter"):
                output = source["taskOutputParameter"]
                yield Finding(
                    "loop-captures-output", "error", "local", name,
                    f"its body takes '{output['outputParameterKey']}' of task '{output['producerTask']}', which a "
                    "local run silently replaces by the loop item; move the loop into a nested @dsl.pipeline with the "
                    "value as its input",
                )  # fmt: skip


def quoted_condition(graph: Graph) -> Iterator[Finding]:
    """Conditions are built by text substitution: a quote inside a string breaks them, and the branch is not taken."""
    advice = "compare with a string without quotes"
    values = {f"pipelinechannel--{name}": value for name, value in graph.pipeline_values().items()}
    for name, task in graph.tasks():
        condition = task.get("triggerPolicy", {}).get("condition", "")
        compared = _PARAMETER.findall(condition)
        literals = _PARAMETER.sub("", condition)
        if '"' in literals or literals.count("'") % 2 or literals.count("'") > 2 * len(compared):
            yield Finding("quoted-condition", "error", "both", name, f"dsl.If on a string with a quote in it; {advice}")
        for channel in dict.fromkeys(compared):
            value = values.get(channel)
            if isinstance(value, str) and {"'", '"'} & set(value):
                parameter = channel.removeprefix("pipelinechannel--")
                yield Finding(
                    "quoted-condition", "error", "local", name,
                    f"dsl.If on pipeline parameter '{parameter}', whose value {value!r} has a quote in it; {advice}",
                )  # fmt: skip


def missing_argument(graph: Graph) -> Iterator[Finding]:
    """`kfp.local` cannot pass None: an optional pipeline parameter without a value fails with "Unknown value type"."""
    given = graph.pipeline_values()
    for name, declared in graph.spec["root"].get("inputDefinitions", {}).get("parameters", {}).items():
        if given.get(name) is None and declared.get("isOptional"):
            yield Finding(
                "missing-argument", "error", "local", "root",
                f"pipeline parameter '{name}' is None, which a local run cannot pass; give it a value or a default",
            )  # fmt: skip


def one_of_artifacts(graph: Graph) -> Iterator[Finding]:
    """`dsl.OneOf` on artifacts fails in `kfp.local` with "Expected 1 artifact"; on parameters it works."""
    for name, part in (("root", graph.spec["root"]), *graph.spec.get("components", {}).items()):
        for output in part.get("dag", {}).get("outputs", {}).get("artifacts", {}).values():
            if len(output.get("artifactSelectors", ())) > 1:
                yield Finding(
                    "one-of-artifacts", "error", "local", name.removeprefix("comp-"),
                    "dsl.OneOf on artifacts fails in a local run; give each branch its own consumer",
                )  # fmt: skip


def long_config(graph: Graph) -> Iterator[Finding]:
    """A task's whole input is one command line argument; above 128 KiB the operating system refuses it."""
    advice = f"at most {CONFIG_LIMIT} fit a task; put bulk data into an artifact"
    for name, task in graph.tasks():
        for parameter, source in task.get("inputs", {}).get("parameters", {}).items():
            text = source.get("runtimeValue", {}).get("constant")
            if isinstance(text, str) and len(text.encode()) > CONFIG_LIMIT:
                yield Finding(
                    "long-config", "error", "both", name, f"'{parameter}' has {len(text.encode())} bytes; {advice}"
                )
    for parameter, text in graph.pipeline_values().items():
        if isinstance(text, str) and len(text.encode()) > CONFIG_LIMIT:
            yield Finding(
                "long-config", "error", "both", "root", f"'{parameter}' has {len(text.encode())} bytes; {advice}"
            )


def cached_side_effect(graph: Graph) -> Iterator[Finding]:
    """KFP's cache knows nothing of the outside world: it would serve "deployed" for an endpoint that is gone."""
    for name, task in graph.tasks():
        component = graph.component(task)
        if component and component.still_valid and task.get("cachingOptions", {}).get("enableCache"):
            yield Finding(
                "cached-side-effect", "error", "kfp", name,
                f"{component.name} has a side effect that KFP's cache cannot see; add .set_caching_options(False)",
            )  # fmt: skip


def unknown_component(graph: Graph) -> Iterator[Finding]:
    """The step imports its component by name; what cannot be imported here will not be there either."""
    for name, task in graph.tasks():
        entry_point = graph.entry_point(task)
        if entry_point and graph.component(task) is None:
            yield Finding(
                "unknown-component", "error", "both", name,
                f"its component {entry_point} cannot be imported; is the module in the image and on the path?",
            )  # fmt: skip


CHECKS: tuple[Callable[[Graph], Iterator[Finding]], ...] = (
    not_lightweight,
    loop_captures_output,
    quoted_condition,
    missing_argument,
    one_of_artifacts,
    long_config,
    cached_side_effect,
    unknown_component,
)


def python_branches(function: Callable[..., Any]) -> Iterator[Finding]:
    """A Python `if` on a pipeline parameter or task output is decided while compiling, and always true."""
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    parameters = set(inspect.signature(function).parameters)
    for node in ast.walk(tree):
        if not isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            continue
        for part in ast.walk(node.test):
            by_name = isinstance(part, ast.Name) and part.id in parameters
            if by_name or (isinstance(part, ast.Attribute) and part.attr in ("output", "outputs")):
                yield Finding(
                    "python-branch", "error", "both", function.__name__,
                    f"line {first + node.lineno - 1}: Python decides `{ast.unparse(node.test)}` while compiling; "
                    "use dsl.If for a choice at run time",
                )  # fmt: skip
                break


def _command(container: Mapping[str, Any] | None) -> str:
    return " ".join([*container.get("command", ()), *container.get("args", ())]) if container else ""
