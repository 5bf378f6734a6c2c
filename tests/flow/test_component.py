"""The declaration: what it reads from a signature, what it refuses, and that its three faces say the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, Field, RootModel, SecretStr, computed_field
from toy.average import AverageConfig, AverageResult, average
from toy.draw import DrawConfig, DrawResult, Noise, draw
from toy.planned import PlanConfig, PlanResult, plan

from ling_flow.config import StrictModel
from ling_flow.errors import UserError
from ling_flow.flow.component import HTML, Dataset, Input, Kind, Metrics, Model, Output, Resources, Step, component
from ling_flow.flow.fields import leaves, with_defaults


class Loose(BaseModel):
    x: int = 1


class Clash(StrictModel):
    root: str = Field("x", description="has the name of an option")


class Listed(StrictModel):
    sizes: list[int] = Field([1], description="Sizes")


def test_signature_is_the_declaration() -> None:
    assert (average.name, average.version, average.description) == ("average", 1, "Average the numbers.")
    assert (average.config_model, average.result_model) == (AverageConfig, AverageResult)
    assert {name: (spec.kind, spec.optional) for name, spec in average.inputs.items()} == {
        "numbers": (Dataset, False),
        "summary": (Metrics, True),
        "previous": (Model, True),
    }
    assert {name: spec.kind for name, spec in average.outputs.items()} == {"model": Model}
    assert (average.takes_step, draw.takes_step) == (False, True)
    assert draw.label_of(DrawConfig(name="a")) == "draw_a" and average.label_of(AverageConfig(power=1)) == "average"
    assert average.entry_point == "toy.average:average"


def loose_config(config: Loose) -> DrawResult:
    """Bad."""


def other_first(settings: DrawConfig) -> DrawResult:
    """Bad."""


def no_result(config: DrawConfig):
    """Bad."""


def undocumented(config: DrawConfig) -> DrawResult: ...


def plain_parameter(config: DrawConfig, corpus: str) -> DrawResult:
    """Bad."""


def no_kind(config: DrawConfig, corpus: Input[Kind]) -> DrawResult:
    """Bad."""


def html_input(config: DrawConfig, report: Input[HTML]) -> DrawResult:
    """Bad."""


def optional_output(config: DrawConfig, model: Output[Model] | None = None) -> DrawResult:
    """Bad."""


def optional_without_default(config: DrawConfig, corpus: Input[Dataset] | None) -> DrawResult:
    """Bad."""


def step_by_another_name(config: DrawConfig, progress: Step) -> DrawResult:
    """Bad."""


def option_name(config: Clash) -> DrawResult:
    """Bad."""


def field_and_input(config: DrawConfig, name: Input[Dataset]) -> DrawResult:
    """Bad."""


def result_and_output(config: DrawConfig, mean: Output[Dataset]) -> DrawResult:
    """Bad."""


def unknown_name(config: DrawConfig, x: "Input[Nowhere]") -> DrawResult:  # noqa: F821
    """Bad."""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (loose_config, "the first parameter must be `config: SomeConfig`, a StrictModel"),
        (other_first, "the first parameter must be `config"),
        (no_result, "the return annotation must be a StrictModel"),
        (undocumented, "needs a docstring"),
        (plain_parameter, "parameter corpus: must be `Input"),
        (no_kind, "parameter corpus: kind must be one of Dataset, Model, Metrics, HTML"),
        (html_input, "parameter report: HTML is for people"),
        (optional_output, "parameter model: an output cannot be optional"),
        (optional_without_default, r"parameter corpus: an optional input is written `Input\[Dataset\] \| None = None`"),
        (step_by_another_name, "parameter progress: must be called `step`"),
        (option_name, "config field root has the name of a command line option"),
        (field_and_input, "config field name has the name of the input name"),
        (result_and_output, "result field mean has the name of an output"),
        (unknown_name, "name 'Nowhere' is not defined; annotations must name things defined at module level"),
    ],
)
def test_bad_declarations_are_refused(body, message) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        component(version=1, resources=Resources())(body)
    assert body.__name__ in str(caught.value)


class Key(StrictModel):
    key: SecretStr | None = None


class Holder(StrictModel):
    keys: dict[str, list[Key]] = Field({})


class Raw(StrictModel):
    raw: bytes = b"\xff"


class Aliased(StrictModel):
    rate: float = Field(0.1, alias="learningRate")


class Excluded(StrictModel):
    place: str = Field("x", exclude=True)


class Dependent(StrictModel):
    size: int = 1
    twice: int = Field(default_factory=lambda data: data["size"] * 2)


class Computed(StrictModel):
    size: int = 1

    @computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return 2 * self.size


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Holder, "field key of Key is a secret, .* read it from an environment variable"),
        (Raw, "field raw of Raw is of bytes, .* make it a str"),
        (Aliased, "field rate of Aliased has an alias; give the field the one name"),
        (Excluded, "field place of Excluded is excluded .* `context_field`"),
        (Dependent, "field twice of Dependent takes its default from other fields; .*`model_validator`"),
        (Computed, "field twice of Computed is computed .* make it a plain property"),
    ],
)
def test_fields_that_cannot_be_kept_are_refused(model: type[StrictModel], message: str) -> None:
    def body(config: StrictModel) -> StrictModel:
        """Bad."""
        raise AssertionError

    for annotations in ({"config": model, "return": DrawResult}, {"config": DrawConfig, "return": model}):
        body.__annotations__ = annotations
        with pytest.raises(TypeError, match=message):
            component(version=1, resources=Resources())(body)


class Numbers(RootModel[list[int]]):
    pass


class Rooted(StrictModel):
    numbers: Numbers = Numbers([1])
    names: set[str] = Field({"b", "a"})


def test_a_root_model_and_a_set_are_one_option_each() -> None:
    assert [(leaf.path, leaf.default) for leaf in leaves(Rooted)] == [("numbers", [1]), ("names", ["a", "b"])]


def planner_with_output(config: PlanConfig, model: Output[Model]) -> PlanResult:
    """Bad."""


def planner_of_lists(config: Listed) -> PlanResult:
    """Bad."""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (planner_with_output, "takes nothing but its config"),
        (planner_of_lists, "config field sizes must be a str, int, float or bool"),
    ],
)
def test_bad_planners_are_refused(body, message) -> None:
    with pytest.raises(TypeError, match=message):
        component(version=1, resources=Resources(), planner=True)(body)


def test_planner_is_evaluated_in_place(home: Path) -> None:
    assert plan.evaluate({"size": 7}).draw.count == 7
    assert not home.exists()
    with pytest.raises(TypeError, match="only planners"):
        draw.evaluate({})


def test_parse_config_takes_model_mapping_and_json() -> None:
    config = DrawConfig(count=5)
    assert draw.parse_config(config) is config
    assert draw.parse_config({"count": 5}) == draw.parse_config('{"count": 5}') == config
    with pytest.raises(UserError, match=r"^draw\.noise\.scael: unknown field; did you mean 'scale'\?$"):
        draw.parse_config({"noise": {"scael": 1.0}})
    with pytest.raises(UserError, match="config must be a DrawConfig, not a AverageConfig"):
        draw.parse_config(AverageConfig(power=1))


def test_nested_defaults_survive_partial_changes() -> None:
    tree = with_defaults(DrawConfig, {"noise": {"shape": "uniform"}})
    assert DrawConfig.model_validate(tree).noise.model_dump() == {"scale": 2.0, "shape": "uniform"}


@pytest.mark.parametrize("given", [{"noise": {"shape": "uniform"}}, '{"noise": {"shape": "uniform"}}'])
def test_a_nested_model_given_in_part_means_the_same_on_every_face(given) -> None:
    config = draw.parse_config(given)
    assert config == DrawConfig(noise=Noise(scale=2.0, shape="uniform"))
    with pytest.raises(UserError, match=r"draw\.noise: "):
        draw.parse_config({"noise": 3})
    for text in ("[1]", "{", "3"):
        with pytest.raises(UserError, match=r"^draw: "):
            draw.parse_config(text)


def test_kfp_command_line_and_call_agree() -> None:
    """One declaration, three faces: the same names, types and defaults in IR, `--help` and Python."""
    from click.testing import CliRunner

    from ling_flow.flow.cli_face import command, config_of

    for declared in (draw, average):
        parameters = declared.kfp.component_spec.inputs
        assert set(parameters) == {"config", *declared.inputs}
        outputs = declared.kfp.component_spec.outputs
        assert set(outputs) == {*declared.outputs, *declared.result_model.model_fields}
        assert {name: outputs[name].type for name in declared.outputs} == {
            name: f"{spec.kind.schema_title}@0.0.1" for name, spec in declared.outputs.items()
        }
        page = " ".join(CliRunner().invoke(command(declared), ["--help"], terminal_width=200).output.split())
        for name, spec in declared.inputs.items():
            assert parameters[name].type == f"{spec.kind.schema_title}@0.0.1"
            assert parameters[name].optional == spec.optional
            assert f"--{name} REF {spec.kind.__name__} artifact" in page
        fields = list(leaves(declared.config_model))
        for leaf in fields:
            assert f"--{leaf.path} " in page and leaf.description in page
            default = "required" if leaf.required else f"default: {json.dumps(leaf.default)}"
            assert f"{default}]" in page.partition(f"--{leaf.path} ")[2].partition(" --")[0]
            assert f"{leaf.path} ({leaf.type}" in parameters["config"].description
        options = {f"field__{leaf.path.replace('.', '__')}": None for leaf in fields}
        typed = config_of(declared, {"config": None, "config_json": None, **options})
        if parameters["config"].optional:
            default_call = declared.parse_config({})
            assert declared.parse_config(parameters["config"].default) == default_call == declared.parse_config(typed)
        else:
            with pytest.raises(UserError, match=r"power: required field is missing"):
                declared.parse_config(typed)


def test_declaring_a_component_imports_nothing_heavy(home: Path) -> None:
    heavy = "('torch', 'ray', 'mlflow', 'kfp', 'fsspec', 'numpy')"
    program = f"import sys, toy.draw, toy.average; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
