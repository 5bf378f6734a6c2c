import json
from pathlib import Path
from typing import Any

import pytest

from components.register import register
from ling_flow.errors import SystemFault, UserError
from ling_flow.flow.context import Context
from ling_flow.flow.promotion import Registry
from ling_flow.flow.step import Outcome
from tests.components.serving_steps import measure, measure_against, measure_candidate, train

GATE = {"metric": "well_formed", "threshold": 0.5, "min_change": 0.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LING_FLOW_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def registry() -> Registry:
    return Registry.of(Context.from_environment())


def registered(name: str, seed: int, well_formed: float, **config: Any) -> Outcome:
    model = train({"seed": seed}).refs["model"]
    metrics = measure({"well_formed": well_formed}, model=model).refs["metrics"]
    return register({"model_name": name, "gates": [GATE], **config}, model=model, metrics=metrics)


def test_the_first_model_that_passes_is_champion(registry: Registry) -> None:
    outcome = registered("first", 0, 0.9)
    result = outcome.result
    assert (result.version, result.gate_passed, result.promoted, result.champion_version) == (1, True, True, 1)
    assert result.verdict.startswith("passed: well_formed is 0.9")
    champion = registry.by_alias("first", "champion")
    assert champion is not None
    assert champion.artifact == train({"seed": 0}).refs["model"]
    assert champion.fingerprint == result.fingerprint == train({"seed": 0}).fingerprint
    assert champion.metrics["well_formed"] == 0.9
    record = json.loads(Path(outcome.outputs["registration"], "registration.json").read_text())
    assert (record["model_uri"], record["artifact"]) == ("models:/first/1", champion.artifact)
    assert [verdict["passed"] for verdict in record["verdicts"]] == [True]


def test_a_model_that_fails_is_registered_but_not_champion(registry: Registry) -> None:
    result = registered("fails", 0, 0.2).result
    assert (result.version, result.gate_passed, result.promoted, result.champion_version) == (1, False, False, 0)
    assert registry.by_alias("fails", "champion") is None
    candidate = registry.by_alias("fails", "candidate")
    assert candidate is not None and candidate.number == 1
    assert [record.entry.action for record in registry.promotions("fails")] == ["reject"]


def test_the_next_model_must_hold_against_the_champion(registry: Registry) -> None:
    registered("rivals", 0, 0.8)
    worse = registered("rivals", 1, 0.7).result
    assert (worse.version, worse.promoted, worse.champion_version) == (2, False, 1)
    assert "champion's 0.8" in worse.verdict
    better = registered("rivals", 2, 0.9).result
    assert (better.version, better.promoted, better.champion_version) == (3, True, 3)
    previous = registry.by_alias("rivals", "previous")
    assert previous is not None and previous.number == 1


def test_cached_only_while_version_and_champion_are_as_recorded(registry: Registry) -> None:
    assert not registered("still", 0, 0.8).cached
    assert registered("still", 0, 0.8).cached
    other = registered("still", 1, 0.9)
    assert other.result.version == 2
    again = registered("still", 0, 0.8)  # the champion is another one now
    assert not again.cached
    assert (again.result.version, again.result.promoted, again.result.champion_version) == (1, False, 2)


def test_a_version_that_was_rolled_back_does_not_come_back_by_itself(registry: Registry) -> None:
    registered("rolled", 0, 0.8)
    registered("rolled", 1, 0.9)
    registry.rollback("rolled", "users complained")
    result = registered("rolled", 1, 0.9).result
    assert (result.version, result.gate_passed, result.promoted, result.champion_version) == (2, True, False, 1)
    assert "not promoted: rolled back on" in result.verdict and "users complained" in result.verdict


def test_a_gate_on_an_unknown_metric_is_the_users_error(registry: Registry) -> None:
    with pytest.raises(UserError, match=r"gates\.0\.metric: no metric 'speed'"):
        registered("odd", 0, 0.9, gates=[{"metric": "speed", "threshold": 1}])
    assert registry.version("odd", 1) is None


def test_metrics_of_another_model_are_refused(registry: Registry) -> None:
    model, other = (train({"seed": seed}).refs["model"] for seed in (0, 1))
    metrics = measure({"well_formed": 0.9}, model=other).refs["metrics"]
    with pytest.raises(UserError, match=f"^metrics: {metrics} was measured on {other}, not on {model}; evaluate "):
        register({"model_name": "mixed", "gates": [GATE]}, model=model, metrics=metrics)
    beside = measure_against({"well_formed": 0.9}, model=other, reference=model).refs["metrics"]
    with pytest.raises(UserError, match=f"^metrics: {beside} was measured on {other}, not on {model}; evaluate "):
        register({"model_name": "mixed", "gates": [GATE]}, model=model, metrics=beside)
    assert registry.version("mixed", 1) is None
    unknown = measure_candidate({"well_formed": 0.9}, candidate=other).refs["metrics"]
    assert register({"model_name": "mixed", "gates": [GATE]}, model=model, metrics=unknown).result.version == 1


def test_what_the_evaluation_asked_is_registered(registry: Registry) -> None:
    metrics = measure({"well_formed": 0.9, "asked": "easy"}, model=train({"seed": 0}).refs["model"]).refs["metrics"]
    register({"model_name": "asked", "gates": [GATE]}, model=train({"seed": 0}).refs["model"], metrics=metrics)
    version = registry.version("asked", 1)
    assert version is not None and version.asked == "easy"


def test_a_store_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("ling_flow.flow.tracking.FINISH_SECONDS", 0.5)
    with pytest.raises(SystemFault, match=r"tracking store http://127\.0\.0\.1:9 cannot be used"):
        registered("away", 0, 0.9)
