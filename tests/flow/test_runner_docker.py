"""`lingflow run --runner docker` where nothing can run; whole runs on an engine are in tests/e2e/test_containers.py."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ling_flow.errors import UserError
from ling_flow.flow.containers import User, check_tracking, hand_over, images_of, runner_arguments
from ling_flow.flow.context import Context
from tests.conftest import REPOSITORY, Called

DAG = "tests/flow/toy/faulty.py"
Call = Callable[..., Called]


def test_no_engine_is_one_clear_error(call: Call, tmp_path: Path) -> None:
    failed = call("run", DAG, "--runner", "docker", DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert failed.code == 3
    assert failed.err.startswith(f"error: DOCKER_HOST: no container engine answers at unix://{tmp_path}/none.sock")
    assert "start Docker, or podman" in failed.err
    assert not (tmp_path / "home").exists(), "nothing is begun"


def test_a_mount_needs_containers(call: Call, tmp_path: Path) -> None:
    failed = call("run", DAG, "--mount", str(tmp_path))
    assert failed.code == 2
    assert failed.err.startswith("error: --mount: ")


def context(home: Path, **changes: str) -> Context:
    return Context.from_environment({"LING_FLOW_HOME": str(home), **changes})


def test_what_a_container_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_text("")
    given = {"MLFLOW_TRACKING_URI": "http://there", "AWS_CA_BUNDLE": str(bundle), "LING_FLOW_CODE_VERSION": "of here"}
    for name, value in {**given, "PATH": "/here/only"}.items():
        monkeypatch.setenv(name, value)
    home, artifacts, data = tmp_path / "home", tmp_path / "artifacts", tmp_path / "data"
    arguments = runner_arguments(
        User(1234, 5678, of_image=False), context(home, LING_FLOW_ARTIFACTS=str(artifacts)), "run-1", [data]
    )

    environment = arguments["environment"]
    assert environment["MLFLOW_TRACKING_URI"] == "http://there"
    assert environment["HOME"] == "/tmp", "the image knows no home of that user"
    assert not {"PATH", "LING_FLOW_CODE_VERSION"} & set(environment)
    assert arguments["user"] == "1234:5678"
    mounts = {mount["Target"]: (mount["Source"], mount["ReadOnly"]) for mount in arguments["mounts"]}
    writable = {str(path): (str(path), False) for path in (home, artifacts)}
    assert mounts == writable | {str(path): (str(path), True) for path in (data, bundle)}


def test_a_database_that_containers_do_not_see(tmp_path: Path) -> None:
    check_tracking(context(tmp_path / "home"), f"sqlite:///{tmp_path}/home/mlflow.db")
    check_tracking(context(tmp_path / "home"), "http://there")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI: .*lies outside"):
        check_tracking(context(tmp_path / "home"), f"sqlite:///{tmp_path}/mlflow.db")


def test_images_of_a_dag() -> None:
    executors: dict[str, Any] = {"a": {"container": {"image": "one"}}, "b": {"container": {"image": "two"}}, "c": {}}
    assert images_of({"deploymentSpec": {"executors": executors}}) == {"one", "two"}


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_root_hands_over_what_is_its_own(tmp_path: Path) -> None:
    home, run = tmp_path / "home", tmp_path / "home/runs/one"
    for path in (home / "artifacts/a/b", home / "other", run):
        path.mkdir(parents=True)
    files = [home / "mlflow.db", home / "artifacts/a/b/manifest.json", home / "other/file"]
    for path in files:
        path.touch()
    os.chown(files[1], 4321, 4321)
    hand_over(context(home), run, User(1000, 1000, of_image=True))
    assert [path.stat().st_uid for path in (home, run, *files)] == [1000, 1000, 1000, 4321, 0]


@pytest.mark.slow
def test_a_step_ends_when_its_runners_lock_is_free(tmp_path: Path) -> None:
    path = tmp_path / "runner.lock"
    code = (
        "import time; from ling_flow.flow.kfp_face import _end_with_runner as watch; watch(); print(); time.sleep(60)"
    )
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        step = subprocess.Popen(
            [sys.executable, "-u", "-c", code],
            cwd=REPOSITORY, env={**os.environ, "LING_FLOW_RUNNER_LOCK": str(path)}, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert step.stdout is not None
        step.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            step.wait(1.5)
    assert step.wait(30) != 0
