from pathlib import Path

import pytest

from ling_flow.errors import SystemFault, UserError
from ling_flow.evaluation.gate import Gate, judge
from ling_flow.flow import mlflow_store
from ling_flow.flow.promotion import Registry, Version


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return mlflow_store.default_tracking_uri(tmp_path_factory.mktemp("store"))


@pytest.fixture
def registry(tmp_path: Path, uri: str) -> Registry:
    return Registry(uri, tmp_path)


def register(registry: Registry, name: str, fingerprint: str, score: float = 0.5) -> Version:
    artifact = f"/root/preference_pass/{fingerprint}/model"
    return registry.register(name, artifact, fingerprint, {"score": score}, {"layers": 4})


def test_a_version_leads_back_to_its_artifact(registry: Registry) -> None:
    version = register(registry, "one", "f1")
    assert (version.name, version.number, version.uri) == ("one", 1, "models:/one/1")
    assert (version.fingerprint, version.artifact) == ("f1", "/root/preference_pass/f1/model")
    assert version.metrics == {"score": 0.5}
    assert registry.version("one", 1) == registry.by_alias("one", "candidate") == version

    client = mlflow_store.connect(registry.tracking_uri)
    stored = client.get_model_version("one", "1")
    model_id = stored.source.removeprefix("models:/")
    assert stored.tags["ling_flow.fingerprint"] == "f1"
    assert stored.tags["ling_flow.code_version"]
    model = client.get_logged_model(model_id)
    assert (str(model.status), model.params) == ("READY", {"layers": "4"})
    tags = registry.logged_model(model_id)
    assert tags is not None and tags["ling_flow.artifact_uri"] == version.artifact


def test_the_model_that_the_producing_step_logged_is_used(registry: Registry) -> None:
    client = mlflow_store.connect(registry.tracking_uri)
    experiment = mlflow_store.experiment_id(client, mlflow_store.EXPERIMENT)
    path = "/root/preference_pass/f9/model"
    logged = mlflow_store.log_model(client, experiment, None, "preferred", path, {}, {})
    register(registry, "producer", "f9")
    assert client.get_model_version("producer", "1").source == f"models:/{logged}"


def test_the_same_artifact_keeps_its_version(registry: Registry) -> None:
    assert [register(registry, "same", fingerprint).number for fingerprint in ("f1", "f2", "f1")] == [1, 2, 1]
    candidate = registry.by_alias("same", "candidate")
    assert candidate is not None and candidate.number == 1


def test_the_newest_evaluation_counts(registry: Registry) -> None:
    register(registry, "again", "f1", score=0.1)
    assert register(registry, "again", "f1", score=0.7).metrics == {"score": 0.7}


def test_what_is_not_there(registry: Registry) -> None:
    register(registry, "known", "f1")
    assert registry.by_alias("unknown", "champion") is None
    assert registry.by_alias("known", "champion") is None
    assert registry.version("known", 2) is None
    assert registry.version("unknown", 1) is None
    assert registry.logged_model("m-0123456789abcdef0123456789abcdef") is None


def test_promotion_and_rollback_move_the_aliases_and_are_recorded(registry: Registry) -> None:
    first, second = register(registry, "moves", "f1"), register(registry, "moves", "f2")
    assert registry.promote(first, ["passed: a"]) is None
    assert registry.promote(second, ["passed: b"]) == first
    assert registry.promote(second, ["passed: b"]) == second  # already champion: nothing moves, nothing is recorded
    assert (registry.by_alias("moves", "champion"), registry.by_alias("moves", "previous")) == (second, first)

    assert registry.ledger.rolled_back(second) is None
    assert registry.rollback("moves", "too slow") == first
    assert (registry.by_alias("moves", "champion"), registry.by_alias("moves", "previous")) == (first, second)
    word = registry.ledger.rolled_back(second)
    assert word is not None and word.reasons == ["too slow"]

    registry.reject(second, ["failed: c"])
    entries = registry.ledger.read("moves")
    assert [(entry.action, entry.version, entry.champion_before) for entry in entries] == [
        ("promote", 1, None),
        ("promote", 2, 1),
        ("rollback", 1, 2),
        ("reject", 2, 1),
    ]
    assert entries[1].reasons == ["passed: b"]
    assert (entries[1].fingerprint, entries[1].tracking_uri) == ("f2", registry.tracking_uri)


def test_no_rollback_without_a_previous_champion(registry: Registry) -> None:
    registry.promote(register(registry, "first", "f1"), [])
    with pytest.raises(UserError, match="first: there is no previous champion"):
        registry.rollback("first", "why not")


def test_gate_verdicts_are_tags(registry: Registry) -> None:
    version = register(registry, "gates", "f1")
    gates = [
        Gate(metric="a", threshold=0.5),
        Gate(metric="b", threshold=0.5),
        Gate(metric="b", threshold=0.9, comparison="<="),
    ]
    registry.judged(version, judge(gates, {"a": 0.6, "b": 0.95}))
    tags = mlflow_store.connect(registry.tracking_uri).get_model_version("gates", "1").tags
    assert (tags["ling_flow.gate.a"], tags["ling_flow.gate.b"]) == ("pass", "fail")


def test_a_damaged_ledger_is_named_with_its_line(registry: Registry) -> None:
    registry.promote(register(registry, "ledger", "f1"), [])
    with registry.ledger.path.open("a") as file:
        file.write('{"time": "now"}\n')
    with pytest.raises(UserError, match=r"promotions\.jsonl:2"):
        registry.ledger.read()


def test_a_registry_that_is_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SystemFault, match=r"tracking store http://127\.0\.0\.1:9 cannot be used"):
        Registry("http://127.0.0.1:9", tmp_path).by_alias("any", "champion")
