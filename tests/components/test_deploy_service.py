"""The application that a RayService starts, and the version it is bound to. Ray Serve runs it in test_ray_jobs.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.deploy import service
from components.deploy.service import champion
from components.register import register
from ling_flow.errors import UserError
from tests.components.serving_steps import measure, train


def registered(seed: int) -> None:
    model = train({"seed": seed}).refs["model"]
    metrics = measure({"well_formed": 0.9}, model=model).refs["metrics"]
    register({"gates": [{"metric": "well_formed", "threshold": 0.5}]}, model=model, metrics=metrics)


@pytest.mark.slow
def test_an_alias_is_the_version_it_stood_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LING_FLOW_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registered(0)
    assert service._pinned("models:/ling-tiny@champion") == "models:/ling-tiny/1"
    registered(1)
    assert service._pinned("models:/ling-tiny@champion") == "models:/ling-tiny/2"
    assert service._pinned("models:/ling-tiny/1") == "models:/ling-tiny/1"
    with pytest.raises(UserError, match="no version of ling-tiny has the alias chosen"):
        champion({"model": "models:/ling-tiny@chosen"})


@pytest.mark.parametrize("arguments", [{}, {"modle": "x"}, {"model": "models:/x/1", "other": "y"}])
def test_its_arguments(arguments: dict[str, str]) -> None:
    with pytest.raises(UserError, match="args: must hold `model` and nothing else"):
        champion(arguments)
