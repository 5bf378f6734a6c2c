"""The stack's real servers: PostgreSQL, S3 and MLflow, started, killed and used with right and wrong credentials."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from ling_flow.daemon import Daemon
from ling_flow.errors import SystemFault, UserError
from ling_flow.flow import mlflow_store, preflight
from ling_flow.flow import stack as stack_module
from ling_flow.flow.artifact import ArtifactStore
from ling_flow.flow.context import Context
from ling_flow.flow.promotion import Registry
from ling_flow.flow.stack import Stack
from ling_flow.flow.tracking import open_tracker
from ling_flow.ports import port_is_free
from tests.conftest import Called
from tests.flow.registering import promote_at_once
from tests.own_stack import own_stack

Call = Callable[..., Called]


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(UserError, match="PostgreSQL: not found on this machine; apt-get install postgresql"):
        stack_module._programs()
    monkeypatch.setattr(shutil, "which", lambda name, **_: "/bin/true" if name == "postgres" else None)
    with pytest.raises(UserError, match=r"weed \(SeaweedFS\): not found .*'\.\[stack\]'"):
        stack_module._programs()


def test_before_the_first_start_there_is_nothing(tmp_path: Path) -> None:
    empty = Stack(tmp_path / "stack")
    assert (empty.status(), empty.down()) == ([], [])
    with pytest.raises(UserError, match="no stack was started there; run lingflow stack up"):
        empty.environment()
    assert not list(tmp_path.iterdir())


def test_its_files_are_checked_and_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Stack(tmp_path)
    ports = {"postgres": 154000, "mlflow": 2, "s3": 3, "s3_inner": [4, 5, 6, 7, 8, 9, 10]}
    (tmp_path / "stack.json").write_text(json.dumps({"wanted_up": True, "ports": ports}))
    with pytest.raises(UserError, match=r"stack\.json\.ports\.postgres: input should be less than or equal to 65535"):
        made.status()
    (tmp_path / "stack.json").write_text(json.dumps({"wanted_up": True, "ports": {**ports, "postgres": 1}}))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemFault, match="No space left on device"):
        made.status()  # which would make the secrets
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stack.json"]


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with own_stack() as made:
        yield made


@pytest.fixture
def user(stack: Stack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Context:
    """A user of the stack, all of it running: the environment that `stack env` gives, and a home of his own."""
    stack.up()
    for name in list(os.environ):
        if name.startswith(("LING_FLOW_", "MLFLOW_", "AWS_")):
            monkeypatch.delenv(name)
    for name, value in {**stack.environment(), "LING_FLOW_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("ling_flow.flow.outbox.RETRY_SECONDS", (0.2, 0.5))
    S3FileSystem.clear_instance_cache()  # it would keep the keys of another test
    return Context.from_environment()


def kill(daemon: Daemon) -> None:
    assert daemon.pid is not None
    os.kill(daemon.pid, signal.SIGKILL)
    wait_until(lambda: not daemon.running())


@pytest.mark.slow
class TestServers:
    def test_all_answer_and_nothing_is_open_to_others(self, stack: Stack) -> None:
        assert {server.name: server.state for server in stack.status()} == dict.fromkeys(
            ("postgres", "s3", "mlflow"), "healthy"
        )
        secrets = json.loads((stack.directory / "secrets.json").read_text())
        texts = [value for value in secrets.values() if isinstance(value, str)]
        texts += [value["secret"] for value in secrets.values() if isinstance(value, dict)]
        for path in stack.directory.iterdir():
            if path.is_file() and any(text in path.read_text(errors="replace") for text in texts):
                assert path.name in ("env", "secrets.json", "s3.json")
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                assert not any(text.encode() in entry.read_bytes() for text in texts)
            except OSError:
                continue

    def test_a_crash_is_seen_and_mended_and_data_is_kept(self, stack: Stack, user: Context, call: Call) -> None:
        client = mlflow_store.connect(str(user.tracking_uri))
        client.create_experiment("kept")
        home = str(stack.directory.parent)
        kill(stack.mlflow)
        kill(stack.postgres)
        seen = call("--home", home, "stack", "status", "--json")
        assert seen.code == 3
        assert {server["name"]: server["state"] for server in seen.json["servers"]} == {
            "postgres": "crashed",
            "s3": "healthy",
            "mlflow": "crashed",
        }
        s3_pid = stack.s3.pid
        assert call("--home", home, "stack", "up", timeout=300).code == 0
        assert stack.s3.pid == s3_pid, "what runs is left alone"
        assert client.get_experiment_by_name("kept") is not None

        assert call("--home", home, "stack", "down", "--json").json == {"stopped": ["mlflow", "s3", "postgres"]}
        assert {server.state for server in stack.status()} == {"stopped"}
        record = json.loads((stack.directory / "stack.json").read_text())
        assert all(port_is_free(record["ports"][name]) for name in ("postgres", "mlflow", "s3"))
        assert os.environ["AWS_ACCESS_KEY_ID"] == stack.environment()["AWS_ACCESS_KEY_ID"]
        stack.up()
        assert client.get_experiment_by_name("kept") is not None
        # SeaweedFS would take a key of its environment for an administrator's.
        with pytest.raises(PermissionError):
            S3FileSystem().ls("mlflow", refresh=True)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"MLFLOW_TRACKING_PASSWORD": "wrong"}, r"MLFLOW_TRACKING_URI .*: refuses the credentials; set MLFLOW_"),
            ({"AWS_SECRET_ACCESS_KEY": "wrong"}, r"artifact root .*: refused .*; check AWS_ACCESS_KEY_ID"),
            ({"AWS_ACCESS_KEY_ID": "WRONG"}, r"artifact root .*: refused .*; check AWS_ACCESS_KEY_ID"),
            ({"LING_FLOW_ARTIFACTS": "s3://mlflow/mine"}, r"artifact root s3://mlflow/mine: refused"),
        ],
    )
    def test_wrong_credentials_are_one_clear_error(
        self, user: Context, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str
    ) -> None:
        for name, value in change.items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        with pytest.raises(UserError, match=message):
            preflight.check_access(Context.from_environment(), write=False)

    def test_an_unknown_bucket_is_named(
        self, stack: Stack, user: Context, monkeypatch: pytest.MonkeyPatch, call: Call
    ) -> None:
        key = json.loads((stack.directory / "secrets.json").read_text())["s3_admin"]  # who may see all buckets
        changes = {"AWS_ACCESS_KEY_ID": key["id"], "AWS_SECRET_ACCESS_KEY": key["secret"]}
        done = call("plan", **{**stack.environment(), **changes, "LING_FLOW_ARTIFACTS": "s3://nowhere/artifacts"})
        assert done.code == 2
        assert done.err.strip().endswith(
            "error: artifact root s3://nowhere/artifacts: there is no bucket nowhere; make it, or name another"
        )

    def test_a_tracking_store_that_is_away_does_not_stop_a_plan(self, user: Context) -> None:
        away = preflight.check_access(
            Context(home=user.home, artifacts=user.artifacts, tracking_uri="http://127.0.0.1:9"), write=True
        )
        assert away == [
            "tracking store http://127.0.0.1:9 does not answer: what a run tells it is kept, and sent when it is back"
        ]
        remote = ArtifactStore(user.artifacts, user.home).remote
        assert not any("probe" in name for name in remote.find(user.artifacts))

    def test_processes_that_promote_at_once_agree(self, user: Context) -> None:
        promote_at_once(Registry(str(user.tracking_uri)), "many")

    @pytest.mark.parametrize("victims", [("postgres",), ("mlflow",), ("s3",)])
    def test_a_run_outlives_a_restart_and_nothing_is_lost(
        self, stack: Stack, user: Context, tmp_path: Path, victims: tuple[str, ...]
    ) -> None:
        """One server is killed and gone for some seconds while a step tells its metrics and keeps a file."""
        label = f"without_{victims[0]}"
        tracker = open_tracker(user)
        tracker.start_step(label, "pretrain", label, {"tokens": 5}, {})
        wait_until(lambda: tracker.run_id is not None)
        plot = tmp_path / "loss.txt"
        plot.write_text("a plot")
        for name in victims:
            kill(getattr(stack, name))
        for step in range(200):
            tracker.metrics({"loss": 1.0 / (step + 1)}, step)
        tracker.artifact(plot)
        back = threading.Timer(5, stack.up)
        back.start()
        tracker.finish({"validation_loss": 0.5}, "finished")
        back.join()

        client = mlflow_store.connect(str(user.tracking_uri))
        run = client.get_run(str(tracker.run_id))
        assert run.info.status == "FINISHED"
        assert run.data.metrics["validation_loss"] == 0.5
        assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == list(range(200))
        assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"config.json", "loss.txt"}
