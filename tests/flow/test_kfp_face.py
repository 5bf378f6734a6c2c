"""The KFP face: what is compiled, and the compiled pipeline run by KFP's own local executor."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from kfp import components, dsl, local
from kfp.compiler import Compiler
from toy.average import average
from toy.draw import draw
from toy.planned import plan, publish

from ling_flow.errors import UserError
from ling_flow.flow.kfp_face import kfp_source, load_component, run_kfp_step

pytestmark = pytest.mark.usefixtures("home")


@dsl.pipeline(name="toy")
def toy(size: int = 3, power: int = 2):
    configs = plan.kfp(size=size).outputs
    drawn = draw.kfp(config=configs["draw"]).outputs
    first = average.kfp(config=configs["average"], numbers=drawn["numbers"])
    average.kfp(
        config=configs["average"],
        numbers=drawn["numbers"],
        summary=drawn["summary"],
        previous=first.outputs["model"],
    )


@dsl.pipeline(name="failing")
def failing(fail: str):
    average.kfp(config=fail, numbers=draw.kfp(config='{"count": 2}').outputs["numbers"])


def compiled(pipeline: Any, directory: Path) -> str:
    path = directory / "pipeline.yaml"
    Compiler().compile(pipeline, str(path))
    return path.read_text()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    """Runs a pipeline from its compiled text, in subprocesses of this environment."""
    old = local.config.LocalExecutionConfig.instance
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"))

    def execute(pipeline: Any, **arguments: Any) -> None:
        components.load_component_from_text(compiled(pipeline, tmp_path))(**arguments)

    yield execute
    local.config.LocalExecutionConfig.instance = old


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_ir_states_names_types_and_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LING_FLOW_IMAGE", "registry.example.org/ling-flow@sha256:00")
    ir = yaml.safe_load(compiled(draw.kfp, tmp_path))
    declared = ir["components"]["comp-draw"]
    config = declared["inputDefinitions"]["parameters"]["config"]
    assert config["parameterType"] == "STRING" and json.loads(config["defaultValue"])["noise"]["scale"] == 2.0
    assert "noise.scale (float, > 0, default 2.0): Standard deviation" in config["description"]
    kinds = {name: given["parameterType"] for name, given in declared["outputDefinitions"]["parameters"].items()}
    assert kinds == {
        "mean": "NUMBER_DOUBLE", "count": "NUMBER_INTEGER", "started_at": "NUMBER_INTEGER", "ok": "BOOLEAN",
        "tags": "STRING", "noise": "STRING",
    }  # fmt: skip
    titles = {
        name: given["artifactType"]["schemaTitle"] for name, given in declared["outputDefinitions"]["artifacts"].items()
    }
    assert titles == {"numbers": "system.Dataset", "summary": "system.Metrics", "report": "system.HTML"}
    container = ir["deploymentSpec"]["executors"]["exec-draw"]["container"]
    assert container["image"] == "registry.example.org/ling-flow@sha256:00"
    assert "pip install" not in " ".join(container["command"])
    assert ir["pipelineInfo"] == {"name": "draw"} and ir["root"]["inputDefinitions"]["parameters"]["config"] == config


def test_kfp_itself_refuses_wrong_edges(tmp_path: Path) -> None:
    def wrong_kind():
        drawn = draw.kfp().outputs
        average.kfp(config="{}", numbers=drawn["summary"])

    with pytest.raises(Exception, match=r"Incompatible.*system\.Metrics"):
        dsl.pipeline(name="wrong")(wrong_kind)


def test_a_planner_takes_its_fields_as_parameters() -> None:
    assert {name: (given.type, given.default) for name, given in plan.kfp.component_spec.inputs.items()} == {
        "size": ("Integer", 3)
    }
    assert set(plan.kfp.component_spec.outputs) == {"draw", "average"}


def test_the_shipped_source_stands_alone() -> None:
    """KFP ships the text of the function; a name from this module would be a NameError in the step."""
    for declared in (draw, average, plan, publish):
        code = compile(kfp_source(declared), "shipped", "exec").co_consts
        body = next(item for item in code if hasattr(item, "co_name") and item.co_name == declared.name)
        assert set(body.co_names) <= {"ling_flow.flow.kfp_face", "run_kfp_step"}


def test_a_config_too_long_for_a_command_line(capsys) -> None:
    with pytest.raises(SystemExit) as leave:
        run_kfp_step("toy.draw:draw", json.dumps({"name": "x" * 70_000}), {}, {})
    assert leave.value.code == 2
    assert "error: draw: config is 70012 bytes of JSON, at most 65536 fit a KFP task" in capsys.readouterr().err


def test_a_body_that_leaves_is_no_success(capsys, tmp_path: Path) -> None:
    numbers = SimpleNamespace(path=tmp_path / "numbers")
    numbers.path.write_text(json.dumps({"uri": draw({"count": 2}).refs["numbers"]}))
    with pytest.raises(SystemExit) as leave:
        run_kfp_step("toy.average:average", '{"power": 2, "fail": "leave"}', {"numbers": numbers}, {})
    assert leave.value.code == 1 and "average called sys.exit(0)" in capsys.readouterr().err


def test_components_that_cannot_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nowhere:x: no module called nowhere"):
        load_component("nowhere:x")
    (tmp_path / "half.py").write_text("x = 1\ndef (\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"half:x: cannot be imported \(.*half\.py:2: invalid syntax\)"):
        load_component("half:x")
    with pytest.raises(UserError, match=r"toy\.draw:paint: module toy\.draw declares no component 'paint'"):
        load_component("toy.draw:paint")


@pytest.mark.slow
def test_a_pipeline_runs_and_is_served_from_its_artifacts(
    home: Path, tmp_path: Path, calls: Path, monkeypatch, run
) -> None:
    monkeypatch.setenv("LING_FLOW_EVENTS", str(tmp_path / "events"))
    run(toy, size=4)
    assert calls.read_text() == "draw\naverage\naverage\n"
    first = {event["fingerprint"]: event for event in events(tmp_path / "events") if event["event"] == "done"}
    assert [event["step"] for event in first.values()] == ["plan", "draw_series", "average", "average"]
    assert [event["result"].get("had_previous") for event in first.values()] == [None, None, False, True]
    assert draw({"count": 4}).cached  # the plain call finds what the pipeline made

    numbers = next((tmp_path / "kfp").glob("toy-*/draw/numbers"))
    reference = json.loads(numbers.read_text())
    assert reference["uri"] == str(draw({"count": 4}).outputs["numbers"]) and reference["contract"] == {"unit": "one"}
    assert next((tmp_path / "kfp").glob("toy-*/draw/report")).read_text() == "<!doctype html><p>mean</p>"
    written = json.loads(next((tmp_path / "kfp").glob("toy-*/draw/executor_output.json")).read_text())
    assert written["parameterValues"]["count"] == 4 and json.loads(written["parameterValues"]["tags"]) == ["a"]
    assert json.loads(written["parameterValues"]["noise"]) == {"scale": 2.0, "shape": "normal"}
    metadata = written["artifacts"]["summary"]["artifacts"][0]["metadata"]
    assert metadata["count"] == 4 and metadata["fingerprint"] == reference["fingerprint"]

    (tmp_path / "events").unlink()
    run(toy, size=4)
    again = {event["fingerprint"]: event["cached"] for event in events(tmp_path / "events") if event["event"] == "done"}
    assert again == dict.fromkeys(first, True) and calls.read_text() == "draw\naverage\naverage\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fail", "message"), [("user", "power: give a smaller one"), ("defect", "ZeroDivisionError: a bug of ours")]
)
def test_a_failed_step_says_why(home: Path, tmp_path: Path, monkeypatch, run, capfd, fail: str, message: str) -> None:
    monkeypatch.setenv("LING_FLOW_EVENTS", str(tmp_path / "events"))
    with pytest.raises(RuntimeError):
        run(failing, fail=json.dumps({"power": 1, "fail": fail}))
    last = events(tmp_path / "events")[-1]
    assert (last["event"], last["kind"], last["message"]) == ("error", fail, message)
    assert f"error: {message}" in capfd.readouterr().out
    assert list((home / "artifacts" / "average").iterdir()) == []
