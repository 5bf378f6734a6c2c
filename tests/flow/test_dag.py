"""Plans read from KFP's own PipelineSpec: order, configs, fingerprints, and the reason why a node will run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from toy.average import average
from toy.draw import draw

from components.plan import PlanConfig, plan
from ling_flow.errors import UserError
from ling_flow.flow.artifact import ArtifactStore
from ling_flow.flow.dag import LoadedDag, known_dags, load_dag, make_plan, pipeline_arguments
from ling_flow.flow.identity import fingerprint
from ling_flow.flow.lint import python_branches
from ling_flow.flow.tracking import NullTracker
from tests.dags.test_lifecycle_ir import PHASES


@pytest.fixture(scope="module")
def lifecycle() -> LoadedDag:
    return load_dag("lifecycle")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts", tmp_path / "cache")


def test_the_lifecycle_is_known_by_name() -> None:
    assert known_dags() == ["lifecycle"]


def test_nodes_come_in_execution_order_with_their_edges(lifecycle: LoadedDag, store: ArtifactStore) -> None:
    nodes = make_plan(lifecycle, pipeline_arguments(lifecycle, {}), store, frozenset())
    assert [node.label for node in nodes] == PHASES
    by_label = {node.label: node for node in nodes}
    mid, short = by_label["pretrain_mid"], by_label["pretrain_short"]
    assert mid.inputs["previous"] == f"{store.root}/pretrain/{short.fingerprint}/checkpoints"
    assert short.inputs["previous"] is None
    assert mid.config.stage == "mid"


def test_a_nodes_fingerprint_is_that_of_the_step(lifecycle: LoadedDag, store: ArtifactStore) -> None:
    nodes = {node.label: node for node in make_plan(lifecycle, lifecycle.parameters, store, frozenset())}
    tunnel, data = nodes["wind_tunnel"], nodes["prepare_data"]
    inputs = {"corpus": f"{data.fingerprint}/corpus"}
    assert tunnel.fingerprint == fingerprint("wind_tunnel", tunnel.component.version, tunnel.config, inputs)


def test_a_change_reaches_what_depends_on_it_and_nothing_else(lifecycle: LoadedDag, store: ArtifactStore) -> None:
    def fingerprints(overrides: str) -> dict[str, str]:
        arguments = pipeline_arguments(lifecycle, {"overrides": overrides})
        return {node.label: node.fingerprint for node in make_plan(lifecycle, arguments, store, frozenset())}

    before, after = fingerprints("{}"), fingerprints('{"merge_checkpoints": {"last_k": 3}}')
    changed = [label for label in PHASES if before[label] != after[label]]
    assert changed == ["plan", *PHASES[PHASES.index("merge_checkpoints") :]]


def test_a_context_field_changes_nothing(lifecycle: LoadedDag, store: ArtifactStore) -> None:
    def fingerprints(overrides: str) -> list[str]:
        arguments = pipeline_arguments(lifecycle, {"overrides": overrides})
        return [node.fingerprint for node in make_plan(lifecycle, arguments, store, frozenset())][1:]

    assert fingerprints("{}") == fingerprints('{"pretrain_short": {"threads": 1}, "deploy": {"port": 9000}}')


def test_whole_numbers_stay_whole(lifecycle: LoadedDag) -> None:
    assert lifecycle.parameters["seed"] == 0
    assert isinstance(lifecycle.parameters["seed"], int)


def test_unknown_parameters_and_steps_are_refused(lifecycle: LoadedDag, store: ArtifactStore) -> None:
    with pytest.raises(UserError, match="takes no parameter 'colour'; it takes: overrides, preset, seed"):
        pipeline_arguments(lifecycle, {"colour": "red"})
    with pytest.raises(UserError, match="--rebuild nothing: no such step; steps are plan, prepare_data"):
        make_plan(lifecycle, lifecycle.parameters, store, frozenset({"nothing"}))


def test_a_pipeline_of_ones_own_is_loaded_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from kfp import dsl\nfrom components.plan import plan\n\n"
        "@dsl.pipeline\ndef mine(preset: str = 'tiny'):\n    plan.kfp(preset=preset)\n"
    )
    dag = load_dag(str(file))
    assert (dag.name, dag.parameters) == ("mine", {"preset": "tiny"})
    file.write_text("import components\n\nx = (1\n")
    with pytest.raises(UserError, match=r"mine\.py: cannot be imported \(line 3: SyntaxError: "):
        load_dag(str(file))
    file.write_text("import components\n\nx = 1 / 0\n")
    with pytest.raises(UserError, match=r"mine\.py: cannot be imported \(line 3: ZeroDivisionError: "):
        load_dag(str(file))
    file.write_text("x = 1\n")
    with pytest.raises(UserError, match=r"defines no @dsl\.pipeline function called 'mine'"):
        load_dag(str(file))


TOYS = Path(__file__).parent / "toy"


def written(tmp_path: Path, name: str, signature: str, body: str) -> LoadedDag:
    """The DAG of a new file."""
    file = tmp_path / f"{name}.py"
    file.write_text(
        "from kfp import dsl\nfrom toy.average import average\nfrom toy.draw import draw\n"
        f"from toy.planned import plan\n\n@dsl.pipeline\ndef {name}({signature}):\n    {body}\n"
    )
    return load_dag(str(file))


def test_pipeline_parameters_inside_a_config(store: ArtifactStore) -> None:
    dag = load_dag(str(TOYS / "twice.py"))
    draw, *_ = make_plan(dag, pipeline_arguments(dag, {}), store, frozenset({"draw_a,b"}))
    assert (draw.label, draw.config.noise.scale) == ("draw_a,b", 1.0)


def test_what_is_known_only_while_it_runs_is_refused(tmp_path: Path, store: ArtifactStore) -> None:
    body = 'draw.kfp(config=f\'{{"name": "{dsl.PIPELINE_JOB_ID_PLACEHOLDER}"}}\')'
    dag = written(tmp_path, "late", "", body)
    with pytest.raises(UserError, match=r"task 'draw': its config holds \{\{\$.*, which is known only while it runs"):
        make_plan(dag, {}, store, frozenset())


def test_steps_of_one_label_are_numbered(store: ArtifactStore) -> None:
    dag = load_dag(str(TOYS / "twice.py"))
    nodes = make_plan(dag, dag.parameters, store, frozenset({"average-2"}))
    assert [(node.label, node.numbered) for node in nodes[1:]] == [("average", False), ("average-2", True)]
    assert [node.config.power for node in nodes[1:]] == [1, 2]
    assert [node.reason for node in nodes[1:]] == ["needs draw_a,b", "asked for by --rebuild"]


def test_what_a_rebuild_makes_of_the_steps_after_it(tmp_path: Path, store: ArtifactStore) -> None:
    dag = written(
        tmp_path, "after", "", """average.kfp(config='{"power": 1}', numbers=draw.kfp().outputs["numbers"])"""
    )

    def planned(*rebuild: str) -> list[tuple[bool, str]]:
        return [(node.cached, node.reason) for node in make_plan(dag, {}, store, frozenset(rebuild))]

    drawn = draw({}, root=store.root, tracker=NullTracker())
    average({"power": 1}, root=store.root, tracker=NullTracker(), numbers=drawn.refs["numbers"])
    assert planned() == [(True, ""), (True, "")]
    assert planned("draw_series")[1] == (True, "done before; redone if draw_series gives other content now")
    manifest = store.local / "draw" / drawn.fingerprint / "manifest.json"
    old = next(file.sha256 for file in drawn.manifest.files if file.path.startswith("numbers/"))
    manifest.write_text(manifest.read_text().replace(old, "0" * 64))
    assert planned() == [(True, ""), (False, "input numbers was rebuilt with other content")]


def test_twice_the_same_step_is_one(tmp_path: Path, store: ArtifactStore) -> None:
    dag = written(tmp_path, "same", "", "draw.kfp(); draw.kfp()")
    first, second = make_plan(dag, {}, store, frozenset())
    assert (first.label, first.fingerprint) == (second.label, second.fingerprint)


def test_arguments_have_the_declared_types(tmp_path: Path) -> None:
    dag = written(tmp_path, "typed", "rate: float = 1.0, seed: int = 3, preset: str = 'a'", "draw.kfp()")
    assert repr(pipeline_arguments(dag, {})) == "{'preset': 'a', 'rate': 1.0, 'seed': 3}"
    assert repr(pipeline_arguments(dag, {"rate": 2})["rate"]) == "2.0"
    with pytest.raises(UserError, match="DAG 'typed': parameter 'preset' is a STRING there; it cannot be given as 1"):
        pipeline_arguments(dag, {"preset": 1})


def test_an_integer_that_would_be_rounded_is_refused(tmp_path: Path, store: ArtifactStore) -> None:
    dag = written(tmp_path, "big", "seed: int = 3", "plan.kfp(size=seed)")
    assert pipeline_arguments(dag, {"seed": 2**53 - 1}) == {"seed": 2**53 - 1}
    with pytest.raises(UserError, match=r"parameter 'seed' is 9007199254740993: .* would not be exact"):
        pipeline_arguments(dag, {"seed": 2**53 + 1})
    constant = written(tmp_path, "constant", "", "plan.kfp(size=2**53 + 1)")
    with pytest.raises(UserError, match=r"task 'plan': 'size' is .* would not be exact"):
        make_plan(constant, {}, store, frozenset())


def test_an_artifact_as_parameter_is_refused(tmp_path: Path, store: ArtifactStore) -> None:
    dag = written(
        tmp_path, "given", "data: dsl.Input[dsl.Dataset]", "average.kfp(config='{\"power\": 1}', numbers=data)"
    )
    with pytest.raises(UserError, match="DAG 'given': its parameter 'data' is an artifact"):
        make_plan(dag, {}, store, frozenset())


def test_a_dag_may_be_called_like_its_package(tmp_path: Path, store: ArtifactStore) -> None:
    package = sys.modules["toy"]
    dag = written(tmp_path, "toy", "", "draw.kfp()")
    assert [node.label for node in make_plan(dag, {}, store, frozenset())] == ["draw_series"]
    assert sys.modules["toy"] is package
    assert not list(python_branches(dag.pipeline.pipeline_func)), "its source can be read"


def test_a_file_that_leaves_python_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('no GPU')\n")
    with pytest.raises(UserError, match=r"leaves\.py: cannot be imported \(line 2: SystemExit: no GPU\)"):
        load_dag(str(tmp_path / "leaves.py"))


def test_the_planners_identity_holds_what_it_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    from components.plan import presets

    assert plan.resolve is not None
    before = plan.resolve(PlanConfig())
    changed = presets.tiny(0).model_copy(update={"deploy": presets.tiny(5).deploy})
    monkeypatch.setitem(presets.PRESETS, "tiny", lambda seed: changed)
    assert plan.resolve(PlanConfig()).resolved != before.resolved
