"""Steps as jobs on a real Ray head: the same artifact, re-attached, stopped, killed, and through a head's death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy.draw import DrawConfig, draw

from components.deploy import deploy
from components.register import register
from ling_flow.errors import SystemFault, UserError
from ling_flow.flow import rayservice
from ling_flow.flow.context import Context
from ling_flow.flow.job_settings import JobSettings
from ling_flow.flow.jobs import job_of
from ling_flow.flow.ray_jobs import TERMINAL, connect
from ling_flow.flow.step import identify, run_step
from tests.components.serving_steps import measure, train
from tests.conftest import REPOSITORY
from tests.flow.conftest import HERE
from tests.flow.kubernetes_api import KubernetesStandIn
from tests.flow.ray_head import RayHead
from tests.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]


@pytest.fixture(scope="module")
def started_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    head = RayHead(tmp_path_factory.mktemp("ray"), PYTHONPATH=f"{REPOSITORY}:{HERE}")
    head.start()
    yield head
    head.stop()


@pytest.fixture
def head(started_head: RayHead, calls: Path, monkeypatch: pytest.MonkeyPatch) -> RayHead:
    """The head, to which this process and those it starts submit; bodies are counted in `calls`."""
    monkeypatch.setenv("RAY_ADDRESS", started_head.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("LING_FLOW_RUN_ON", "ray-job")
    set_job(monkeypatch, calls)
    return started_head


def set_job(monkeypatch: pytest.MonkeyPatch, calls: Path, **settings: Any) -> None:
    resources = {"cpus": 0.5, "memory_gib": 0.1}
    value = {"env": {"TOY_CALLS": str(calls)}, "patience_s": 3, "resources": resources, **settings}
    monkeypatch.setenv("LING_FLOW_JOB", json.dumps(value))


def launch(*arguments: str, module: str = "toy.draw") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments], cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def launch_job(*arguments: str) -> subprocess.Popen[str]:
    return launch("job", *arguments, module="ling_flow.cli")


def submission(config: DrawConfig, attempt: int = 1) -> str:
    context = Context.from_environment()
    return job_of(identify(draw, config, {}, None, context), context, JobSettings(), rebuild=False).name(attempt)


def info(head: RayHead, name: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{head.address}/api/jobs/{name}", timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def drawn(home: Path) -> int:
    return len(list(home.glob("artifacts/draw/*.partial/numbers/*.txt")))


def test_a_job_makes_the_artifact_that_this_process_makes(
    head: RayHead, home: Path, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DrawConfig(count=8, pause=0.1)
    events = tmp_path / "events"
    monkeypatch.setenv("LING_FLOW_EVENTS", str(events))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
    there = run_step(draw, config, {})
    assert calls.read_text() == "draw\n"  # the job's, not this process's
    told = [json.loads(line) for line in events.read_text().splitlines()]
    assert [event["event"] for event in told if event["event"] in ("start", "done")] == ["start", "done"]
    assert any(event["event"] == "progress" and event["done"] == 8 for event in told)
    job = info(head, submission(config))
    assert job["status"] == "SUCCEEDED" and job["metadata"]["ling_flow.fingerprint"] == there.fingerprint
    assert "topsecret" not in json.dumps(job)
    assert not there.cached and run_step(draw, config, {}).cached

    monkeypatch.setenv("LING_FLOW_RUN_ON", "process")
    here = run_step(draw, config, {}, root=tmp_path / "here")
    assert (here.fingerprint, here.result, here.manifest.files) == (
        there.fingerprint,
        there.result,
        there.manifest.files,
    )


def test_a_killed_launcher_leaves_its_job_to_the_next_try(head: RayHead, home: Path, calls: Path) -> None:
    arguments = ["--count", "60", "--pause", "0.1", "--name", "killed"]
    first = launch(*arguments)
    until(lambda: drawn(home))
    first.kill()
    first.communicate()
    out, err = launch(*arguments, "--json").communicate(timeout=200)
    assert "attaching to job" in err
    assert json.loads(out.splitlines()[-1])["result"]["started_at"] == 0
    assert calls.read_text() == "draw\n"


def test_sigterm_stops_the_job_and_the_next_attempt_goes_on(head: RayHead, home: Path) -> None:
    config = DrawConfig(count=60, pause=0.1, name="cancelled")
    first = launch("--count", "60", "--pause", "0.1", "--name", "cancelled")
    until(lambda: drawn(home) > 3)
    first.terminate()
    _, err = first.communicate(timeout=200)
    assert first.returncode == 128 + signal.SIGTERM and "stopping job" in err
    assert info(head, submission(config))["status"] == "STOPPED"
    before = drawn(home)
    assert run_step(draw, config, {}).result.started_at == before
    assert info(head, submission(config, 2))["status"] == "SUCCEEDED"


def test_a_killed_job_is_a_system_fault_and_the_next_attempt_goes_on(head: RayHead) -> None:
    config = DrawConfig(count=8, name="dies", stop_at=4)
    with pytest.raises(SystemFault, match=r"draw_dies: job .* ended without a word of its own: .* run again to go on"):
        run_step(draw, config, {})
    assert run_step(draw, config.model_copy(update={"stop_at": -1}), {}).result.started_at == 4


def test_a_lost_node_is_a_system_fault_and_the_next_attempt_goes_on(
    head: RayHead, home: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_job(monkeypatch, calls, resources={"cpus": 3, "memory_gib": 0.1})  # the head has two
    node = head.add_node(cpus=3)
    step = launch("--count", "60", "--pause", "0.1", "--name", "lost")
    until(lambda: drawn(home) > 3)
    os.killpg(node.pid, signal.SIGKILL)
    node.wait()
    _, err = step.communicate(timeout=120)
    assert step.returncode == SystemFault.exit_code, err
    assert "ended without a word of its own" in err.splitlines()[-1]
    until(lambda: not job_processes("lost"))
    before = drawn(home)
    set_job(monkeypatch, calls)
    assert run_step(draw, DrawConfig(count=60, pause=0.1, name="lost"), {}).result.started_at == before


def test_lingflow_job_returns_the_exit_code_of_the_job(head: RayHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LING_FLOW_RUN_ON", "process")
    numbers = draw(DrawConfig(count=2)).refs["numbers"]
    given = ["toy.average:average", "--input", f"numbers={numbers}", "--set", "power=2", "--json"]
    running = {fail: launch_job(*given, "--set", f"fail={fail}") for fail in ("user", "system", "defect")}
    ended = {fail: (*process.communicate(timeout=120), process.returncode) for fail, process in running.items()}
    assert {fail: code for fail, (_, _, code) in ended.items()} == {"user": 2, "system": 3, "defect": 1}
    assert ended["user"][1].splitlines()[-1] == "error: power: give a smaller one"
    assert ended["system"][1].splitlines()[-1] == "error: the server is away"
    assert "Traceback (most recent call last)" in ended["defect"][1]
    assert ended["defect"][1].splitlines()[-1] == "error: ZeroDivisionError: a bug of ours"


def test_lingflow_job_leaves_a_job_running_attaches_and_stops_it(head: RayHead, home: Path, calls: Path) -> None:
    given = ["toy.draw:draw", "--set", "count=3000", "--set", "pause=0.1", "--json"]
    left = launch_job(*given, "--no-wait")
    out, err = left.communicate(timeout=200)
    assert left.returncode == 0, err
    name = json.loads(out)["submission_id"]
    attached = launch_job(*given)
    assert attached.stderr is not None
    assert any(f"attaching to job {name}" in line for line in attached.stderr)
    until(lambda: drawn(home))
    attached.send_signal(signal.SIGINT)
    _, err = attached.communicate(timeout=200)
    assert attached.returncode == 130 and "stopping job" in err
    assert info(head, name)["status"] == "STOPPED"
    assert calls.read_text() == "draw\n"


def test_a_job_that_stands_still_is_stopped(head: RayHead, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_job(monkeypatch, calls, heartbeat_s=4)
    config = DrawConfig(pause=1000, name="stuck")
    with pytest.raises(SystemFault, match=r"said nothing for . s and was stopped"):
        run_step(draw, config, {})
    assert info(head, submission(config))["status"] == "STOPPED"


class KubeRay(threading.Thread):
    """Plays the operator in HTTPMode: submits a RayJob's command to the head and copies the job's state."""

    def __init__(self, api: KubernetesStandIn, head: RayHead, manifest: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._api, self._head, self._manifest = api, head, manifest

    def run(self) -> None:
        name, spec = self._manifest["metadata"]["name"], self._manifest["spec"]
        self._api.set_status(name, jobDeploymentStatus="Initializing")
        client = connect(self._head.address)
        environment = yaml.safe_load(spec["runtimeEnvYAML"])
        client.submit_job(entrypoint=spec["entrypoint"], submission_id=spec["jobId"], runtime_env=environment)
        dashboard, state = self._head.address.removeprefix("http://"), ""
        while state not in TERMINAL and self._api.path(name) in self._api.objects:
            state = client.get_job_status(name).value
            status = {"jobStatus": state, "dashboardURL": dashboard, "jobDeploymentStatus": "Running"}
            if state in TERMINAL:
                status["jobDeploymentStatus"] = "Complete" if state == "SUCCEEDED" else "Failed"
                status["reason"] = "" if state == "SUCCEEDED" else "AppFailed"
            if self._api.path(name) in self._api.objects:
                self._api.set_status(name, **status)
            time.sleep(0.2)


@pytest.fixture
def kubernetes(
    head: RayHead, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KubernetesStandIn]:
    """A stand-in for Kubernetes whose RayJobs run on the real head."""
    api = KubernetesStandIn()
    api.on_create = lambda manifest: KubeRay(api, head, manifest).start()
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.setenv("LING_FLOW_RUN_ON", "rayjob")
    set_job(monkeypatch, calls, cluster={"volumes": [{"claim": "shared", "path": "/"}]})
    yield api
    api.close()


def test_the_command_of_a_rayjob_makes_the_artifact_and_its_log_is_followed(
    kubernetes: KubernetesStandIn, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "events"
    monkeypatch.setenv("LING_FLOW_EVENTS", str(events))
    assert not run_step(draw, DrawConfig(count=8, pause=0.1), {}).cached
    assert calls.read_text() == "draw\n"
    told = [json.loads(line) for line in events.read_text().splitlines()]
    assert any(event["event"] == "progress" and event["done"] == 8 for event in told)


def test_sigterm_lets_a_rayjob_save_and_deletes_it(
    kubernetes: KubernetesStandIn, head: RayHead, home: Path, calls: Path
) -> None:
    config = DrawConfig(count=600, pause=0.1, name="deleted")
    step = launch("--count", "600", "--pause", "0.1", "--name", "deleted")
    until(lambda: drawn(home) > 3)
    step.terminate()
    _, err = step.communicate(timeout=200)
    assert step.returncode == 128 + signal.SIGTERM and "stopping RayJob default/" in err
    assert info(head, submission(config))["status"] == "STOPPED"
    assert kubernetes.objects == {}


def test_deploy_has_a_rayservice_serve_the_champion(
    head: RayHead, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What KubeRay would ask of the head for the RayService of our manifests, a real Ray Serve is asked here."""
    registered = registration(home, monkeypatch)
    manifest = next(
        document
        for document in yaml.safe_load_all((REPOSITORY / "infra/kubernetes/base/ray-service.yaml").read_text())
        if document["kind"] == "RayService"
    )
    api, port = KubernetesStandIn(), free_port()
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.setattr(rayservice, "service_url", lambda namespace, name: f"http://127.0.0.1:{port}")
    monkeypatch.setattr(rayservice, "POLL_SECONDS", 0.2)
    path = api.path("chat", plural="rayservices")
    api.put({**manifest, "metadata": {"name": "chat"}}, path)

    def serve(changed: dict[str, Any]) -> None:
        config = yaml.safe_load(changed["spec"]["serveConfigV2"])
        environment = {name: os.environ[name] for name in ("LING_FLOW_HOME", "MLFLOW_TRACKING_URI", "PYTHONPATH")}
        config["applications"][0]["runtime_env"] = {"env_vars": environment}
        config["http_options"] = {"host": "127.0.0.1", "port": port}
        body = json.dumps(config).encode()
        request = urllib.request.Request(
            f"{head.address}/api/serve/applications/", body, {"Content-Type": "application/json"}, method="PUT"
        )
        urllib.request.urlopen(request, timeout=60).close()
        changed["status"] = {"conditions": [{"type": "Ready", "status": "True"}]}

    api.on_replace = serve
    result = deploy({"rayservice": "chat"}, registration=registered).result
    assert (result.model_name, result.model_version) == ("ling-tiny", 1)
    assert result.url == f"http://127.0.0.1:{port}" and result.completion
    delete = urllib.request.Request(f"{head.address}/api/serve/applications/", method="DELETE")
    urllib.request.urlopen(delete, timeout=60).close()
    api.close()


def registration(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model with random weights that is the champion."""
    monkeypatch.setenv("LING_FLOW_RUN_ON", "process")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
    model = train({"seed": 0}).refs["model"]
    metrics = measure({"well_formed": 0.9}, model=model).refs["metrics"]
    config = {"gates": [{"metric": "well_formed", "threshold": 0.5}]}
    return register(config, model=model, metrics=metrics).refs["registration"]


def test_a_dead_head_is_told_and_the_next_try_goes_on_when_it_is_back(head: RayHead, home: Path) -> None:
    arguments = ["--count", "60", "--pause", "0.1", "--name", "orphan"]
    first = launch(*arguments)
    until(lambda: drawn(home) > 3)
    head.kill()
    _, err = first.communicate(timeout=200)
    assert first.returncode == SystemFault.exit_code
    assert "no answer for" in err.splitlines()[-1] and err.splitlines()[-1].endswith("run again to go on")
    until(lambda: not job_processes("orphan"))
    before = drawn(home)
    head.start()
    out, err = launch(*arguments, "--json").communicate(timeout=120)
    assert json.loads(out.splitlines()[-1])["result"]["started_at"] == before, err


def job_processes(name: str) -> list[str]:
    """Command lines of jobs whose config has that name; a launcher's has no --config-json."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f'"name":"{name}"' in line and "--config-json" in line:
            found.append(line)
    return found


def test_an_address_that_is_no_job_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LING_FLOW_RUN_ON", "ray-job")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(SystemFault, match=r"RAY_ADDRESS: no Ray job server answers as it should at http://127.0.0.1:1"):
        run_step(draw, DrawConfig(), {})
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(UserError, match="RAY_ADDRESS: must be the URL of a Ray job server, like http://HOST:8265"):
        run_step(draw, DrawConfig(), {})
