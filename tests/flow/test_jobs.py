"""A step as a job, without a cluster: its name, its command, what reaches it, and how its output is taken."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy.average import average
from toy.draw import DrawConfig, draw

from ling_flow.errors import RemoteDefect, SystemFault, UserError
from ling_flow.flow import ray_jobs
from ling_flow.flow.component import Resources
from ling_flow.flow.context import Context
from ling_flow.flow.job_settings import JobSettings
from ling_flow.flow.jobs import Ended, Job, JobOutput, failure, job_of
from ling_flow.flow.step import identify, run_step
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("home")


def job(config: DrawConfig | None = None, root: str = "/somewhere", settings: JobSettings | None = None) -> Job:
    context = Context.from_environment()
    step = identify(draw, config or DrawConfig(), {}, root, context)
    return job_of(step, context, settings or JobSettings(), rebuild=False)


def test_a_job_knows_the_number_in_its_label(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "LING_FLOW_LABELS" not in job().environment
    monkeypatch.setenv("LING_FLOW_LABELS", json.dumps({job().fingerprint: "draw_series-2", "other": "draw_series-3"}))
    assert job().label == "draw_series-2"
    assert job().environment["LING_FLOW_LABELS"] == json.dumps({job().fingerprint: "draw_series-2"})


def test_the_name_says_which_artifact_where_and_fits_kubernetes() -> None:
    assert job().name(1) == job().name(1)
    assert job(root="/elsewhere").name(1) != job().name(1)
    assert job(DrawConfig(count=11)).name(1) != job().name(1)
    assert job(DrawConfig(pause=1)).name(1) == job().name(1)
    assert job().name(2) == f"{job().name(1)}-2"
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job().name(99)) and len(job().name(99)) <= 47


def test_the_command_makes_the_artifact_whatever_the_config_holds(tmp_path: Path) -> None:
    config = DrawConfig(count=2, name='it\'s "$HOME" `x`\n')
    command = job(config, root=str(tmp_path / "a root")).entrypoint("it", sys.executable)
    done = subprocess.run(["sh", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [event["event"] for event in events][-1] == "done"
    assert identify(draw, config, {}, tmp_path / "a root", Context.from_environment()).find() is not None


def test_an_address_at_the_loopback_may_be_a_forwarded_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our interpreter where the head has it, the image's `python` where it has not."""
    sent: dict[str, Any] = {}
    client = SimpleNamespace(get_address=lambda: "http://127.0.0.1:8265", submit_job=lambda **given: sent.update(given))
    for there, expected in ((sys.executable, sys.executable), ("/nowhere/python", "python")):
        monkeypatch.setattr(sys, "executable", there)
        ray_jobs._send(client, "it", job(), JobSettings())
        word = re.search(r'"\$\(command -v .*?\)"', sent["entrypoint"])
        assert word is not None
        done = subprocess.run(["sh", "-c", f"echo {word[0]}"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    "said",
    [
        "Request failed with status code 400: entrypoint_num_cpus must be a number.",
        "Request failed with status code 500: Package size (600.00MiB) exceeds the maximum size of 500.00MiB.",
    ],
)
def test_what_the_server_refuses_is_told_at_once(said: str) -> None:
    """The server's own words; a real one would first be sent half a gigabyte."""

    def refuse(**_: Any) -> None:
        raise RuntimeError(said)

    def missing(name: str) -> None:
        raise RuntimeError(f"Request failed with status code 404: Job {name} does not exist")

    client = SimpleNamespace(get_address=lambda: "http://head:8265", submit_job=refuse, get_job_info=missing)
    with pytest.raises(UserError, match=r"^RAY_ADDRESS: http://head:8265 refuses the job \(Request failed"):
        ray_jobs.submit(client, job(), JobSettings(patience_s=60))


def test_secrets_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, "topsecret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3:8333")
    sent = job(settings=JobSettings(env={"MINE": "1"}))
    words = shlex.split(sent.entrypoint("it"))
    assert {"MLFLOW_TRACKING_URI=http://mlflow:5000", "AWS_ENDPOINT_URL=http://s3:8333", "MINE=1"} <= set(words)
    assert "LING_FLOW_RUN_ON=process" in words
    assert "topsecret" not in repr(sent) + str(sent.notes)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:topsecret@mlflow:5000")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI: holds a password") as error:
        job()
    assert "topsecret" not in str(error.value)


def test_what_a_job_reserves() -> None:
    assert job().reserved == Resources(cpus=1, memory_gib=0.5)
    assert job(settings=JobSettings(resources=Resources(gpus=8))).reserved == Resources(gpus=8)


def test_heavy_components_may_become_jobs() -> None:
    from components.plan import PlanConfig, resolve_lifecycle
    from components.prepare_data import prepare_data
    from components.pretrain import pretrain
    from components.wind_tunnel import wind_tunnel

    lifecycle = resolve_lifecycle(PlanConfig())
    stage = lifecycle.pretrain_short
    assert pretrain.runs_on_of(stage) == "job"
    # Ray Train's workers need what the job would hold on to.
    assert pretrain.runs_on_of(stage.model_copy(update={"run_on": "ray"})) == "ray"
    assert wind_tunnel.runs_on_of(lifecycle.wind_tunnel) == "ray"
    assert prepare_data.runs_on_of(lifecycle.prepare_data) == "process"


def test_output_in_pieces(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LING_FLOW_EVENTS", str(tmp_path / "events"))
    output = JobOutput("draw")
    text = (
        "Running entrypoint for job x: exec env …\n"
        '{"event": "start", "time": 1.0, "step": "draw", "component": "draw", "fingerprint": "f"}\n'
        '{"event": "progress", "time": 2.0, "step": "draw", "done": 1, "total": 1, "text": "", "metrics": {}}\n'
        "a warning\n"
        '{"event": "half\n'
        '{"event": "error", "time": 3.0, "step": "draw", "kind": "defect", "message": "K: 1",'
        ' "traceback": "T\\nK: 1\\n"}\n'
        "T\nK: 1\nerror: K: 1\nthe end"
    )
    for start in range(0, len(text), 7):
        output.feed(text[start : start + 7])
    output.close()
    assert capsys.readouterr().err == 'a warning\n{"event": "half\nthe end\n'
    (told,) = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert (told["event"], told["step"], told["done"]) == ("progress", "draw", 1)
    error = failure(Ended("x", "FAILED"), output)
    assert isinstance(error, RemoteDefect) and (str(error), error.traceback) == ("K: 1", "T\nK: 1\n")


@pytest.mark.parametrize(
    ("ended", "kind", "text"),
    [
        (Ended("x", "STOPPED"), SystemFault, "job x was stopped by someone"),
        (Ended("x", "FAILED", "killed", -9), SystemFault, "without a word of its own: killed; run again"),
        (Ended("x", "FAILED", "the node is lost"), SystemFault, "the node is lost; run again"),
        (Ended("x", "FAILED", "No module named components", 1), UserError, "is this package in the job's image"),
    ],
)
def test_a_job_that_does_not_say_why(ended: Ended, kind: type[Exception], text: str) -> None:
    error = failure(ended, JobOutput("draw"))
    assert isinstance(error, kind) and text in str(error)


def test_wrong_settings_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LING_FLOW_RUN_ON", "ray")
    with pytest.raises(UserError, match="LING_FLOW_RUN_ON: must be one of process, ray-job, rayjob, got 'ray'"):
        run_step(draw, DrawConfig(), {})
    monkeypatch.setenv("LING_FLOW_RUN_ON", "ray-job")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"RAY_ADDRESS: must be the URL of a Ray job server.*it is not set"):
        run_step(draw, DrawConfig(), {})
    monkeypatch.setenv("LING_FLOW_JOB", '{"workingdir": "."}')
    with pytest.raises(UserError, match=r"LING_FLOW_JOB.workingdir: unknown field; did you mean 'working_dir'"):
        run_step(draw, DrawConfig(), {})


def test_an_upload_leaves_out_what_we_write_and_no_folder_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LING_FLOW_HOME", str(tmp_path / "work" / "home"))
    always = [".git", ".venv", ".lingflow", "/work/home"]
    assert ray_jobs.excluded(tmp_path, "s3://bucket/artifacts") == always
    assert ray_jobs.excluded(tmp_path, str(tmp_path / "artifacts")) == [*always, "/artifacts"]
    assert ray_jobs.excluded(tmp_path / "code", str(tmp_path)) == always[:3]


def test_a_light_component_stays_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = draw(DrawConfig(count=1)).refs["numbers"]
    monkeypatch.setenv("LING_FLOW_RUN_ON", "ray-job")  # and nowhere to run it
    assert not average({"power": 1}, numbers=numbers).cached
    assert draw(DrawConfig(count=1)).cached
