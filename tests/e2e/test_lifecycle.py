"""The whole lifecycle through the command line, and the figures it must show at preset tiny.

LING_FLOW_TEST_HOME names a home whose artifacts may be used. If a stack was started in it, as CI does, that is where
the run goes: MLflow with passwords on PostgreSQL, artifacts on S3. Else files and SQLite.
"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ling_flow.flow.mlflow_store import connect, default_tracking_uri
from ling_flow.flow.stack import Stack
from tests.conftest import Called, run_module, user_environment
from tests.dags.test_lifecycle_ir import PHASES

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

Call = Callable[..., Called]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> str:
    return os.environ.get("LING_FLOW_TEST_HOME") or str(tmp_path_factory.mktemp("lifecycle"))


@pytest.fixture(scope="module")
def stores(home: str) -> dict[str, str]:
    """The variables that lead to the stack in that home, none where there is no stack."""
    stack = Stack(Path(home) / "stack")
    return stack.environment() if stack.status() else {}


@pytest.fixture(scope="module")
def tiny(home: str, stores: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The object that `--json` prints."""
    environment = {**user_environment(Path(home)), **stores}
    done = run_module(environment, "run", "lifecycle", "--preset", "tiny", "--json", timeout=3500)
    assert done.code == 0, done.err
    yield done.json
    run_module(environment, "stop")


def test_every_figure_it_must_show(tiny: dict[str, Any]) -> None:
    assert tiny["status"] == "succeeded"
    assert list(tiny["phases"]) == PHASES
    figures = {phase: entry["metrics"] for phase, entry in tiny["phases"].items()}
    data, merged = figures["prepare_data"], figures["merge_checkpoints"]
    aligned, judged = figures["preference_pass"], figures["evaluate"]

    assert data["tokens"] > 2_000_000
    assert figures["wind_tunnel"]["trial_count"] >= 12
    for stage in ("pretrain_short", "pretrain_mid", "pretrain_long"):
        assert figures[stage]["validation_loss"] < 0.6 * data["unigram_entropy"]
        assert figures[stage]["tokens_per_second"] > 0
    law = figures["fit_scaling_laws"]
    assert figures["pretrain_short"]["learning_rate"] == law["learning_rate"], (
        "what the wind tunnel found is what is used"
    )
    assert abs(figures["pretrain_short"]["batch_tokens"] - law["batch_tokens"]) <= 128
    assert merged["validation_loss_merged"] < merged["validation_loss_last"]
    assert figures["capability_pass"]["thinking_switch_obeyed"] >= 0.95
    assert aligned["reward_after"] - aligned["reward_before"] > aligned["reward_standard_error"] > 0
    assert judged["exact_match_easiest"] > 2 * judged["chance_easiest"]
    # Which of the two is higher is luck of the data in so small a model (docs/log.md, 2026-11-28).
    assert min(judged["exact_match_thinking_on"], judged["exact_match_thinking_off"]) > 0.15
    assert judged["well_formed"] >= 0.95
    assert figures["register"]["promoted"] is True


def test_the_endpoint_answers_over_http(tiny: dict[str, Any]) -> None:
    deployed = tiny["phases"]["deploy"]["metrics"]
    body = {
        "messages": [{"role": "user", "content": "3 + 4 = ?"}],
        "temperature": 0,
        "max_tokens": 64,
        "chat_template_kwargs": {"enable_thinking": True},
    }
    request = urllib.request.Request(
        f"{deployed['url']}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    message = answer["choices"][0]["message"]
    assert answer["object"] == "chat.completion"
    assert message["content"].strip()
    assert message["reasoning_content"].strip(), "thinking was asked for"


def test_a_second_run_is_served_from_artifacts(
    tiny: dict[str, Any], home: str, stores: dict[str, str], call: Call
) -> None:
    again = call("--home", home, "run", "lifecycle", "--preset", "tiny", "--json", timeout=900, **stores).json
    assert all(entry["cached"] for entry in again["phases"].values())
    assert [entry["metrics"] for entry in again["phases"].values()] == [
        entry["metrics"] for entry in tiny["phases"].values()
    ]


def test_lineage_leads_back_to_data_and_code(
    tiny: dict[str, Any], home: str, stores: dict[str, str], call: Call
) -> None:
    tree = call("--home", home, "lineage", "models:/ling-tiny@champion", "--json", **stores).json
    seen: list[str] = []
    node = tree["model"]
    while node:
        seen.append(node["component"])
        assert node["code_version"]
        inputs = node["inputs"]
        node = inputs.get("base") or inputs.get("checkpoints") or inputs.get("previous") or inputs.get("corpus")
    assert seen == [
        "preference_pass", "capability_pass", "merge_checkpoints", "pretrain", "pretrain", "pretrain", "prepare_data",
    ]  # fmt: skip


def test_the_run_tree_in_mlflow(
    tiny: dict[str, Any], home: str, stores: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in stores.items():
        monkeypatch.setenv(name, value)
    client = connect(stores.get("MLFLOW_TRACKING_URI") or default_tracking_uri(Path(home)))
    parent = client.get_run(tiny["mlflow_run_id"])
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{tiny['mlflow_run_id']}'", max_results=100
    )
    assert {run.info.run_name for run in children} == set(PHASES)
    assert {run.info.status for run in children} == {"FINISHED"}
    champion = client.get_model_version_by_alias("ling-tiny", "champion")
    assert champion.tags["ling_flow.fingerprint"] == tiny["phases"]["register"]["metrics"]["fingerprint"]
    assert client.get_model_version_by_alias("ling-tiny", "candidate").version == champion.version
    source = client.get_model_version("ling-tiny", champion.version).source
    assert client.get_logged_model(source.removeprefix("models:/")).tags["ling_flow.component"] == "preference_pass"
    (decision,) = [
        item for item in client.search_model_versions("name = 'ling-tiny.promotions'") if item.version == "1"
    ]
    assert decision.description.startswith(f"promote version {champion.version}: passed: ")
