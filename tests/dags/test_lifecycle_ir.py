"""The compiled lifecycle: a golden copy, KFP's own loader, and what a reader of the IR may rely on.

After a change that is meant to change the graph: lingflow compile lifecycle -o tests/dags/lifecycle.yaml
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.pretrain import pretrain
from ling_flow.config import StrictModel
from tests.conftest import Called

GOLDEN = Path(__file__).with_name("lifecycle.yaml")
PHASES = [
    "plan", "prepare_data", "wind_tunnel", "fit_scaling_laws", "pretrain_short", "pretrain_mid", "pretrain_long",
    "merge_checkpoints", "capability_pass", "preference_pass", "evaluate", "register", "deploy",
]  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(GOLDEN.read_text())
    return loaded


def test_compiling_gives_the_golden_copy(call: Callable[..., Called], tmp_path: Path) -> None:
    done = call("compile", "lifecycle", "-o", str(tmp_path / "lifecycle.yaml"))
    assert done.code == 0, done.err
    assert (tmp_path / "lifecycle.yaml").read_text() == GOLDEN.read_text(), "see this file's first lines"


def test_kfp_loads_it() -> None:
    from kfp import components

    loaded = components.load_component_from_file(str(GOLDEN))
    assert loaded.name == "lifecycle"
    assert set(loaded.component_spec.inputs) == {"preset", "overrides", "seed"}


def test_nodes_and_edges(golden: dict[str, Any]) -> None:
    tasks = golden["root"]["dag"]["tasks"]
    names = {key: task["taskInfo"]["name"] for key, task in tasks.items()}
    display = {"pretrain": "pretrain_short", "pretrain-2": "pretrain_mid", "pretrain-3": "pretrain_long"}
    assert sorted(display.get(key, key.replace("-", "_")) for key in names) == sorted(PHASES)
    law = tasks["pretrain"]["inputs"]["artifacts"]["scaling_law"]["taskOutputArtifact"]
    assert law == {"outputArtifactKey": "scaling_law", "producerTask": "fit-scaling-laws"}
    previous = tasks["pretrain-3"]["inputs"]["artifacts"]["previous"]["taskOutputArtifact"]
    assert previous["producerTask"] == "pretrain-2"
    assert not any(task.get("cachingOptions", {}).get("enableCache") for task in tasks.values())


def test_artifact_types(golden: dict[str, Any]) -> None:
    kinds = {
        (name, output): spec["artifactType"]["schemaTitle"]
        for name, component in golden["components"].items()
        for output, spec in component.get("outputDefinitions", {}).get("artifacts", {}).items()
    }
    assert kinds["comp-prepare-data", "corpus"] == "system.Dataset"
    assert kinds["comp-pretrain", "checkpoints"] == "system.Model"
    assert kinds["comp-evaluate", "metrics"] == "system.Metrics"
    assert kinds["comp-evaluate", "report"] == "system.HTML"


def test_one_declaration_gives_ir_and_command_line(golden: dict[str, Any], call: Callable[..., Called]) -> None:
    """Names, types and defaults of the real `pretrain`: in its model, in the IR's description, in `--help`."""
    described = golden["components"]["comp-pretrain"]["inputDefinitions"]["parameters"]["config"]["description"]
    shown = " ".join(call("--help", module="components.pretrain").out.split())
    for name, field in pretrain.config_model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, StrictModel):
            for inner in field.annotation.model_fields:  # shown flat
                assert f"{name}.{inner} (" in described
                assert f"--{name}.{inner} " in shown
            continue
        assert f"{name} (" in described
        assert f"--{name} " in shown
        if not field.is_required():
            assert f"default {json.dumps(field.default)}" in described
    results = golden["components"]["comp-pretrain"]["outputDefinitions"]["parameters"]
    assert results["validation_loss"]["parameterType"] == "NUMBER_DOUBLE"
    assert set(results) == set(pretrain.result_model.model_fields)
