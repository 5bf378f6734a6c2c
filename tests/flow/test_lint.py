"""The linter: each trap in a small pipeline, and a clean pipeline without findings."""

from pathlib import Path
from typing import Any, Optional

import pytest
import yaml
from kfp import dsl, local
from kfp.compiler import Compiler
from toy.average import average
from toy.draw import draw
from toy.planned import plan, publish

from ling_flow.flow.lint import Finding, lint


@dsl.container_component
def shell(text: str):
    return dsl.ContainerSpec(image="alpine", command=["echo"], args=[text])


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def word() -> str:
    return "upstream"


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def tagged(tag: str, item: int, out: dsl.OutputPath(str)):
    with open(out, "w") as stream:
        stream.write(f"{tag} {item}")


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def read(data: dsl.Input[dsl.Dataset]): ...


def findings(pipeline: Any, directory: Path, **arguments: Any) -> list[Finding]:
    path = directory / "pipeline.yaml"
    Compiler().compile(pipeline, str(path))
    return lint(yaml.safe_load(path.read_text()), pipeline, arguments)


@dsl.pipeline
def clean(size: int = 3):
    configs = plan.kfp(size=size).outputs
    drawn = draw.kfp(config=configs["draw"]).outputs
    average.kfp(config=configs["average"], numbers=drawn["numbers"])
    with dsl.If(size == 3):
        publish.kfp(config='{"directory": "."}').set_caching_options(False)


@dsl.pipeline
def container():
    shell(text="x")


@dsl.pipeline
def capturing_loop():
    tag = word().output
    with dsl.ParallelFor([1, 2]) as item:
        tagged(tag=tag, item=item)


@dsl.pipeline
def quoting_if(mode: str = "plain"):
    with dsl.If(mode == "don't"):
        word()


@dsl.pipeline
def plain_if(mode: str = "plain"):
    with dsl.If(mode == "plain"):
        word()


@dsl.pipeline
def optional(mode: Optional[str] = None):  # noqa: UP045 (KFP does not know `str | None`)
    with dsl.If(mode == "plain"):
        word()


@dsl.pipeline
def one_of():
    with dsl.If(word().output == "a"):
        left = draw.kfp()
    with dsl.Else():
        right = draw.kfp()
    read(data=dsl.OneOf(left.outputs["numbers"], right.outputs["numbers"]))


@dsl.pipeline
def long_config():
    draw.kfp(config='{"name": "' + "x" * 70_000 + '"}')


@dsl.pipeline
def cached_publish():
    publish.kfp(config='{"directory": "."}')


@dsl.pipeline
def python_if(mode: str = "plain"):
    if mode == "plain":
        word()
    again = word()
    shell(text="x" if again.output == "upstream" else "y")


@pytest.mark.parametrize(
    ("pipeline", "check", "where", "task", "fix"),
    [
        (container, "not-lightweight", "local", "shell", "use a component's .kfp"),
        (
            capturing_loop,
            "loop-captures-output",
            "local",
            "for-loop-2",
            "'Output' of task 'word'.*nested @dsl.pipeline",
        ),
        (quoting_if, "quoted-condition", "both", "condition-1", "compare with a string without quotes"),
        (optional, "missing-argument", "local", "root", "parameter 'mode' is None.*give it a value or a default"),
        (one_of, "one-of-artifacts", "local", "condition-branches-1", "give each branch its own consumer"),
        (long_config, "long-config", "both", "draw", "'config' has 70012 bytes; at most 65536"),
        (cached_publish, "cached-side-effect", "kfp", "publish", r"add \.set_caching_options\(False\)"),
    ],
)
def test_each_trap_is_found_once_with_its_fix(tmp_path: Path, pipeline, check, where, task, fix) -> None:
    found = findings(pipeline, tmp_path)
    assert [(finding.check, finding.severity, finding.where, finding.task) for finding in found] == [
        (check, "error", where, task)
    ]
    with pytest.raises(ValueError, match=fix):
        raise ValueError(str(found[0]))


def test_a_clean_pipeline_has_no_findings(tmp_path: Path) -> None:
    assert findings(clean, tmp_path) == []
    assert findings(plain_if, tmp_path) == []


def test_arguments_are_looked_at_too(tmp_path: Path) -> None:
    assert findings(optional, tmp_path, mode="plain") == []
    assert [finding.check for finding in findings(plain_if, tmp_path, mode="it's")] == ["quoted-condition"]
    assert [finding.check for finding in findings(plain_if, tmp_path, mode="x" * 70_000)] == ["long-config"]


def test_python_branches_are_found_by_line(tmp_path: Path) -> None:
    found = [finding for finding in findings(python_if, tmp_path) if finding.check == "python-branch"]
    texts = [finding.message for finding in found]
    assert len(texts) == 2 and "`mode == 'plain'`" in texts[0] and "`again.output == 'upstream'`" in texts[1]
    first = next(
        n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line == '    if mode == "plain":'
    )
    assert texts[0].startswith(f"line {first}: ")


def test_a_component_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    Compiler().compile(cached_publish, str(path))
    spec = yaml.safe_load(path.read_text().replace("toy.planned:publish", "toy.gone:publish"))
    found = lint(spec)
    assert [(finding.check, finding.task) for finding in found] == [("unknown-component", "publish")]
    assert "toy.gone:publish cannot be imported" in found[0].message


@pytest.mark.slow
def test_the_loop_trap_is_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When this fails, KFP has mended its local executor and the check can go."""
    monkeypatch.setattr(local.config.LocalExecutionConfig, "instance", None)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path))
    capturing_loop()
    written = sorted(path.read_text() for path in tmp_path.glob("**/tagged/out"))
    assert written == ["1.0 1", "2.0 2"]
