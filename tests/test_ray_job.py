"""`ray job submit` of one component against a real Ray head."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY, Called
from tests.flow.ray_head import RAY, RayHead, ray_environment

pytestmark = [pytest.mark.slow]

MICRO = REPOSITORY / "tests" / "e2e" / "micro.yaml"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of its job server."""
    head = RayHead(tmp_path_factory.mktemp("ray"))
    head.start()
    yield head.address
    head.stop()


def submit(address: str, *command: str, **environment: str) -> str:
    """Submit `command` with the repository as working directory; what the job printed."""
    runtime = json.dumps({"env_vars": environment})
    done = subprocess.run(
        [
            RAY, "job", "submit", "--address", address, "--working-dir", ".", "--runtime-env-json", runtime, "--",
            *command,
        ],
        cwd=REPOSITORY, env=ray_environment(), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_upload_leaves_out_environments_artifacts_and_history(head: str, tmp_path: Path) -> None:
    (REPOSITORY / ".lingflow").mkdir(exist_ok=True)
    printed = submit(head, sys.executable, "-c", "import os; print(sorted(os.listdir()))")
    uploaded = re.search(r"\['.*'\]", printed)
    assert uploaded, printed
    names = set(json.loads(uploaded[0].replace("'", '"')))
    assert {"components", "ling_flow", "dags", "pyproject.toml"} <= names
    assert not {".venv", ".git", ".lingflow", "artifacts"} & names


def test_pretrain_as_a_ray_job_gives_what_a_plain_process_gives(
    head: str, tmp_path: Path, call: Callable[..., Called]
) -> None:
    root = tmp_path / "artifacts"
    for phase in ("prepare_data", "wind_tunnel", "fit_scaling_laws", "pretrain_short"):
        (tmp_path / f"{phase}.yaml").write_text(yaml.safe_dump(_whole_config(phase)))
    data = call(
        "--config", str(tmp_path / "prepare_data.yaml"), "--root", str(root), "--json", module="components.prepare_data"
    )
    corpus = data.json["outputs"]["corpus"]
    tunnel = call(
        "--config", str(tmp_path / "wind_tunnel.yaml"), "--corpus", corpus, "--root", str(root), "--json",
        module="components.wind_tunnel", timeout=300,
    )  # fmt: skip
    fit = call(
        "--config", str(tmp_path / "fit_scaling_laws.yaml"), "--trials", tunnel.json["outputs"]["trials"],
        "--root", str(root), "--json", module="components.fit_scaling_laws",
    )  # fmt: skip
    arguments = [
        "--config", str(tmp_path / "pretrain_short.yaml"), "--corpus", corpus,
        "--scaling_law", fit.json["outputs"]["scaling_law"], "--json",
    ]  # fmt: skip
    here = call(*arguments, "--root", str(tmp_path / "here"), module="components.pretrain", timeout=300)
    assert here.code == 0, here.err
    there = call(
        "job", "pretrain", "--config", str(tmp_path / "pretrain_short.yaml"), "--input", f"corpus={corpus}",
        "--input", f"scaling_law={fit.json['outputs']['scaling_law']}", "--root", str(tmp_path / "there"), "--json",
        "--address", head, "--working-dir", ".", timeout=300, RAY_AUTH_MODE="disabled",
        LING_FLOW_JOB=json.dumps({"env": {"OMP_NUM_THREADS": "1", "LING_FLOW_HOME": str(tmp_path / "home")}}),
    )  # fmt: skip
    assert there.code == 0, there.err
    assert re.search(r"pretrain_short: \d+/\d+ .*loss", there.err), "the job's progress is shown here"
    assert there.json["fingerprint"] == here.json["fingerprint"]
    assert there.json["result"]["validation_loss"] == here.json["result"]["validation_loss"]


def _whole_config(phase: str) -> dict[str, object]:
    """The config of a phase of the micro lifecycle."""
    from components.plan import PlanConfig, resolve_lifecycle

    overrides = yaml.safe_load(MICRO.read_text())
    overrides.pop("preset")
    lifecycle = resolve_lifecycle(PlanConfig(overrides=json.dumps(overrides)))
    dumped: dict[str, object] = getattr(lifecycle, phase).model_dump(mode="json")
    return dumped
