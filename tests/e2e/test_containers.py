"""The lifecycle at its smallest size with each step in a container of its image, on a real engine (podman).

LING_FLOW_TEST_IMAGE names an image that is there already, in the storage of infra/images/engine; without it the image
is built from this tree.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ling_flow.flow.identity import code_version
from tests.conftest import REPOSITORY, Called, run_module, user_environment
from tests.dags.test_lifecycle_ir import PHASES

ENGINE = str(REPOSITORY / "infra/images/engine")
USER = 1000  # of the image

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not all(map(shutil.which, ("podman", "buildah", "runc"))) or os.getuid() != 0,
        reason="needs root, podman, buildah and runc (apt-get install podman buildah runc mmdebstrap)",
    ),
]


def engine(*arguments: str) -> str:
    done = subprocess.run([ENGINE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def image() -> str:
    given = os.environ.get("LING_FLOW_TEST_IMAGE")
    if given:
        return given
    built = subprocess.run(
        [sys.executable, str(REPOSITORY / "infra/images/build")], stdout=subprocess.PIPE, text=True, check=True
    )
    return built.stdout.split()[-1]


@pytest.fixture(scope="module")
def socket(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the Docker API."""
    path = tmp_path_factory.mktemp("engine") / "podman.sock"
    service = subprocess.Popen([ENGINE, "system", "service", "--time", "0", f"unix://{path}"])
    try:
        for _ in range(100):
            if path.is_socket():
                break
            time.sleep(0.1)
        yield f"unix://{path}"
    finally:
        service.terminate()
        service.wait()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("containers")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Code and prose outside the home; readable for the image's user."""
    texts = tmp_path_factory.mktemp("texts")
    texts.chmod(0o755)
    for pattern in ("ling_flow/data/*.py", "docs/*.md"):
        for path in sorted(REPOSITORY.glob(pattern)):
            shutil.copy(path, texts)
    return texts


@pytest.fixture(scope="module")
def config(home: Path, texts: Path) -> str:
    """micro.yaml on files, which here and in the image are the same; the standard library is not."""
    content = yaml.safe_load(Path(__file__).with_name("micro.yaml").read_text())
    for source, (name, pattern) in zip(
        content["prepare_data"]["sources"], {"python_code": "*.py", "python_prose": "*.md"}.items(), strict=False
    ):
        assert source["name"] == name
        source.clear()
        source |= {"kind": "files", "name": name, "paths": [f"{texts}/{pattern}"], "max_characters": 60000}
    path = home / "micro.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def environment(home: Path, socket: str, image: str) -> dict[str, str]:
    return {**user_environment(home), "DOCKER_HOST": socket, "LING_FLOW_IMAGE": image}


@pytest.fixture(scope="module")
def run_arguments(config: str, texts: Path) -> list[str]:
    return ["run", "--config", config, "--runner", "docker", "--mount", str(texts)]


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(environment: dict[str, str], run_arguments: list[str]) -> Run:
    def call(*arguments: str) -> dict[str, Any]:
        done = run_module(environment, *run_arguments, "--json", *arguments, timeout=1000)
        assert done.code == 0, done.err
        result: dict[str, Any] = done.json
        return result

    return call


@pytest.fixture(scope="module")
def done(run: Run) -> dict[str, Any]:
    """The first run."""
    return run()


def computed(result: dict[str, Any]) -> list[str]:
    return [phase for phase, entry in result["phases"].items() if not entry["cached"]]


def manifest(home: Path, reference: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(reference).parent / "manifest.json").read_text())
    return content


def containers() -> str:
    return engine("ps", "--all", "--quiet")


def test_every_step_runs_in_its_image(done: dict[str, Any], home: Path, image: str) -> None:
    assert done["status"] == "succeeded"
    assert list(done["phases"]) == PHASES
    assert computed(done) == PHASES

    found = json.loads(engine("image", "inspect", image))[0]
    assert found["Config"]["User"] == f"{USER}:{USER}"
    made_by = found["Labels"]["org.opencontainers.image.version"]
    if "LING_FLOW_TEST_IMAGE" not in os.environ:
        assert made_by == code_version()
    for entry in done["phases"].values():
        for reference in entry["artifacts"].values():
            assert manifest(home, reference)["code_version"] == made_by
            assert Path(reference).stat().st_uid == USER, "steps do not run as root"
    assert containers() == ""


def test_its_runs_are_in_mlflow(done: dict[str, Any], home: Path) -> None:
    from ling_flow.flow.mlflow_store import connect

    client = connect(f"sqlite:///{home}/mlflow.db")
    parent = client.get_run(done["mlflow_run_id"])
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{done['mlflow_run_id']}'", max_results=100
    )
    assert {run.info.run_name for run in children} == set(PHASES)
    assert parent.info.status == "FINISHED"
    assert int(client.get_model_version_by_alias("ling-micro", "champion").version) == 1


def test_run_again_nothing_is_computed(done: dict[str, Any], run: Run) -> None:
    assert computed(run()) == []


def test_processes_find_what_containers_made(
    done: dict[str, Any], environment: dict[str, str], config: str, home: Path
) -> None:
    """The same fingerprints, and the same weights where they are trained again."""
    plan = run_module(environment, "plan", "--config", config, "--json").json["nodes"]
    assert [node["step"] for node in plan if node["state"] == "run"] == ["deploy"], "its endpoint ended with its step"
    made = {phase: entry["artifacts"] for phase, entry in done["phases"].items() if entry["artifacts"]}
    for node in plan:
        for reference in made.get(node["step"], {}).values():
            assert Path(reference).parent.name == node["fingerprint"]

    (home / "short.json").write_text(json.dumps(manifest(home, _checkpoints(done))["config"]))
    trained = run_module(
        environment,
        "--config", str(home / "short.json"),
        "--corpus", done["phases"]["prepare_data"]["artifacts"]["corpus"],
        "--scaling_law", done["phases"]["fit_scaling_laws"]["artifacts"]["scaling_law"],
        "--root", str(home / "here"), "--json", module="components.pretrain", timeout=900,
    )  # fmt: skip
    assert trained.code == 0, trained.err
    ours, theirs = Path(trained.json["outputs"]["checkpoints"]), Path(_checkpoints(done))
    assert ours.parent.name == theirs.parent.name
    latest = json.loads((ours / "checkpoints.json").read_text())["latest"]
    assert (ours / latest / "model.safetensors").read_bytes() == (theirs / latest / "model.safetensors").read_bytes()


def _checkpoints(result: dict[str, Any]) -> str:
    return str(result["phases"]["pretrain_short"]["artifacts"]["checkpoints"])


def test_a_step_that_fails_tells_its_own_error(
    done: dict[str, Any], environment: dict[str, str], run_arguments: list[str]
) -> None:
    failed = run_module(environment, *run_arguments, "--set", "capability_pass.examples_per_batch=999", timeout=900)
    assert failed.code == 2
    assert "error: capability_pass: examples_per_batch: 999 asked, but only" in failed.err
    assert "Traceback" not in failed.err
    assert containers() == ""


def test_a_missing_image_is_named(environment: dict[str, str], run_arguments: list[str]) -> None:
    failed: Called = run_module({**environment, "LING_FLOW_IMAGE": "ling-flow:none"}, *run_arguments)
    assert failed.code == 2
    assert "error: image ling-flow:none: it is not here; build it (infra/images/build)" in failed.err


SLOW = ["--set", "pretrain_short.tokens=120000", "--set", "pretrain_short.checkpoints_saved=40"]


def _until_it_trains(home: Path, running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not list(home.glob("artifacts/pretrain/*.partial/checkpoints/step-*/training_state/files.json")):
        assert running.poll() is None, running.stderr.read() if running.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_runner_ends_so_do_its_containers(
    number: signal.Signals,
    done: dict[str, Any],
    run: Run,
    environment: dict[str, str],
    run_arguments: list[str],
    home: Path,
) -> None:
    """Killed or told to stop: no container trains on, and the next run goes on from the last checkpoint."""
    slow = [*SLOW, "--set", f"pretrain_short.seed={int(number)}"]
    command = [sys.executable, "-m", "ling_flow.cli", *run_arguments, *slow]
    running = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)
    _until_it_trains(home, running)
    assert containers() != ""
    running.send_signal(number)
    running.communicate(timeout=120)

    deadline = time.monotonic() + 60
    while engine("ps", "--quiet"):
        assert time.monotonic() < deadline, "a container trains on"
        time.sleep(0.2)
    plan = run_module(environment, "plan", *run_arguments[1:3], *slow, "--json").json["nodes"]
    states = {node["step"]: node["reason"] for node in plan}
    assert states["pretrain_short"] == "begun earlier and not finished; goes on from its last checkpoint"
    if number == signal.SIGKILL:
        events = _finish(environment, run_arguments, slow, home)
        assert any("resum" in event["text"] for event in events if event["event"] == "log"), events
    assert containers() == "", "what a killed runner left is removed by the next"


def _finish(environment: dict[str, str], run_arguments: list[str], slow: list[str], home: Path) -> list[dict[str, Any]]:
    """Run on until the stage is done; what that stage said."""
    command = [sys.executable, "-m", "ling_flow.cli", *run_arguments, *slow]
    before = set(home.glob("runs/*"))
    running = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            time.sleep(0.2)
            assert running.poll() in (None, 0)
            for directory in set(home.glob("runs/*")) - before:
                lines = (
                    (directory / "events.jsonl").read_text().splitlines()
                    if (directory / "events.jsonl").exists()
                    else []
                )
                events = [event for event in map(json.loads, lines) if event["step"] == "pretrain_short"]
                if any(event["event"] == "done" for event in events):
                    return events
        raise AssertionError("the stage was not finished")
    finally:
        running.terminate()
        running.wait(timeout=120)
