import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from ling_flow.errors import UserError
from ling_flow.flow import mlflow_store
from ling_flow.flow.context import Context
from ling_flow.flow.lineage import Lineage, lineage_tree, render_tree, resolve_model
from ling_flow.flow.promotion import Registry
from tests.flow.lineage_steps import collect, gather, grow


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    home = tmp_path_factory.mktemp("home")
    return Context(home=home, artifacts=str(home / "artifacts"))


@pytest.fixture(scope="module")
def chain(context: Context) -> dict[str, str]:
    """References: corpus, first stage, second stage (registered as version 1, the champion)."""
    corpus = collect({}, root=context.artifacts).refs["corpus"]
    first = grow({"stage": "first"}, root=context.artifacts, corpus=corpus).refs["checkpoints"]
    second = grow({"stage": "second"}, root=context.artifacts, corpus=corpus, previous=first)
    registry = Registry.of(context)
    version = registry.register("tiny", second.refs["checkpoints"], second.fingerprint, {}, {})
    registry.promote(version, [])
    return {"corpus": corpus, "first": first, "second": second.refs["checkpoints"], "fingerprint": second.fingerprint}


def test_every_form_of_uri_finds_the_model(context: Context, chain: dict[str, str]) -> None:
    client = mlflow_store.connect(mlflow_store.default_tracking_uri(context.home))
    logged = client.get_model_version("tiny", "1").source
    directory = Path(chain["second"])
    for uri in ("models:/tiny@champion", "models:/tiny/1", logged, str(directory), str(directory.parent)):
        found = resolve_model(uri, context)
        assert (found.path, found.fingerprint) == (directory, chain["fingerprint"]), uri
    champion = resolve_model("models:/tiny@champion", context)
    assert (champion.name, champion.version) == ("tiny", 1)


def test_a_single_checkpoint_inside_an_artifact(context: Context, chain: dict[str, str]) -> None:
    inside = Path(chain["first"], "step-1")
    found = resolve_model(str(inside), context)
    assert found.path == inside
    assert lineage_tree(found).model.artifact == chain["first"]


def test_the_tree_reaches_the_sources(context: Context, chain: dict[str, str]) -> None:
    lineage = lineage_tree(resolve_model("models:/tiny@champion", context))
    assert (lineage.name, lineage.version, lineage.fingerprint) == ("tiny", 1, chain["fingerprint"])
    assert (lineage.model.component, lineage.model.artifact) == ("grow", chain["second"])
    assert lineage.model.code_version
    first = lineage.model.inputs["previous"]
    assert (first.artifact, first.output, set(first.inputs)) == (chain["first"], "checkpoints", {"corpus"})
    corpus = first.inputs["corpus"]
    assert (corpus.artifact, corpus.result) == (chain["corpus"], {"tokens": 100})
    assert corpus.sources["books"].tokens == 100
    assert corpus.sources["books"].train_digest == "d1" * 32
    assert corpus.inputs == {}
    data = json.loads(lineage.model_dump_json())
    assert data["model"]["inputs"]["previous"]["inputs"]["corpus"]["sources"]["books"]["validation_digest"] == "d2" * 32


def printed(lineage: Lineage) -> str:
    output = io.StringIO()
    Console(file=output, width=200).print(render_tree(lineage))
    return output.getvalue()


def test_the_tree_on_a_terminal(context: Context, chain: dict[str, str]) -> None:
    text = printed(lineage_tree(resolve_model("models:/tiny@champion", context)))
    assert "tiny version 1" in text
    assert "previous ← grow/checkpoints" in text
    assert text.count("source books: 100 tokens, sha256 d1d1d1d1d1d1") == 1
    assert text.count("see above") == 1


def test_a_parent_that_was_deleted(tmp_path: Path) -> None:
    context = Context(home=tmp_path, artifacts=str(tmp_path))
    corpus = collect({}, root=tmp_path).refs["corpus"]
    model = grow({"stage": "first"}, root=tmp_path, corpus=corpus).refs["checkpoints"]
    shutil.rmtree(Path(corpus).parent)
    lineage = lineage_tree(resolve_model(model, context))
    assert lineage.model.present
    assert not lineage.model.inputs["corpus"].present
    assert "no longer there" in printed(lineage)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/tiny@nobody", "no model tiny with the alias nobody"),
        ("models:/other@champion", "no model other with the alias champion"),
        ("models:/tiny/7", "no version 7 of a model tiny"),
        ("models:/m-00000000000000000000000000000000", "no such logged model"),
        ("models:/tiny", "not a model URI; expected models:/NAME@ALIAS"),
        ("/no/such/directory", "no such model; expected models:/NAME@ALIAS"),
    ],
)
def test_an_unknown_model_is_the_users_error(context: Context, chain: dict[str, str], uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_model(uri, context)


def test_a_checkpoint_from_elsewhere_can_be_served_but_has_no_lineage(context: Context, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path), context)
    (tmp_path / "config.json").write_text("{}")
    found = resolve_model(str(tmp_path), context)
    assert (found.path, found.name, found.fingerprint) == (tmp_path, tmp_path.name, "unknown")
    with pytest.raises(UserError, match="was not made by a step"):
        lineage_tree(found)


def test_a_manifest_of_another_kind_is_nothing_of_ours(tmp_path: Path) -> None:
    context = Context(home=tmp_path, artifacts=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    for text in ('{"name": "app"}', "[]", "// not JSON"):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="was not made by a step"):
            lineage_tree(resolve_model(str(tmp_path), context))


def test_a_corpus_file_of_another_kind_has_no_sources(tmp_path: Path) -> None:
    context = Context(home=tmp_path, artifacts=str(tmp_path))
    corpus = gather({}, root=tmp_path).refs["corpus"]
    model = grow({"stage": "first"}, root=tmp_path, corpus=corpus).refs["checkpoints"]
    assert lineage_tree(resolve_model(model, context)).model.inputs["corpus"].sources == {}


def test_a_damaged_model_is_not_returned(tmp_path: Path) -> None:
    corpus = collect({}, root=tmp_path).refs["corpus"]
    model = grow({"stage": "first"}, root=tmp_path, corpus=corpus).refs["checkpoints"]
    Path(model, "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: damaged"):
        resolve_model(model, Context(home=tmp_path, artifacts=str(tmp_path)))
