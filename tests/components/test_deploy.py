import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.deploy import deploy
from components.register import register
from ling_flow.errors import UserError
from ling_flow.flow.component import Component
from ling_flow.flow.context import Context
from ling_flow.flow.promotion import Registry
from ling_flow.serving.server import endpoint_status, stop_all, stop_endpoint
from tests.components.serving_steps import measure, train
from tests.ports import free_port


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LING_FLOW_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield tmp_path
    stop_all(tmp_path)


def registration(seed: int, well_formed: float) -> str:
    model = train({"seed": seed}).refs["model"]
    metrics = measure({"well_formed": well_formed}, model=model).refs["metrics"]
    config = {"gates": [{"metric": "well_formed", "threshold": 0.5}]}
    return register(config, model=model, metrics=metrics).refs["registration"]


def test_without_a_champion_there_is_nothing_to_deploy(home: Path) -> None:
    failed = registration(0, 0.1)
    with pytest.raises(UserError, match=r"ling-tiny: nothing to deploy, no version is champion: gate failed .*0\.1"):
        deploy({}, registration=failed)
    assert not (home / "endpoints").exists()


def test_port_and_host_bear_no_identity() -> None:
    from ling_flow.config import identity_of

    def identity(component: Component, config: dict[str, Any]) -> dict[str, Any]:
        return identity_of(component.parse_config(config))

    assert identity(deploy, {"port": 8123, "host": "0.0.0.0"}) == identity(deploy, {})
    assert identity(deploy, {"rayservice": "chat"}) == identity(deploy, {})
    assert identity(deploy, {"seed": 1}) != identity(deploy, {})


@pytest.mark.slow
def test_the_champion_is_served_replaced_and_proven(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # where other steps run as jobs; nothing to an endpoint
    first = registration(0, 0.9)
    outcome = deploy({}, registration=first)
    result = outcome.result
    assert (result.model_name, result.model_version) == ("ling-tiny", 1)
    assert result.fingerprint == train({"seed": 0}).fingerprint
    with urllib.request.urlopen(f"{result.url}/health", timeout=5) as response:
        assert json.load(response)["fingerprint"] == result.fingerprint
    written = json.loads(Path(outcome.outputs["deployment"], "deployment.json").read_text())
    assert written["answer"]["choices"][0]["message"]["content"] == result.completion
    assert written["answer"]["usage"]["completion_tokens"] > 0
    assert (written["model_uri"], written["endpoint"]["url"]) == ("models:/ling-tiny/1", result.url)
    assert deploy({}, registration=first).cached
    with pytest.raises(UserError, match=r"refused the request that should prove it: 400 .*max_tokens: 5000"):
        deploy({"max_tokens": 5000}, registration=first)
    assert deploy({}, registration=first).cached  # what this step did not start stays

    elsewhere = {"port": free_port()}
    moved = deploy(elsewhere, registration=first)
    assert not moved.cached and moved.result.url == f"http://127.0.0.1:{elsewhere['port']}"
    assert deploy(elsewhere, registration=first).cached
    result = moved.result

    second = deploy({}, registration=registration(1, 0.9)).result  # replaced in its place
    assert (second.model_version, second.url) == (2, result.url)
    assert second.fingerprint != result.fingerprint
    status = endpoint_status("ling-tiny", home)
    assert status is not None and status.healthy and status.endpoint.version == 2

    registry, still = Registry.of(Context.from_environment()), deploy.still_valid
    config = deploy.parse_config({})
    assert still is not None and still(config, second, home)
    assert not still(deploy.parse_config({"rayservice": "chat"}), second, home)
    registry.rollback("ling-tiny", "users complained")
    assert not still(config, second, home)  # the alias has moved: the next run deploys
    again_champion = registry.version("ling-tiny", 2)
    assert again_champion is not None
    registry.promote(again_champion, (), "they were wrong", by_hand=True)
    assert still(config, second, home)

    failed = deploy({}, registration=registration(2, 0.1)).result  # not the champion: version 2 stays
    assert (failed.model_version, failed.fingerprint) == (2, second.fingerprint)

    stop_endpoint("ling-tiny", home)
    again = deploy({}, registration=registration(1, 0.9))  # its effect is gone, so it is not served from the cache
    assert not again.cached
    assert again.result.completion == second.completion
