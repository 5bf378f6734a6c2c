from collections.abc import Callable

import pytest

from ling_flow.errors import SystemFault, UserError
from ling_flow.evaluation.gate import Gate
from ling_flow.flow import ledger, mlflow_store
from ling_flow.flow.promotion import Registry, Version
from tests.conftest import Called
from tests.flow.registering import GATES, aliases, promote_at_once, register


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return mlflow_store.default_tracking_uri(tmp_path_factory.mktemp("store"))


@pytest.fixture
def registry(uri: str) -> Registry:
    return Registry(uri)


def test_a_version_leads_back_to_its_artifact(registry: Registry) -> None:
    version = register(registry, "one", "f1")
    assert (version.name, version.number, version.uri) == ("one", 1, "models:/one/1")
    assert (version.fingerprint, version.artifact) == ("f1", "/root/preference_pass/f1/model")
    assert (version.metrics, version.gates) == ({"score": 0.5}, GATES)
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
    assert tags["ling_flow.component"] == "preference_pass"


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
    first, second, third = (register(registry, "moves", fingerprint) for fingerprint in ("f1", "f2", "f3"))
    assert registry.promote(first, GATES).champion_before is None
    assert registry.promote(second, GATES).champion_before == first
    assert registry.promote(second, GATES).promoted  # already champion: nothing moves, nothing is recorded
    assert aliases(registry, "moves") == (2, 1)
    registry.promote(third, GATES)

    assert registry.rollback("moves", "too slow") == second
    assert aliases(registry, "moves") == (2, 1), "a second rollback goes further back, not to and fro"
    assert registry.rollback("moves", "too slow as well") == first
    assert aliases(registry, "moves") == (1, None)
    with pytest.raises(UserError, match="moves: there is no previous champion"):
        registry.rollback("moves", "why not")

    refused = registry.promote(third, GATES)
    assert not refused.promoted
    assert refused.sentences[-1].startswith("not promoted: rolled back on") and "(too slow)" in refused.sentences[-1]
    assert registry.promote(third, GATES, force="fixed the tokenizer").promoted
    assert aliases(registry, "moves") == (3, 1)

    records = registry.promotions("moves")
    assert [(record.entry.action, record.entry.version, record.entry.champion_before) for record in records] == [
        ("promote", 1, None),
        ("promote", 2, 1),
        ("promote", 3, 2),
        ("rollback", 2, 3),
        ("rollback", 1, 2),
        ("reject", 3, 1),
        ("promote", 3, 1),
    ]
    assert all(not record.void for record in records)
    assert records[1].entry.fingerprint == "f2"
    assert records[1].entry.reasons[0].startswith("passed: score is 0.5")
    assert records[-1].entry.reasons[-1] == "promoted all the same: fixed the tokenizer"


def test_the_gates_hold_a_version_back(registry: Registry) -> None:
    best, worse = register(registry, "held", "f1", 0.9), register(registry, "held", "f2", 0.7)
    assert registry.promote(best, GATES).promoted
    decision = registry.promote(worse, GATES)
    assert (decision.promoted, decision.champion_before) == (False, best)
    assert decision.sentences[0].startswith("failed: score is 0.7")
    assert aliases(registry, "held") == (1, None)
    tags = mlflow_store.connect(registry.tracking_uri).get_model_version("held", "2").tags
    assert tags["ling_flow.gate.score"] == "fail"


def test_that_the_champion_was_asked_something_else_is_told(registry: Registry) -> None:
    def version(fingerprint: str, score: float, asked: str) -> Version:
        return registry.register(
            "asked", f"/root/a/{fingerprint}/model", fingerprint, {"score": score}, {}, GATES, asked
        )

    first = version("f1", 0.9, "easy")
    assert first.asked == "easy"
    assert registry.promote(first, GATES).promoted
    same = registry.promote(version("f2", 0.7, "easy"), GATES)
    assert not same.promoted and "champion's 0.9" in same.sentences[0]
    unknown = registry.promote(version("f3", 0.7, ""), GATES)
    assert not unknown.promoted and "champion's 0.9" in unknown.sentences[0]
    other = registry.promote(version("f4", 0.7, "hard"), GATES)
    assert not other.promoted and "asked something else" not in unknown.sentences[0]
    assert other.sentences[0].endswith("(whose evaluation asked something else, or had another corpus)")


def test_of_several_gates_on_a_metric_all_must_be_passed(registry: Registry) -> None:
    version = register(registry, "gates", "f1", 0.95)
    registry.promote(version, [*GATES, Gate(metric="score", threshold=0.9, comparison="<=")])
    tags = mlflow_store.connect(registry.tracking_uri).get_model_version("gates", "1").tags
    assert tags["ling_flow.gate.score"] == "fail"


def test_a_version_that_another_displaced_comes_back_only_by_hand(registry: Registry) -> None:
    first, second = register(registry, "displaced", "f1"), register(registry, "displaced", "f2")
    registry.promote(second, GATES)
    registry.promote(first, GATES, by_hand=True)
    again = registry.promote(second, GATES)  # a pipeline that runs once more
    assert not again.promoted
    assert again.sentences[-1].startswith("not promoted: version 1 took its place on")
    assert registry.promote(second, GATES, by_hand=True).promoted


def test_an_alias_moved_by_hand_counts(registry: Registry) -> None:
    first, second, third = (register(registry, "hand", fingerprint) for fingerprint in ("f1", "f2", "f3"))
    registry.promote(first, GATES)
    mlflow_store.connect(registry.tracking_uri).set_registered_model_alias("hand", "champion", "2")
    assert registry.promote(third, GATES).champion_before == second
    assert aliases(registry, "hand") == (3, 2)


def test_a_decision_that_was_not_carried_out_is_carried_out_by_the_next(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (register(registry, "dies", fingerprint) for fingerprint in ("f1", "f2", "f3"))
    registry.promote(first, GATES)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "mark_done", die)
        patch.setattr("mlflow.MlflowClient.set_registered_model_alias", die)
        with pytest.raises(KeyboardInterrupt):
            registry.promote(second, GATES)
    assert aliases(registry, "dies") == (1, None)
    assert registry.promote(third, GATES).champion_before == second
    assert aliases(registry, "dies") == (3, 2)


def test_of_two_decisions_at_once_the_first_counts_and_the_other_is_taken_again(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (register(registry, "race", f"f{n}", score) for n, score in enumerate((0.5, 0.6, 0.9)))
    registry.promote(first, GATES)
    append = ledger.append

    def overtaken(*arguments: object) -> int:
        monkeypatch.setattr(ledger, "append", append)
        assert Registry(registry.tracking_uri).promote(third, GATES).promoted
        return append(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ledger, "append", overtaken)
    decision = registry.promote(second, GATES)  # good enough against the first, not against the third
    assert (decision.promoted, decision.champion_before) == (False, third)
    assert aliases(registry, "race") == (3, 1)
    told = [(record.entry.action, record.entry.version, record.void) for record in registry.promotions("race")]
    assert told == [("promote", 1, False), ("promote", 3, False), ("promote", 2, True), ("reject", 2, False)]


@pytest.mark.slow
def test_processes_that_promote_at_once_agree(registry: Registry) -> None:
    promote_at_once(registry, "many")


def test_no_rollback_without_a_previous_champion(registry: Registry) -> None:
    registry.promote(register(registry, "first", "f1"), [])
    with pytest.raises(UserError, match="first: there is no previous champion"):
        registry.rollback("first", "why not")


def test_a_damaged_entry_is_named(registry: Registry) -> None:
    registry.promote(register(registry, "ledger", "f1"), [])
    client = mlflow_store.connect(registry.tracking_uri)
    client.set_model_version_tag("ledger.promotions", "1", "ling_flow.entry", '{"time": "now"}')
    with pytest.raises(UserError, match=r"models:/ledger\.promotions/1: tag ling_flow\.entry"):
        registry.promotions("ledger")


def test_a_registry_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SystemFault, match=r"tracking store http://127\.0\.0\.1:9 cannot be used"):
        Registry("http://127.0.0.1:9").by_alias("any", "champion")


def test_what_a_store_refuses_is_one_line(registry: Registry) -> None:
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI htp://localhost:5000: refuses \(.*\)$"):
        Registry("htp://localhost:5000").promotions("any")
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI .*: refuses \(.*\)$"):
        registry.promotions("o'neil")


def test_a_promotion_is_forced_with_a_reason_only(call: Callable[..., Called]) -> None:
    refused = call("promote", "any", "1", "--force", " ")
    assert (refused.code, refused.err.strip()) == (2, "error: --force: give the reason, which is recorded")


@pytest.mark.slow
def test_the_command_line(registry: Registry, call: Callable[..., Called]) -> None:
    store = {"MLFLOW_TRACKING_URI": registry.tracking_uri}
    for fingerprint, score in (("f1", 0.5), ("f2", 0.9), ("f3", 0.1)):
        register(registry, "typed", fingerprint, score)
    assert call("promote", "typed", "1", "--json", **store).json["champion_before"] is None
    done = call("promote", "typed", "2", **store)
    assert done.out.splitlines()[-1] == "typed: version 2 is champion now, version 1 was before"
    refused = call("promote", "typed", "3", **store)
    assert refused.code == 2
    assert "error: typed: version 3 is not promoted: failed: score is 0.1, asked >= 0.3" in refused.err
    assert call("rollback", "typed", "--reason", "too slow", "--json", **store).json["champion"] == 1
    refused = call("promote", "typed", "2", **store)
    assert refused.code == 2 and "rolled back on" in refused.err and "(too slow)" in refused.err
    assert call("promote", "typed", "2", "--force", "fixed", **store).code == 0
    listed = call("promotions", "typed", **store).out.splitlines()
    assert [line.split("  ")[-1].split(" (")[0].split(":")[0] for line in listed] == [
        "promote version 1",
        "promote version 2",
        "reject version 3",
        "rollback version 1",
        "reject version 2",
        "promote version 2",
    ]
    assert "no version 9" in call("promote", "typed", "9", **store).err
