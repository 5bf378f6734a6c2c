"""A stage by two workers, as processes and under a real Ray Train: the same bits, whoever starts them and who dies."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from components.pretrain import pretrain
from components.ray_cluster import ray_running
from ling_flow.errors import SystemFault, UserError
from ling_flow.flow.component import Step
from ling_flow.parallel.data import DataParallel, WorkerLost
from ling_flow.training.settings import CheckpointIndex
from tests.components.pretraining import config, make_inputs
from tests.components.test_pretrain import Recorder, elsewhere
from tests.watching import found_below

pytestmark = [pytest.mark.slow]

STEPS = 120
SETTINGS = config(tokens=64 * STEPS, checkpoints_saved=20, tokens_per_forward=16, workers=2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("artifacts"), tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The checkpoints of two plain processes that nothing befalls."""
    root = tmp_path_factory.mktemp("whole")
    return pretrain(SETTINGS, root=root, **elsewhere(inputs, root)).outputs["checkpoints"]


@pytest.fixture(scope="module")
def ray_here():
    """A Ray that runs already, which the step uses and leaves running."""
    with ray_running(cpus=2):
        yield


@pytest.fixture
def lines(monkeypatch):
    """What the step logs."""
    told = []
    monkeypatch.setattr(Step, "log", lambda self, text: told.append(text))
    return told


class KillsOne(Recorder):
    """Kills the process that `victim` names as soon as it hears of a checkpoint."""

    def __init__(self, victim):
        super().__init__()
        self.victim = victim

    def metrics(self, values, step):
        super().metrics(values, step)
        if "save_seconds" in values and self.victim is not None:
            os.kill(self.victim(), signal.SIGKILL)
            self.victim = None


def descendants(pid):
    """Process id → command line of all that `pid` started, directly or not."""
    children = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, {})[int(entry.name)] = (entry / "cmdline").read_bytes().decode()
        except (OSError, ValueError):
            continue
    found, look = {}, [pid]
    while look:
        started = children.get(look.pop(), {})
        found |= started
        look += started
    return found


def pid_of(name, pid):
    """One descendant of `pid` that is called so."""
    return max(number for number, command in descendants(pid).items() if name in command)


def assert_same(one, other):
    """Index and weights of all checkpoints, and the moments of the newest."""
    index = CheckpointIndex.load(one)
    assert CheckpointIndex.load(other) == index
    files = [f"{entry.directory}/model.safetensors" for entry in index.checkpoints]
    for file in (*files, f"{index.latest}/training_state/optimizer.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def meet(rank, store):
    """Two workers, of which one leaves."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    workers, cpu = DataParallel(), torch.device("cpu")
    assert workers.agree(7, cpu)
    assert not workers.agree(7 + rank, cpu)
    if rank == 0:
        with pytest.raises(WorkerLost, match="another worker is gone"):
            workers.sum_(torch.ones(3))
    distributed.destroy_process_group()


def test_workers_notice_that_they_differ_and_that_one_is_gone(tmp_path):
    torch.multiprocessing.spawn(meet, (tmp_path / "store",), nprocs=2)


def test_ray_train_gives_the_bits_of_plain_processes(whole, inputs, ray_here, tmp_path):
    tracker, record = Recorder(), tmp_path / "record"
    settings = {**SETTINGS, "run_on": "ray", "ray_storage": f"file://{record}"}
    outcome = pretrain(settings, root=tmp_path, tracker=tracker, **elsewhere(inputs, tmp_path))
    assert_same(whole, outcome.outputs["checkpoints"])
    assert outcome.fingerprint == whole.parent.name
    assert {"loss", "validation_loss", "validation_loss/words"} <= set(tracker.seen[STEPS])
    assert list(record.iterdir()) == []  # Ray's record of the run is not needed any more


def test_ray_train_starts_the_workers_again_when_one_is_killed(whole, inputs, ray_here, lines, tmp_path):
    tracker = KillsOne(lambda: pid_of("ray::RayTrainWorker", os.getpid()))
    outcome = pretrain({**SETTINGS, "run_on": "ray"}, root=tmp_path, tracker=tracker, **elsewhere(inputs, tmp_path))
    assert any(line.startswith("resumed at step ") for line in lines)
    assert_same(whole, outcome.outputs["checkpoints"])


def test_an_error_of_the_user_ends_ray_train_at_once(inputs, ray_here, tmp_path):
    settings = {**SETTINGS, "run_on": "ray", "mixture": {"poems": 1}}
    with pytest.raises(UserError, match="has no source 'poems'"):
        pretrain(settings, root=tmp_path, **elsewhere(inputs, tmp_path))


def test_more_workers_than_ray_has_room_for_is_told(inputs, ray_here, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    settings = {**SETTINGS, "run_on": "ray", "workers": 3, "restarts": 0}
    with pytest.raises(SystemFault, match="Ray Train could not run 3 workers of 1 threads"):
        pretrain(settings, root=tmp_path, **elsewhere(inputs, tmp_path))


@pytest.mark.parametrize("name", ["worker 0", "worker 1"])
def test_a_killed_process_ends_the_step_and_the_next_try_goes_on(whole, inputs, lines, tmp_path, name):
    references = elsewhere(inputs, tmp_path)
    tracker = KillsOne(lambda: next(child.pid for child in multiprocessing.active_children() if child.name == name))
    with pytest.raises(SystemFault, match=f"{name} was ended by SIGKILL; run again to go on"):
        pretrain(SETTINGS, root=tmp_path, tracker=tracker, **references)
    assert multiprocessing.active_children() == []
    outcome = pretrain(SETTINGS, root=tmp_path, **references)
    assert any(line.startswith("resumed at step ") for line in lines)
    assert_same(whole, outcome.outputs["checkpoints"])


def start(root, references, run_on):
    """The step as a process, once it has saved a checkpoint below `root`."""
    file = root / "config.yaml"
    file.write_text(json.dumps({**SETTINGS, "run_on": run_on}))
    words = [word for name, ref in references.items() for word in (f"--{name}", ref)]
    command = [sys.executable, "-m", "components.pretrain", "--config", str(file), "--root", str(root), *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while not found_below(root, "step-*/training_state/files.json") and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    return process


def test_without_its_raylet_a_run_ends_as_a_system_fault_and_the_next_try_goes_on(whole, inputs, lines, tmp_path):
    references = elsewhere(inputs, tmp_path)
    process = start(tmp_path, references, "ray")
    started = descendants(process.pid)
    os.kill(pid_of("raylet/raylet", process.pid), signal.SIGKILL)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == SystemFault.exit_code, error
    assert error.splitlines()[-1] == "error: the local Ray is dead (raylet ended); run again to go on"
    workers = [pid for pid, name in started.items() if "ray::RayTrainWorker" in name]
    assert len(workers) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers), "they could write while the next try trains"
    # The next try may as well do without Ray.
    outcome = pretrain(SETTINGS, root=tmp_path, **references)
    assert any(line.startswith("resumed at step ") for line in lines)
    assert_same(whole, outcome.outputs["checkpoints"])


@pytest.mark.parametrize("run_on", ["processes", "ray"])
def test_sigterm_to_the_step_saves_and_leaves(inputs, tmp_path, run_on):
    process = start(tmp_path, elsewhere(inputs, tmp_path), run_on)
    process.terminate()
    error = process.communicate(timeout=120)[1]
    assert process.returncode == SystemFault.exit_code, error
    assert "told to stop: short is saved at step " in error.splitlines()[-1]
