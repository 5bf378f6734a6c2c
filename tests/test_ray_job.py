"""`ray job submit` of one component against a real Ray head."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY, Called

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MICRO = REPOSITORY / "tests" / "e2e" / "micro.yaml"
RAY = str(Path(sys.executable).with_name("ray"))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray head of our own in the foreground of a process group; the address of its job server."""
    port, dashboard = _free_port(), _free_port()
    environment = _ray_environment()
    log = tmp_path_factory.mktemp("ray") / "head.log"
    command = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=true"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    with log.open("wb") as output:
        started = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        address = f"http://127.0.0.1:{dashboard}"
        deadline = time.monotonic() + 120
        while not _answers(f"{address}/api/version"):
            assert started.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield address
        started.terminate()
        started.wait(60)


def _ray_environment() -> dict[str, str]:
    """No token: this head listens on the loopback only, and a token of the user's would be asked for but not sent."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "RAY_AUTH_MODE": "disabled"}


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def submit(address: str, *command: str, **environment: str) -> str:
    """Submit `command` with the repository as working directory; what the job printed."""
    runtime = json.dumps({"env_vars": environment})
    done = subprocess.run(
        [
            RAY, "job", "submit", "--address", address, "--working-dir", ".", "--runtime-env-json", runtime, "--",
            *command,
        ],
        cwd=REPOSITORY, env=_ray_environment(), capture_output=True, text=True, timeout=400, check=False,
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
    printed = submit(
        head, sys.executable, "-m", "components.pretrain", *arguments, "--root", str(tmp_path / "there"),
        OMP_NUM_THREADS="1", LING_FLOW_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    there = json.loads(next(line for line in reversed(printed.splitlines()) if line.startswith("{")))
    assert there["fingerprint"] == here.json["fingerprint"]
    assert there["result"]["validation_loss"] == here.json["result"]["validation_loss"]


def _whole_config(phase: str) -> dict[str, object]:
    """The config of a phase of the micro lifecycle."""
    from components.plan import PlanConfig, resolve_lifecycle

    overrides = yaml.safe_load(MICRO.read_text())
    overrides.pop("preset")
    lifecycle = resolve_lifecycle(PlanConfig(overrides=json.dumps(overrides)))
    dumped: dict[str, object] = getattr(lifecycle, phase).model_dump(mode="json")
    return dumped
