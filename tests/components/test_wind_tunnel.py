"""The sweep as a component, on a real Ray: trials in parallel, resumed, retried, reported by name."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from components import ray_cluster
from components.prepare_data import PrepareDataConfig, prepare_data
from components.ray_cluster import check_gpus, ray_running
from components.wind_tunnel import WindTunnelConfig, wind_tunnel
from components.wind_tunnel.sweep import Task, run_task, run_tasks
from ling_flow.config import identity_of, merge
from ling_flow.errors import SystemFault, UserError
from ling_flow.flow.artifact import ArtifactStore
from ling_flow.flow.tracking import NullTracker
from ling_flow.scaling import trial as trial_module
from ling_flow.scaling.design import Reading, Rung, Sweep, SweepDesign, TrialResult, plan_trials
from ling_flow.training.settings import OptimizerSettings
from tests.training.micro import micro_model, write_texts
from tests.watching import found_below

DESIGN = SweepDesign(
    rungs=(Rung(hidden_size=16, compute_flops=6e7), Rung(hidden_size=32, compute_flops=2e8)),
    learning_rates=(2e-3, 8e-3),
    batch_tokens=(64, 128),
    sequence_length=16,
    read_at=(0.5, 1.0),
    warmup_tokens=128,
    validation_tokens=64,
)
CONFIG = WindTunnelConfig(model=micro_model(), design=DESIGN, mixture={"words": 1.0, "numbers": 1.0}, workers=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A reference to a small corpus, an artifact of its own component."""
    directory = tmp_path_factory.mktemp("corpus")
    sources = [write_texts(directory, "words", 0), write_texts(directory, "numbers", 1)]
    config = PrepareDataConfig(sources=sources, vocab_size=280, validation_share=0.1, tokenizer_characters=5000)
    return prepare_data(config, root=directory / "artifacts").outputs["corpus"]


def specs():
    return plan_trials(CONFIG.model, DESIGN, OptimizerSettings(learning_rate=1), 1e-3, CONFIG.mixture, 0)


def tasks(folder: Path) -> list[Task]:
    return [Task(spec, f"fp{index}", folder) for index, spec in enumerate(specs())]


def made_up(task: Task, loss: float = 1.0) -> TrialResult:
    return TrialResult(
        name=task.spec.name,
        fingerprint=task.fingerprint,
        hidden_size=task.spec.model.hidden_size,
        active_parameters=1,
        model_flops_per_token=task.spec.model_flops_per_token,
        learning_rate=task.spec.optimizer.learning_rate,
        batch_tokens=task.spec.batch_tokens,
        readings=(Reading(step=1, tokens=64, compute_flops=1.0, loss=loss),),
        seconds=0.0,
    )


def test_a_trial_takes_a_gpu_only_where_it_was_given_one(monkeypatch, tmp_path):
    """Ray does not hide the GPUs of a machine from tasks without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(trial_module, "run_trial", lambda spec, key, corpus, device: device)
    task = tasks(tmp_path)[0]
    assert run_task(task) == torch.device("cpu")
    assert run_task(replace(task, gpus=0.5)) == torch.device("cuda")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"torch_dtype": "bfloat16"}}, r"torch_dtype must be 'float32', got 'bfloat16'"),
        ({"design": {"sequence_length": 64, "batch_tokens": (64, 128)}}, r"sequence_length must be at most .*\(32\)"),
        ({"mixture": {"words": -1.0}}, r"mixture: weights must be 0 or more"),
        ({"design": {"warmup_tokens": 10**6}}, r"design\.warmup_tokens: 1,000,000 are"),
        ({"design": {"batch_tokens": (64, 2**20)}}, r"design\.rungs\.\d\.compute_flops: .* too few"),
    ],
)
def test_what_cannot_be_run_is_refused_by_the_plan(changes, message):
    with pytest.raises(ValidationError, match=message):
        WindTunnelConfig.model_validate(merge(CONFIG.model_dump(), changes))


@pytest.mark.slow
def test_a_sweep_learns_and_resumes_with_its_finished_trials(corpus, tmp_path):
    outcome = wind_tunnel(CONFIG, root=tmp_path, corpus=corpus)
    sweep = Sweep.load(outcome.outputs["trials"])
    assert outcome.result.trial_count == len(sweep.trials) == 4
    assert outcome.result.diverged == 0
    assert outcome.result.compute_total_flops == pytest.approx(2 * 6e7 + 2 * 2e8, rel=0.15)
    assert outcome.result.best_validation_loss == min(trial.loss for trial in sweep.trials)
    assert all(trial.readings[-1].loss < trial.readings[0].loss for trial in sweep.trials)
    assert [trial.name for trial in sweep.trials] == [spec.name for spec in specs()]

    # A killed sweep: its artifact is not there, two of its trials are.
    files = sorted((outcome.outputs["trials"] / "trials").iterdir())
    assert {path.stem for path in files} == {trial.fingerprint for trial in sweep.trials}
    again = tmp_path / "again"
    partial = ArtifactStore(str(again), tmp_path / "cache").partial("wind_tunnel", outcome.fingerprint)
    (partial / "trials" / "trials").mkdir(parents=True)
    for path in files[:2]:
        record = json.loads(path.read_text())
        record["seconds"] = 12345.0
        (partial / "trials" / "trials" / path.name).write_text(json.dumps(record))
    (partial / "trials" / "trials" / files[2].name).write_text(files[2].read_text()[:40])
    told: list[str] = []

    class Kept(NullTracker):
        def trial(self, name, parameters, metrics):
            told.append(name)

    resumed = wind_tunnel(CONFIG, root=again, corpus=corpus, tracker=Kept())
    assert sorted(told) == sorted(spec.name for spec in specs()), "of those that were kept, too"
    trials = {trial.fingerprint: trial for trial in Sweep.load(resumed.outputs["trials"]).trials}
    assert [trials[path.stem].seconds == 12345.0 for path in files] == [True, True, False, False]
    for trial in sweep.trials:
        assert trials[trial.fingerprint].readings == trial.readings, "the same trial gives the same bits"


@pytest.mark.slow
def test_killed_in_mid_sweep_the_finished_trials_are_kept(corpus, tmp_path):
    changes = {
        "rungs": tuple(rung.model_copy(update={"compute_flops": rung.compute_flops * 4}) for rung in DESIGN.rungs)
    }
    config = CONFIG.model_copy(update={"design": DESIGN.model_copy(update=changes), "workers": 1})
    (tmp_path / "config.yaml").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "components.wind_tunnel", "--config", str(tmp_path / "config.yaml")]
    command += ["--root", str(tmp_path / "root"), "--corpus", str(corpus)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kept: list[Path] = []
    deadline = time.monotonic() + 120
    while not kept and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        kept = found_below(tmp_path / "root", "trials/*.json")
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    kept = found_below(tmp_path / "root", "trials/*.json")
    assert 1 <= len(kept) < 4
    stamps = {path.name: path.stat().st_mtime_ns for path in kept}
    outcome = wind_tunnel(config, root=tmp_path / "root", corpus=corpus)
    assert outcome.result.trial_count == 4
    folder = outcome.outputs["trials"] / "trials"
    assert all((folder / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())


@pytest.mark.slow
def test_failing_trials_are_retried_then_named_and_the_others_finish(tmp_path):
    all_tasks = tasks(tmp_path)
    unlucky, broken = all_tasks[0].spec.name, all_tasks[1].spec.name

    def flaky(task: Task) -> TrialResult:
        marker = task.corpus_path / task.fingerprint
        if task.spec.name == broken:
            raise RuntimeError("no memory for that")
        if task.spec.name == unlucky and not marker.exists():
            marker.touch()
            os._exit(1)  # the worker dies, as when it is killed for memory
        return made_up(task)

    done: list[str] = []
    with ray_running(cpus=2), pytest.raises(SystemFault, match="1 of 4 trials failed 2 times") as raised:
        run_tasks(all_tasks, lambda result: done.append(result.name), function=flaky)
    assert broken in str(raised.value) and "no memory for that" in str(raised.value)
    assert sorted(done) == sorted(task.spec.name for task in all_tasks if task.spec.name != broken)


@pytest.mark.slow
def test_an_error_of_the_user_is_not_retried_and_a_ray_of_others_is_left_running(tmp_path):
    import ray

    def refused(task: Task) -> TrialResult:
        (task.corpus_path / f"{task.fingerprint}-{time.time_ns()}").touch()
        raise UserError(f"{task.corpus_path}: damaged")

    with ray_running(cpus=1):
        with pytest.raises(UserError, match=r"gpus_per_trial: 99 wanted, but this machine has"):
            check_gpus(99)
        with ray_running(cpus=1), pytest.raises(UserError, match=r"^/.*: damaged$"):
            run_tasks(tasks(tmp_path)[:1], lambda result: None, function=refused)
        assert ray.is_initialized()
        niceness = ray.get(ray.remote(lambda: os.nice(0)).remote())
        assert niceness == os.nice(0), "trials stand back behind nothing"
    assert not ray.is_initialized()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_a_ray_that_does_not_start_is_a_fault_of_the_machine(monkeypatch):
    monkeypatch.setattr(ray_cluster, "OBJECT_STORE_BYTES", 1)
    with (
        pytest.raises(SystemFault, match=r"a local Ray did not start \(.*\); is the"),
        ray_running(cpus=1),
    ):
        pass


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(SystemFault, match=r"RAY_ADDRESS: .*127\.0\.0\.1:1"), ray_running(cpus=1):
        pass


def test_a_model_too_small_for_the_corpus_is_refused_before_ray_starts(corpus, tmp_path):
    config = CONFIG.model_copy(update={"model": micro_model(vocab_size=100)})
    with pytest.raises(UserError, match=r"wind_tunnel\.model\.vocab_size: .*280"):
        wind_tunnel(config, root=tmp_path, corpus=corpus)


def test_where_trials_run_is_no_part_of_the_identity():
    moved = CONFIG.model_copy(update={"workers": 7, "gpus_per_trial": 1.0})
    assert identity_of(moved) == identity_of(CONFIG)


def test_a_trial_that_diverges_is_a_result(corpus):
    import torch

    from ling_flow.scaling.trial import run_trial

    spec = specs()[-1]
    wild = spec.model_copy(
        update={"optimizer": spec.optimizer.model_copy(update={"learning_rate": 1e30}), "warmup_steps": 0}
    )
    result = run_trial(wild, "fp", corpus, torch.device("cpu"))
    assert result.loss is None
    assert [reading.step for reading in result.readings] == list(spec.reading_steps)
