"""DAGs compiled for a cluster, and submitted to a stand-in of the server (see kfp_server.py)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from kfp_server import KfpServer, check_package

from ling_flow.cli import cli
from ling_flow.errors import LingFlowError, SystemFault, UserError
from ling_flow.flow import exit_task, kubeflow, kubeflow_tasks
from ling_flow.flow import profile as profiles
from ling_flow.flow.dag import compile_to, load_dag
from ling_flow.flow.profile import read_profile

Call = Callable[..., Any]
DAG = str(Path(__file__).parent / "toy" / "faulty.py")
PROFILE = {
    "image": "registry.example.com/ling-flow@sha256:00",
    "artifacts": "s3://bucket/artifacts",
    "mlflow": "http://mlflow.example.com",
    "kfp": {"service_account": "runner", "experiment": "tests", "ttl_s": 3600},
    "steps": {
        "secrets": [{"env": "AWS_SECRET_ACCESS_KEY", "secret": "s3", "key": "secret-key"}],
        "node_selector": {"pool": "cpu"},
        "tolerations": [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}],
        "shared_memory_gib": 2,
    },
    "volumes": [{"claim": "data", "path": "/data"}],
}


@pytest.fixture(autouse=True, scope="module")
def shallow_stacks() -> Iterator[None]:
    """KFP reads the source around all callers for each setting of a task; under pytest that takes most of the time."""
    from kfp.dsl import pipeline_task

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_task, "inspect", SimpleNamespace(stack=lambda: inspect.stack(context=0)))
        yield


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    monkeypatch.setattr(kubeflow, "POLL_SECONDS", 0.01)
    for name in ("KFP_HOST", "KFP_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    made = KfpServer()
    yield made
    made.close()


@pytest.fixture
def lingflow(home: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`lingflow(...)` in this process: the errors come out as they are, else (standard output, standard error)."""

    def call(*arguments: str) -> tuple[str, str]:
        done = CliRunner().invoke(cli, ["--home", str(home), *arguments], standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        return done.stdout, done.stderr

    return call


def profile(directory: Path, **changes: Any) -> str:
    path = directory / "profile.yaml"
    path.write_text(yaml.safe_dump({**PROFILE, **changes}))
    return str(path)


def compiled(lingflow: Call, directory: Path, dag: str = DAG, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    target = directory / "dag.yaml"
    lingflow("compile", dag, "--profile", profile(directory, **changes), "-o", str(target))
    ir, platform = check_package(target.read_text())
    return ir, platform["platforms"]["kubernetes"]


@pytest.fixture(scope="module")
def lifecycle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The lifecycle compiled for each profile of the project."""
    directory, loaded = tmp_path_factory.mktemp("ir"), load_dag("lifecycle")
    made = {name: directory / f"{name}.yaml" for name in ("local", "gpu")}
    for name, path in made.items():
        compile_to(loaded, path, read_profile(name), name)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "gpu"])
def test_the_lifecycle_compiles_for_each_profile(lifecycle: dict[str, Path], name: str) -> None:
    ir, platform = check_package(lifecycle[name].read_text())
    assert set(ir["root"]["dag"]["tasks"]) == {"close-run", "exit-handler-1"}
    assert len(ir["components"]["comp-exit-handler-1"]["dag"]["tasks"]) == 13
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(placed) == set(ir["deploymentSpec"]["executors"])


def test_what_a_step_gets(lingflow: Call, tmp_path: Path) -> None:
    changes = {"components": {"draw": {"resources": {"cpus": 4, "memory_gib": 8, "gpus": 2}, "timeout_s": 60}}}
    ir, platform = compiled(lingflow, tmp_path, **changes)
    container = ir["deploymentSpec"]["executors"]["exec-draw"]["container"]
    assert container["image"] == PROFILE["image"]
    resources = container["resources"]
    assert resources["resourceCpuLimit"] == resources["resourceCpuRequest"] == "4000m"
    assert resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"] == "8192Mi"
    assert resources["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert resources["accelerator"]["resourceCount"] == "2"
    environment = {given["name"]: given["value"] for given in container["env"]}
    assert environment["LING_FLOW_ARTIFACTS"] == "s3://bucket/artifacts"
    assert environment["MLFLOW_TRACKING_URI"] == "http://mlflow.example.com"
    assert environment["LING_FLOW_RUN_ON"] == "process"
    step = platform["deploymentSpec"]["executors"]["exec-draw"]
    (secret,) = step["secretAsEnv"]
    assert secret["secretName"] == "s3"
    assert secret["keyToEnv"] == [{"secretKey": "secret-key", "envVar": "AWS_SECRET_ACCESS_KEY"}]
    assert step["nodeSelector"] == {"labels": {"pool": "cpu"}}
    assert step["tolerations"] == [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}]
    assert {mount["mountPath"]: mount.get("medium") for mount in step["emptyDirMounts"]} == {
        "/dev/shm": "Memory", "/scratch": None,
    }  # fmt: skip
    assert step["pvcMount"][0]["mountPath"] == "/data"
    assert step["activeDeadlineSeconds"] == "60"
    assert step["securityContext"] == {"runAsUser": "1000", "runAsNonRoot": True}
    paths = {given["name"]: given["fieldPath"] for given in step["fieldPathAsEnv"]}
    assert paths["LING_FLOW_KFP_RUN_ID"] == "metadata.labels['pipeline/runid']"
    assert platform["pipelineConfig"] == {"resourceTtlOnCompletion": 3600}


def test_retries_have_room_for_long_steps_and_the_exit_task_has_none(lingflow: Call, tmp_path: Path) -> None:
    """Argo counts the limit from the beginning of the first try: KFP's default of an hour would forbid retries."""
    steps = {"retries": {"count": 2, "wait_s": 30, "factor": 2}, "timeout_s": 100_000}
    ir, _ = compiled(lingflow, tmp_path, steps=steps)
    tasks = ir["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert tasks["draw"]["retryPolicy"] == {
        "backoffDuration": "30s", "backoffFactor": 2.0, "backoffMaxDuration": "300090s", "maxRetryCount": 2,
    }  # fmt: skip
    exit_task = ir["root"]["dag"]["tasks"]["close-run"]
    assert "retryPolicy" not in exit_task
    assert exit_task["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert not any(task.get("cachingOptions") for task in (*tasks.values(), exit_task))


@pytest.mark.slow
def test_heavy_steps_become_ray_jobs_in_small_pods(lifecycle: dict[str, Path]) -> None:
    ir, platform = check_package(lifecycle["gpu"].read_text())
    containers = {name: one["container"] for name, one in ir["deploymentSpec"]["executors"].items()}

    def variables(name: str) -> dict[str, str]:
        return {given["name"]: given["value"] for given in containers[name]["env"]}

    assert variables("exec-pretrain")["LING_FLOW_RUN_ON"] == "rayjob"
    assert containers["exec-pretrain"]["resources"]["resourceCpuLimit"] == "500m"
    assert "accelerator" not in containers["exec-pretrain"]["resources"]
    job = json.loads(variables("exec-pretrain")["LING_FLOW_JOB"])
    assert job["resources"] == {"cpus": 96, "memory_gib": 960, "gpus": 8}
    assert job["cluster"]["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert job["cluster"]["service_account"] == "ling-flow-ray"
    assert "nodeSelector" not in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-pretrain"]
    assert variables("exec-register")["LING_FLOW_RUN_ON"] == "process"  # never heavy
    assert "LING_FLOW_JOB" not in variables("exec-register")


def test_without_tracking_there_is_nothing_to_close(lingflow: Call, tmp_path: Path) -> None:
    ir, _ = compiled(lingflow, tmp_path, mlflow=None)
    assert set(ir["root"]["dag"]["tasks"]) == {"average", "draw"}


def test_compiling_twice_gives_the_same_file(lingflow: Call, tmp_path: Path) -> None:
    chosen = profile(tmp_path)
    for name in ("a.yaml", "b.yaml"):
        lingflow("compile", DAG, "--profile", chosen, "-o", str(tmp_path / name))
    assert (tmp_path / "a.yaml").read_bytes() == (tmp_path / "b.yaml").read_bytes()


def test_submit_uploads_once_and_starts_runs(lingflow: Call, server: KfpServer, tmp_path: Path) -> None:
    arguments = ["submit", DAG, "--profile", profile(tmp_path), "--host", server.url, "--json"]
    first = json.loads(lingflow(*arguments, "--run-name", "one")[0])
    second = json.loads(lingflow(*arguments, "--run-name", "two")[0])
    assert (first["run_id"], second["run_id"]) == ("run-1", "run-2")
    assert first["link"] == f"{server.url}/#/runs/details/run-1"
    assert len(server.pipelines) == len(server.versions) == len(server.experiments) == 1
    (version,) = server.versions.values()
    assert version["display_name"] == first["version"]
    run = server.runs["run-1"]
    assert run["service_account"] == "runner"
    assert run["pipeline_version_reference"] == {"pipeline_id": "pipeline-1", "pipeline_version_id": "version-1"}
    lingflow("submit", DAG, "--profile", profile(tmp_path, mlflow=None), "--host", server.url)
    assert len(server.versions) == 2 and len(server.pipelines) == 1


@pytest.mark.slow
def test_parameters_reach_the_run(lingflow: Call, server: KfpServer) -> None:
    override = "pretrain_short.tokens=200000"
    lingflow("submit", "lifecycle", "--profile", "local", "--host", server.url, "--seed", "3", "--set", override)
    (run,) = server.runs.values()
    assert run["runtime_config"]["parameters"] == {
        "preset": "tiny", "seed": 3, "overrides": '{"pretrain_short": {"tokens": 200000}}',
    }  # fmt: skip


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        (["PENDING", "RUNNING", "SUCCEEDED"], 0, ""),
        (["RUNNING", "FAILED"], 1, "failed: step average failed"),
        (["RUNNING", "CANCELING", "CANCELED"], 130, "was canceled"),
    ],
)
def test_wait_follows_to_the_end(
    lingflow: Call, server: KfpServer, tmp_path: Path, script: list[str], code: int, said: str
) -> None:
    server.script, server.error = script, "step average failed"
    server.tasks = [
        {"task_id": "1", "display_name": "draw-driver", "state": "SUCCEEDED"},
        {"task_id": "2", "display_name": "draw", "state": "RUNNING"},
    ]
    arguments = ["submit", DAG, "--profile", profile(tmp_path), "--host", server.url, "--run-name", "one", "--wait"]
    if code == 0:
        _, err = lingflow(*arguments)
        assert "run one pending\n" in err and "draw running\n" in err and "run one succeeded\n" in err
        assert "driver" not in err
    else:
        with pytest.raises(LingFlowError, match=said) as failure:
            lingflow(*arguments)
        assert failure.value.exit_code == code


def test_waiting_outlasts_a_server_that_is_away(lingflow: Call, server: KfpServer, tmp_path: Path) -> None:
    server.script = ["RUNNING", "SUCCEEDED"]
    made = kubeflow.Kubeflow(server.url)
    lingflow("submit", DAG, "--profile", profile(tmp_path), "--host", server.url)
    server.faults = [503, 502, 500]
    assert made.wait(_run("run-1"), lambda line: None).state == "SUCCEEDED"


def _run(key: str) -> kubeflow.Run:
    return kubeflow.Run(key, key, "PENDING", "", "")


def test_a_server_away_for_too_long(server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubeflow, "PATIENCE_SECONDS", 0.1)
    made = kubeflow.Kubeflow(server.url)
    server.close()
    with pytest.raises(SystemFault, match="does not answer"):
        made.wait(_run("run-1"), lambda line: None)


def test_a_version_that_somebody_else_uploads_meanwhile(lingflow: Call, server: KfpServer, tmp_path: Path) -> None:
    """The second looks, finds nothing, makes, and is told that it is there."""
    lingflow("submit", DAG, "--profile", profile(tmp_path), "--host", server.url)
    looked, usual = [], server._list

    def late(name: str, *given: Any) -> Any:
        if name == "experiments" and not looked:
            looked.append(name)
            return 200, {}
        return usual(name, *given)

    server._list = late  # type: ignore[method-assign]
    lingflow("submit", DAG, "--profile", profile(tmp_path), "--host", server.url)
    assert looked and len(server.experiments) == 1 and len(server.runs) == 2


def test_runs(lingflow: Call, server: KfpServer, tmp_path: Path) -> None:
    package = tmp_path / "dag.yaml"
    lingflow("compile", DAG, "-o", str(package))
    made = kubeflow.Kubeflow(server.url)
    for index in range(12):
        made.submit(package, "faulty", {}, "other" if index % 2 else "tests", f"run {index}")
    listed = json.loads(lingflow("runs", "--host", server.url, "--experiment", "other", "--json")[0])["runs"]
    assert [run["name"] for run in listed] == [f"run {index}" for index in range(11, 0, -2)]
    assert len(made.runs(None, 11)) == 11  # more than a page
    out, _ = lingflow("runs", "--host", server.url, "--limit", "1")
    assert "run 11" in out and "PENDING" in out and "/#/runs/details/run-12" in out
    with pytest.raises(UserError, match="--experiment none: there is none of that name"):
        lingflow("runs", "--host", server.url, "--experiment", "none")


def test_a_token_is_asked_for(lingflow: Call, server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "right"
    with pytest.raises(UserError, match=r"refuses \(401 .*set KFP_TOKEN"):
        lingflow("runs", "--host", server.url)
    monkeypatch.setenv("KFP_TOKEN", "right")
    assert lingflow("runs", "--host", server.url)[0] == ""


@pytest.mark.parametrize(
    ("host", "said", "kind"),
    [
        ("http://127.0.0.1:9", "does not answer", SystemFault),
        ("127.0.0.1:9", "--host: must be the URL", UserError),
        ("{url}/pipeline", "nothing at .*/pipeline speaks KFP's API", UserError),
    ],
)
def test_a_wrong_host_is_one_line(lingflow: Call, server: KfpServer, host: str, said: str, kind: type) -> None:
    with pytest.raises(kind, match=said) as error:
        lingflow("runs", "--host", host.format(url=server.url))
    assert "\n" not in str(error.value)


def test_a_login_page_is_no_api(lingflow: Call, server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "answer", lambda *_: (200, "<html>Log in</html>"))
    with pytest.raises(UserError, match="is it a login page"):
        lingflow("runs", "--host", server.url)


def test_no_server_named(lingflow: Call, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--host: no server is named"):
        lingflow("submit", DAG, "--profile", profile(tmp_path))


def test_nothing_is_sent_before_configs_are_right(lingflow: Call, server: KfpServer) -> None:
    with pytest.raises(UserError, match=r"pretrain_short\.tokens"):
        lingflow("submit", "lifecycle", "--profile", "local", "--host", server.url, "--set", "pretrain_short.tokens=-1")
    assert server.received == []


def test_values_of_secrets_are_nowhere(
    lingflow: Call, server: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    values = {name: f"s3cret-{name.lower()}" for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")}
    values["MLFLOW_TRACKING_PASSWORD"] = "s3cret-mlflow"
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    target = tmp_path / "dag.yaml"
    said = [*lingflow("compile", DAG, "--profile", "gpu", "-o", str(target))]
    said += lingflow("submit", DAG, "--profile", "gpu", "--host", server.url, "--wait", "--json")
    texts = [target.read_text(), *said, *server.received]
    texts += [path.read_text(errors="replace") for path in (*home.rglob("*"), *tmp_path.rglob("*")) if path.is_file()]
    assert "AWS_SECRET_ACCESS_KEY" in texts[0]
    assert not any("s3cret" in text for text in texts)


@pytest.mark.slow
def test_the_exit_task_closes_the_run_in_mlflow(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled pipeline with its exit handler, run for real by KFP's local executor; only Kubernetes is missing."""
    from kfp import dsl, local
    from mlflow import MlflowClient
    from toy.average import average
    from toy.draw import draw

    def closing() -> None:
        drawn = draw.kfp(config='{"count": 2}')
        average.kfp(config='{"power": 2, "fail": "user"}', numbers=drawn.outputs["numbers"])

    closing.__annotations__.clear()  # texts here, and KFP wants types
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setattr(profiles, "SCRATCH", str(home))  # a pod has a disk there
    monkeypatch.setenv("LING_FLOW_KFP_RUN_ID", "kfp-run-1")  # Kubernetes takes it from the pod's label
    once = profiles.StepSettings(retries=profiles.Retries(count=0))
    chosen = profiles.Profile(image="unused", artifacts=f"{tmp_path}/artifacts", mlflow=uri, steps=once)
    placed = kubeflow_tasks.with_profile(dsl.pipeline(name="closing")(closing), chosen, "profile")
    before = local.config.LocalExecutionConfig.instance
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"), raise_on_error=False)
    try:
        placed()
    finally:
        local.config.LocalExecutionConfig.instance = before

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("ling_flow")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.data.tags["ling_flow.kfp_run_id"] == "kfp-run-1"
    assert parent.info.status == "FAILED"
    steps = {run.info.run_name: run.info.status for run in runs if run is not parent}
    assert steps == {"draw_series": "FINISHED", "average": "FAILED"}


def test_the_exit_task_outlasts_a_store_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str, str]] = []

    def finish(*given: str) -> None:
        told.append(given)  # type: ignore[arg-type]
        if len(told) < 3:
            raise SystemFault("away")

    monkeypatch.setattr("ling_flow.flow.tracking.finish_kfp_run", finish)
    monkeypatch.setattr(exit_task, "WAIT_SECONDS", 0.01)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow")
    monkeypatch.setenv("LING_FLOW_KFP_RUN_ID", "run-1")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    exit_task.close_run("CANCELLED")
    assert told == [("http://mlflow", "run-1", "killed")] * 3
    monkeypatch.setenv("MLFLOW_RUN_ID", "adopted")  # Kubeflow's plugin closes its own
    exit_task.close_run("FAILED")
    assert len(told) == 3


def test_the_exit_task_gives_up_in_the_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def finish(*_: str) -> None:
        raise SystemFault("tracking store: away")

    monkeypatch.setattr("ling_flow.flow.tracking.finish_kfp_run", finish)
    monkeypatch.setattr(exit_task, "PATIENCE_SECONDS", 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow")
    monkeypatch.setenv("LING_FLOW_KFP_RUN_ID", "run-1")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    with pytest.raises(SystemExit) as ended:
        exit_task.close_run("FAILED")
    assert ended.value.code == SystemFault.exit_code
    assert "tracking store: away" in capsys.readouterr().err
