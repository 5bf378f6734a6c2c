"""The component contract: declare a step once, and get its KFP component, its command line and its Python call.

    @component(version=1, resources=Resources(cpus=2, memory_gib=4))
    def pretrain(config: PretrainConfig, corpus: Input[Dataset], checkpoints: Output[Model], step: Step,
                 previous: Input[Model] | None = None) -> PretrainResult:
        '''What it does, in one line.'''
        import torch  # heavy imports go inside the body

The signature is the only place that states names and types. A declaration that cannot work raises TypeError when its
module is imported. This module imports none of torch, ray, mlflow, kfp.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, TypeVar

from pydantic import BaseModel, Field
from pydantic_core import to_jsonable_python

from ling_flow.config import StrictModel, parse
from ling_flow.errors import UserError
from ling_flow.flow import events
from ling_flow.flow.fields import check_fields, leaves, with_defaults

if TYPE_CHECKING:
    from ling_flow.flow.step import Outcome
    from ling_flow.flow.tracking import NullTracker

CLI_OPTIONS = ("config", "config-json", "root", "rebuild", "json", "help")  # taken by every component's command line


class Kind:
    """Base of the artifact kinds; `schema_title` is KFP's name for it."""

    schema_title: str


class Dataset(Kind):
    schema_title = "system.Dataset"


class Model(Kind):
    schema_title = "system.Model"


class Metrics(Kind):
    schema_title = "system.Metrics"


class HTML(Kind):
    """A report for people: its directory holds a self-contained `index.html`. Never an input of a later step."""

    schema_title = "system.HTML"


RunsOn = Literal["process", "job", "ray"]
KindT = TypeVar("KindT", bound=Kind)


@dataclass(frozen=True)
class Input(Generic[KindT]):
    """An artifact given to a step: a verified local directory.

    Attributes:
        ref: `<root>/<component>/<fingerprint>/<output>`, path or URL.
        contract: what the producer promised (tokenizer, chat_template, vocab_size, context_length, precision…).
    """

    ref: str
    path: Path
    fingerprint: str
    contract: dict[str, Any]

    def read_json(self, name: str) -> Any:
        """The JSON file `name` of the artifact.

        Raises:
            UserError: there is no such file, or it is not JSON.
        """
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            raise UserError(f"{self.ref}: holds no {name}; was it made by the right component?") from None
        except ValueError as error:
            raise UserError(f"{self.ref}/{name}: not valid JSON ({error})") from None


@dataclass(frozen=True)
class Output(Generic[KindT]):
    """An artifact that a step makes: fill the directory `path`, and `contract` with what consumers must agree with."""

    path: Path
    contract: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A step's way to talk while it runs."""

    label: str
    root: Path
    tracker: NullTracker
    code_version: str

    def progress(self, done: int, total: int, text: str = "", **metrics: float) -> None:
        """Live line: `done` of `total` units of work; may be called as often as you like."""
        events.emit("progress", step=self.label, done=done, total=total, text=text, metrics=_floats(metrics))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at training step `step`, for the tracker and the live view."""
        numbers = _floats(values)
        self.tracker.metrics(numbers, step)
        events.emit("metrics", step=self.label, at=step, metrics=numbers)

    def log(self, text: str) -> None:
        """One line for a person."""
        events.emit("log", step=self.label, text=text)


class Resources(StrictModel):
    """What one execution of a component asks of the machine it runs on."""

    cpus: float = Field(1, gt=0, description="CPU cores")
    memory_gib: float = Field(1, gt=0, description="Main memory, GiB")
    gpus: int = Field(0, ge=0, description="GPUs")


@dataclass(frozen=True)
class InputSpec:
    """A declared artifact input."""

    name: str
    kind: type[Kind]
    optional: bool


@dataclass(frozen=True)
class OutputSpec:
    """A declared artifact output."""

    name: str
    kind: type[Kind]


@dataclass(frozen=True)
class Component:
    """A declared component; made by `@component`."""

    name: str
    version: int
    body: Callable[..., Any]
    config_model: type[BaseModel]
    inputs: dict[str, InputSpec]
    outputs: dict[str, OutputSpec]
    result_model: type[BaseModel]
    takes_step: bool
    resources: Resources
    resumable: bool
    label: Callable[[Any], str] | None
    resolve: Callable[[Any], Any] | None
    still_valid: Callable[[Any, Any, Path], bool] | None
    runs_on: RunsOn | Callable[[Any], RunsOn]
    planner: bool

    @property
    def description(self) -> str:
        """First line of the body's docstring."""
        return self.docs.splitlines()[0]

    @property
    def docs(self) -> str:
        """The body's docstring."""
        return inspect.getdoc(self.body) or ""

    @property
    def entry_point(self) -> str:
        """`module:name`, from which any process finds the component again."""
        return f"{self.body.__module__}:{self.name}"

    @property
    def kfp(self) -> Any:
        """The KFP lightweight component: parameter `config` (JSON text), artifacts by their names."""
        from ling_flow.flow.kfp_face import kfp_component

        return kfp_component(self)

    def label_of(self, config: Any) -> str:
        """The step's name in the live view, in MLflow and for `--rebuild`."""
        return self.label(config) if self.label else self.name

    def runs_on_of(self, config: Any) -> RunsOn:
        """Whether the step may become a Ray job, and what for."""
        return self.runs_on(config) if callable(self.runs_on) else self.runs_on

    def evaluate(self, config: BaseModel | Mapping[str, Any]) -> Any:
        """A planner's result, computed here and now; nothing is written.

        Raises:
            UserError: the config is wrong.
        """
        if not self.planner:
            raise TypeError(f"{self.name}: only planners can be evaluated without making an artifact")
        return self.body(self.parse_config(config))

    def parse_config(self, config: BaseModel | Mapping[str, Any] | str) -> Any:
        """`config` as this component's model, from the model itself, a mapping or JSON text.

        What is left out has its default, also within a nested model that is given in part.

        Raises:
            UserError: it does not fit; one line that names the first wrong field.
        """
        if isinstance(config, self.config_model):
            return config
        if isinstance(config, BaseModel):
            raise UserError(
                f"{self.name}: config must be a {self.config_model.__name__}, not a {type(config).__name__}"
            )
        if isinstance(config, Mapping):
            return parse(self.config_model, with_defaults(self.config_model, config), self.name)
        try:
            data = json.loads(config)
        except ValueError:
            data = None  # Pydantic says what is wrong
        if isinstance(data, dict):
            config = json.dumps(to_jsonable_python(with_defaults(self.config_model, data)))
        return parse(self.config_model, config, self.name)

    def __call__(
        self,
        config: BaseModel | Mapping[str, Any],
        root: str | Path | None = None,
        tracker: NullTracker | None = None,
        **inputs: str | Path | None,
    ) -> Outcome:
        """Run the step, or return at once when its artifact is already there.

        Args:
            root: artifact root, path or fsspec URL; default from the environment (`ling_flow.flow.context`).
            tracker: where metrics go; default from the environment.
            inputs: references to other steps' outputs, for example `corpus=prepared.outputs["corpus"]`.

        Raises:
            UserError: config or an input is wrong or damaged.
        """
        from ling_flow.flow.step import run_step

        return run_step(self, self.parse_config(config), inputs, root=root, tracker=tracker)

    def main(self, argv: Sequence[str] | None = None) -> NoReturn:
        """The component's command line; leaves the process with exit code 0, 1 (defect), 2 (user) or 3 (system)."""
        from ling_flow.flow.cli_face import main

        main(self, argv)


def component(
    version: int,
    resources: Resources,
    resumable: bool = False,
    label: Callable[[Any], str] | None = None,
    resolve: Callable[[Any], Any] | None = None,
    still_valid: Callable[[Any, Any, Path], bool] | None = None,
    runs_on: RunsOn | Callable[[Any], RunsOn] = "process",
    planner: bool = False,
) -> Callable[[Callable[..., Any]], Component]:
    """Declare a function as a component.

    Args:
        version: raise it by hand when the same config would now give other results.
        resumable: the output directories still hold what a killed earlier try wrote; otherwise they start empty.
        label: config → the step's name for people, where one component serves several steps.
        resolve: config → config, pins outside content (file digests) before the fingerprint is computed.
        still_valid: (config, result, root) → whether the side effect of a finished step (a registered version, an
            endpoint) still stands as `config` asks for it.
        runs_on: process: always in place. job: heavy, may become a Ray job, which then reserves `resources`. ray: the
            same, but asks Ray for workers, so that the job itself reserves nothing. Or config → one of them.
        planner: a cheap pure function of its config that resolves the configs of other components; it has no artifacts.

    Raises:
        TypeError: the signature breaks the contract; the message names the parameter.
    """

    def declare(body: Callable[..., Any]) -> Component:
        where = f"component {body.__module__}.{body.__name__}"
        try:
            hints = typing.get_type_hints(body)
        except NameError as error:
            raise TypeError(f"{where}: {error}; annotations must name things defined at module level") from None
        parameters = list(inspect.signature(body).parameters.values())
        if not inspect.getdoc(body):
            raise TypeError(f"{where}: needs a docstring whose first line says what it does")
        if not parameters or parameters[0].name != "config" or not _is_model(hints.get("config")):
            raise TypeError(f"{where}: the first parameter must be `config: SomeConfig`, a StrictModel")
        if not _is_model(hints.get("return")):
            raise TypeError(f"{where}: the return annotation must be a StrictModel with the numbers that matter")
        inputs: dict[str, InputSpec] = {}
        outputs: dict[str, OutputSpec] = {}
        takes_step = False
        for parameter in parameters[1:]:
            port = _port(parameter, hints.get(parameter.name), f"{where}: parameter {parameter.name}")
            if isinstance(port, InputSpec):
                inputs[port.name] = port
            elif isinstance(port, OutputSpec):
                outputs[port.name] = port
            else:
                takes_step = True
        check_fields(hints["config"], f"{where}: config")
        check_fields(hints["return"], f"{where}: result")
        _check_names(where, hints["config"], hints["return"], inputs, outputs)
        if planner and (inputs or outputs or takes_step):
            raise TypeError(f"{where}: a planner takes nothing but its config")
        for name, info in hints["config"].model_fields.items() if planner else ():
            if info.annotation not in (str, int, float, bool):
                raise TypeError(f"{where}: a planner's config field {name} must be a str, int, float or bool")
        return Component(
            body.__name__, version, body, hints["config"], inputs, outputs, hints["return"], takes_step,
            resources, resumable, label, resolve, still_valid, runs_on, planner,
        )  # fmt: skip

    return declare


def _port(parameter: inspect.Parameter, hint: Any, where: str) -> InputSpec | OutputSpec | type[Step]:
    if hint is Step:
        if parameter.name != "step":
            raise TypeError(f"{where}: must be called `step`")
        return Step
    has_default = parameter.default is not inspect.Parameter.empty
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint)
    if optional:
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        hint = members[0] if len(members) == 1 else None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin not in (Input, Output):
        raise TypeError(f"{where}: must be `Input[Kind]`, `Input[Kind] | None = None`, `Output[Kind]` or `step: Step`")
    kind = arguments[0]
    if not (isinstance(kind, type) and issubclass(kind, Kind) and kind is not Kind):
        raise TypeError(f"{where}: kind must be one of Dataset, Model, Metrics, HTML")
    if origin is Output:
        if optional or has_default:
            raise TypeError(f"{where}: an output cannot be optional")
        return OutputSpec(parameter.name, kind)
    if kind is HTML:
        raise TypeError(f"{where}: HTML is for people and cannot be an input")
    if optional != has_default or (has_default and parameter.default is not None):
        raise TypeError(f"{where}: an optional input is written `Input[{kind.__name__}] | None = None`")
    return InputSpec(parameter.name, kind, optional)


def _check_names(
    where: str,
    config: type[BaseModel],
    result: type[BaseModel],
    inputs: Mapping[str, InputSpec],
    outputs: Mapping[str, OutputSpec],
) -> None:
    """Names must not meet in the command line (options) nor in KFP (output artifacts beside output parameters)."""
    options = {name: "a command line option of every component" for name in CLI_OPTIONS}
    options |= {name: f"the input {name}" for name in inputs}
    for leaf in leaves(config):
        if leaf.path in options:
            raise TypeError(f"{where}: config field {leaf.path} has the name of {options[leaf.path]}")
    for name in inputs:
        if name in CLI_OPTIONS:
            raise TypeError(f"{where}: input {name} has the name of a command line option of every component")
    for name in result.model_fields:
        if name in outputs:
            raise TypeError(f"{where}: result field {name} has the name of an output")


def _is_model(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, StrictModel)


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    """Plain floats, so that 0-d tensors and numpy scalars can be written as JSON."""
    return {name: float(value) for name, value in values.items()}
