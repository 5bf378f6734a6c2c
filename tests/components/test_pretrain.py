import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from components.pretrain import PretrainConfig, pretrain, stage_model
from ling_flow.config import identity_of, parse
from ling_flow.errors import SystemFault, UserError
from ling_flow.flow.artifact import Ref
from ling_flow.flow.component import Step
from ling_flow.flow.tracking import NullTracker
from ling_flow.model import transformer
from ling_flow.model.hf import load_pretrained
from ling_flow.training.settings import CheckpointIndex
from tests.components.pretraining import config, make_inputs
from tests.training.micro import micro_model
from tests.watching import found_below


class Recorder(NullTracker):
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.seen = {}

    def start_step(self, label, component, fingerprint, config, inputs):
        self.label = label

    def metrics(self, values, step):
        self.seen.setdefault(step, {}).update(values)

    def finish(self, result, status):
        self.status = status


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def inputs(root, tmp_path_factory):
    return make_inputs(root, tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def short(root, inputs):
    return pretrain(config(), root=root, **inputs)


def test_stage_takes_rate_and_batch_from_the_law(short):
    result = short.result
    assert result.learning_rate == 4e-3
    assert result.batch_tokens == 64  # 70 asked for, whole sequences
    assert (result.steps, result.tokens, result.total_tokens, result.skipped_steps) == (6, 384, 384, 0)
    assert 0 < result.validation_loss < 7
    assert result.tokens_per_second > 0
    assert result.load_violation > 0


def test_config_overrides_the_law(root, inputs):
    outcome = pretrain(config(learning_rate=1e-3, batch_tokens=32), root=root, **inputs)
    assert (outcome.result.learning_rate, outcome.result.batch_tokens, outcome.result.steps) == (1e-3, 32, 12)


def test_output_holds_checkpoints_with_index_and_contract(short, inputs):
    path = short.outputs["checkpoints"]
    index = CheckpointIndex.load(path)
    assert [(entry.directory, entry.tokens) for entry in index.checkpoints] == [
        ("step-00000004", 256),
        ("step-00000006", 384),
    ]
    assert (index.stage, index.latest, index.mixture) == ("short", "step-00000006", {"words": 3, "numbers": 1})
    assert sorted(entry.name for entry in path.iterdir()) == ["checkpoints.json", "step-00000004", "step-00000006"]
    corpus = Path(inputs["corpus"])
    contract = json.loads((corpus.parent / "manifest.json").read_text())["outputs"]["corpus"]["contract"]
    assert short.manifest.outputs["checkpoints"].contract == {
        **contract,
        "context_length": 16,
        "precision": "float32",
    }
    newest = path / index.latest
    assert (newest / "tokenizer.json").read_bytes() == (corpus / "tokenizer" / "tokenizer.json").read_bytes()
    model = load_pretrained(newest)
    assert model.config.max_position_embeddings == 16
    assert model.config.eos_token_id == model.config.pad_token_id > 256


def test_what_a_stage_tells_while_it_trains(root, inputs, monkeypatch):
    tracker, lines = Recorder(), []
    monkeypatch.setattr(Step, "log", lambda self, text: lines.append(text))
    outcome = pretrain(
        config(precision="fp8", fp8={"watch_every": 4}, evaluations=1, watts=300.0),
        root=root,
        tracker=tracker,
        **inputs,
    )
    assert 0 < outcome.result.validation_loss < 7
    last = tracker.seen[6]
    assert {"cross_entropy/words", "cross_entropy/numbers", "mfu", "memory_gib", "energy_kwh"} <= set(last)
    assert 0 < last["mfu"] < 1 and 0 < last["memory_gib"] < 64
    assert 0 < last["energy_kwh"] < 300 * 60 / 3.6e6
    assert 0.9 < tracker.seen[4]["fp8/cosine/forward"] < 1
    assert "validation_loss/words" in tracker.seen[3]  # half way
    assert any(line.startswith("step 3: words: ") for line in lines)


def test_a_moving_mixture_of_windows_is_refused_before_anything_runs():
    with pytest.raises(UserError, match="mixture_end needs packing stream"):
        parse(PretrainConfig, {**config(), "mixture_end": {"words": 1}}, "pretrain")


def test_a_moving_mixture_is_judged_by_what_it_ends_with(root, inputs):
    tracker = Recorder()
    ends = {"mixture": {"words": 1}, "mixture_end": {"numbers": 1, "words": 0}}
    outcome = pretrain(config(packing="stream", **ends), root=root, tracker=tracker, **inputs)
    assert outcome.result.validation_loss == tracker.seen[6]["validation_loss/numbers"]
    assert CheckpointIndex.load(outcome.outputs["checkpoints"]).mixture == {"numbers": 1, "words": 0}


def test_shares_that_rounding_changes_are_told(root, inputs, monkeypatch):
    lines = []
    monkeypatch.setattr(Step, "log", lambda self, text: lines.append(text))
    pretrain(config(mixture={"words": 1, "numbers": 3.2e-5}), root=root, **inputs)
    assert [line for line in lines if "rounded" in line] == [
        "mixture.numbers: 3.2e-05 of all asked for, 6.1e-05 drawn; shares are rounded"
    ]


def test_evaluating_changes_no_bit(root, inputs):
    # 50 are more than there are steps: after each, then.
    plain, watched = (
        pretrain(config(evaluations=evaluations, weight_decay=0.11), root=root, **inputs) for evaluations in (0, 50)
    )
    one, other = (load_pretrained(o.outputs["checkpoints"] / "step-00000006").state_dict() for o in (plain, watched))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_stages_go_on_from_each_other_and_grow_the_context(short, root, inputs):
    tracker = Recorder()
    mid = pretrain(
        config(stage="mid", sequence_length=32, rope_theta=5e4),
        root=root,
        tracker=tracker,
        previous=short.refs["checkpoints"],
        **inputs,
    )
    assert (mid.result.steps, mid.result.total_tokens) == (6, 768)
    assert mid.label == tracker.label == "pretrain_mid"
    assert sorted(tracker.seen) == [7, 8, 9, 10, 11, 12]  # steps are counted over the stages
    assert {"validation_loss/words", "validation_loss/numbers", "validation_loss", "loss"} <= set(tracker.seen[12])
    assert all(values["learning_rate"] == 4e-3 for values in tracker.seen.values())
    latest = mid.outputs["checkpoints"] / CheckpointIndex.load(mid.outputs["checkpoints"]).latest
    assert load_pretrained(latest).config.max_position_embeddings == 32
    assert load_pretrained(latest).config.rope_theta == 5e4
    assert mid.manifest.outputs["checkpoints"].contract["context_length"] == 32
    again = pretrain(
        config(stage="long"), root=root, previous=mid.refs["checkpoints"], **inputs
    )  # a shorter length does not shrink it
    assert again.manifest.outputs["checkpoints"].contract["context_length"] == 32


def test_a_stage_can_extend_the_context_by_yarn(short, root, inputs):
    yarn = {"factor": 2, "original_max_position_embeddings": 16}
    outcome = pretrain(
        config(stage="extension", sequence_length=32, rope_scaling=yarn),
        root=root,
        previous=short.refs["checkpoints"],
        **inputs,
    )
    latest = outcome.outputs["checkpoints"] / CheckpointIndex.load(outcome.outputs["checkpoints"]).latest
    model = load_pretrained(latest)
    assert model.config.max_position_embeddings == 32
    assert model.config.rope_scaling is not None and model.config.rope_scaling.factor == 2
    later = pretrain(config(stage="later"), root=root, previous=outcome.refs["checkpoints"], **inputs)
    latest = later.outputs["checkpoints"] / CheckpointIndex.load(later.outputs["checkpoints"]).latest
    assert load_pretrained(latest).config.rope_scaling == model.config.rope_scaling  # from that stage on
    with pytest.raises(UserError, match=r"rope_scaling: factor × original_max_position_embeddings is 64; .* at most"):
        parse(PretrainConfig, {**config(), "rope_scaling": {**yarn, "factor": 4}}, "pretrain")


def test_a_later_stage_draws_sequences_the_first_did_not(short, root, inputs, monkeypatch):
    from ling_flow.data import batches

    opened = []
    original = batches.Batches.__init__

    def record(self, *arguments, **options):
        opened.append(options["drawn_before"])
        original(self, *arguments, **options)

    monkeypatch.setattr(batches.Batches, "__init__", record)
    more = pretrain(config(stage="more"), root=root, previous=short.refs["checkpoints"], **inputs)
    assert sum(drawn.tokens for drawn in opened[0].values()) >= short.result.tokens
    assert all(drawn.tokens % 16 == 0 for drawn in opened[0].values())
    pretrain(config(stage="yet_more"), root=root, previous=more.refs["checkpoints"], **inputs)
    assert sum(drawn.tokens for drawn in opened[1].values()) >= short.result.tokens + more.result.tokens


def test_another_model_or_another_tokenizer_is_refused(short, root, inputs, tmp_path):
    with pytest.raises(UserError, match=r"model.num_experts: 8 asked for"):
        pretrain(
            config(stage="mid", model=micro_model(num_experts=8).model_dump()),
            root=root,
            previous=short.refs["checkpoints"],
            **inputs,
        )
    other = make_inputs(root, tmp_path, seed=2)["corpus"]
    with pytest.raises(UserError, match="tokenizer") as refused:
        pretrain(
            config(stage="mid"),
            root=root,
            previous=short.refs["checkpoints"],
            corpus=other,
            scaling_law=inputs["scaling_law"],
        )
    assert short.refs["checkpoints"] in str(refused.value)
    assert other in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "pretrain.tokens: .*greater than 0"),
        ({"mixture": {"words": -1, "numbers": 2}}, "pretrain.*mixture: weights must be 0 or more"),
        ({"mixture": {"words": 0}}, "pretrain.*mixture: weights must be 0 or more"),
        ({"sequence_length": 33}, r"sequence_length must be at most model.max_position_embeddings \(32\), got 33"),
        ({"checkpoints_kept": 4}, r"checkpoints_kept must be at most checkpoints_saved \(3\), got 4"),
        (
            {"model": micro_model(torch_dtype="bfloat16").model_dump()},
            "model.torch_dtype must be 'float32', got 'bfloat16'",
        ),
        (
            {"router_loss": {"balance": 0.1, "balance_over": "batch"}, "workers": 2},
            "router_loss.balance_over: batch is over the rows of one worker; 2 would change the result",
        ),
        ({"stag": "x"}, "pretrain.stag: unknown field; did you mean 'stage'"),
    ],
)
def test_bad_configs_are_refused_with_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        parse(PretrainConfig, config(**changes), "pretrain")


def test_bad_budgets_sources_and_vocabularies_are_refused_before_training(root, inputs):
    with pytest.raises(UserError, match=r"pretrain.tokens: 100 make 1 steps of 64 tokens, fewer than checkpoints_kept"):
        pretrain(config(tokens=100), root=root, **inputs)
    with pytest.raises(UserError, match="has no source 'poems'"):
        pretrain(config(mixture={"poems": 1}), root=root, **inputs)
    with pytest.raises(UserError, match=r"model.vocab_size: must be at least that of the corpus \(280\), got 270"):
        stage_model(PretrainConfig(**config(model=micro_model(vocab_size=270).model_dump())), 280, 279, None)


def test_what_changes_no_bit_does_not_bear_identity():
    context = {"threads", "recompute", "watts", "failures_per_day", "resumable_checkpoints"}
    context |= {"workers", "run_on", "restarts", "ray_storage"}
    assert not context & identity_of(PretrainConfig(**config())).keys()


def test_saving_to_resume_changes_nothing_that_is_left_and_its_cost_is_told(short, inputs, tmp_path):
    tracker = Recorder()
    again = pretrain(config(failures_per_day=1e9), root=tmp_path, tracker=tracker, **elsewhere(inputs, tmp_path))
    assert not again.cached and again.fingerprint == short.fingerprint
    saves = {step: values for step, values in tracker.seen.items() if "save_seconds" in values}
    assert 1 in saves and {2, 4, 6} <= saves.keys()  # the first to know what a save costs
    assert all(values["save_seconds"] > 0 and values["save_stall_seconds"] > 0 for values in saves.values())
    one, other = short.outputs["checkpoints"], again.outputs["checkpoints"]
    assert CheckpointIndex.load(one) == CheckpointIndex.load(other)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for entry in CheckpointIndex.load(one).checkpoints:
        weights = f"{entry.directory}/model.safetensors"
        assert (one / weights).read_bytes() == (other / weights).read_bytes()


def test_milestones_stay_beside_those_for_the_merge(root, inputs):
    outcome = pretrain(config(checkpoints_saved=6, checkpoints_kept=2, checkpoints_kept_every=2), root=root, **inputs)
    index = CheckpointIndex.load(outcome.outputs["checkpoints"])
    assert [entry.step for entry in index.checkpoints] == [5, 6]
    assert [(entry.step, entry.tokens) for entry in index.milestones] == [(2, 128), (4, 256)]
    assert load_pretrained(outcome.outputs["checkpoints"] / "step-00000002")


def elsewhere(inputs, root):
    """The same inputs below another root, so that the step runs again with the same fingerprint."""
    copies = {}
    for name, reference in inputs.items():
        ref = Ref.parse(reference)
        shutil.copytree(Path(reference).parent, root / ref.component / ref.fingerprint)
        copies[name] = str(root / ref.component / ref.fingerprint / ref.output)
    return copies


def test_recomputation_changes_no_bit(short, inputs, tmp_path, monkeypatch):
    recomputed = []

    def watched(function, *arguments, **options):
        recomputed.append(function)
        return checkpoint(function, *arguments, **options)

    monkeypatch.setattr(transformer, "checkpoint", watched)
    again = pretrain(config(recompute=True), root=tmp_path, **elsewhere(inputs, tmp_path))
    assert recomputed
    assert not again.cached
    assert again.fingerprint == short.fingerprint
    files = [Path(run.outputs["checkpoints"]) / "step-00000006" / "model.safetensors" for run in (short, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ended_process_goes_on_bit_for_bit(root, inputs, tmp_path, number):
    """A signal in the middle of the stage, then the same command again."""
    settings = config(tokens=64 * 60, checkpoints_saved=20)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(settings))
    whole = pretrain(settings, root=root, **inputs).outputs["checkpoints"]

    other = tmp_path / "artifacts"
    references = [word for name, ref in elsewhere(inputs, other).items() for word in (f"--{name}", ref)]
    command = [sys.executable, "-m", "components.pretrain", "--config", str(file), "--root", str(other), *references]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LING_FLOW_", "MLFLOW_"))}
    environment["LING_FLOW_HOME"] = str(tmp_path / "home")

    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while len(found_below(other, "step-*/training_state")) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(number)
    told = process.communicate(timeout=120)[1]
    if number == signal.SIGTERM:
        assert process.returncode == SystemFault.exit_code
        assert re.search(r"told to stop: short is saved at step \d+ of 60; run again", told.splitlines()[-1])
    else:
        assert process.returncode == -signal.SIGKILL
    assert not list(other.rglob("checkpoints.json"))

    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "resumed at step " in second.stderr
    (resumed,) = (path.parent for path in other.rglob("checkpoints.json"))
    assert resumed.parent.name == whole.parent.name
    assert CheckpointIndex.load(resumed) == CheckpointIndex.load(whole)
    for entry in CheckpointIndex.load(whole).checkpoints:
        first, again = (load_pretrained(path / entry.directory).state_dict() for path in (whole, resumed))
        assert all(torch.equal(first[name], again[name]) for name in first)
    moments = f"{CheckpointIndex.load(whole).latest}/training_state/optimizer.safetensors"
    assert (whole / moments).read_bytes() == (resumed / moments).read_bytes()
