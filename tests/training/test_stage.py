import signal

import pytest
import torch

from ling_flow.data.batches import Batches
from ling_flow.errors import SystemFault, UserError
from ling_flow.model.hf import load_pretrained
from ling_flow.training import stage as stage_module
from ling_flow.training.checkpoint import list_checkpoints
from ling_flow.training.interval import SaveClock
from ling_flow.training.retention import Retention
from ling_flow.training.stage import batch_sizes, open_stage, run_stage
from ling_flow.training.stopping import sigterm_noticed
from tests.training.micro import micro_model, stage_settings

CPU = torch.device("cpu")


class Killed(BaseException):
    """Stands in for the end of the process."""


def run(corpus, directory, settings, config, previous=None, die_after=None, log=lambda line: None, **options):
    """Open the stage in `directory` and train it to its end, or until `die_after` steps of it are done."""
    directory.mkdir(exist_ok=True)
    stage = open_stage(directory, settings, config, seed=0, previous=previous, device=CPU, log=log)
    batches = Batches(
        corpus,
        {"words": 1, "numbers": 1},
        settings.sequence_length,
        batch_sizes(settings),
        0,
        drawn_before=stage.state.drawn_before,
    )
    reports = []

    def on_step(report):
        reports.append(report)
        if die_after is not None and report.step - stage.state.stage_start > die_after:
            raise Killed

    kept = run_stage(
        stage, directory, batches, settings, tokenizer_dir=corpus.path / "tokenizer", on_step=on_step, **options
    )
    return stage, kept.window, reports


def assert_same_model(one, two):
    first, second = load_pretrained(one).state_dict(), load_pretrained(two).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_stage_keeps_the_newest_checkpoints_and_one_training_state(corpus, tmp_path):
    stage, entries, _ = run(corpus, tmp_path / "a", stage_settings(), micro_model())
    assert [(entry.directory, entry.step, entry.tokens) for entry in entries] == [
        ("step-00000004", 4, 256),
        ("step-00000006", 6, 384),
    ]
    assert [path.name for path in list_checkpoints(tmp_path / "a")] == ["step-00000004", "step-00000006"]
    assert not (tmp_path / "a" / "step-00000004" / "training_state").exists()
    assert (tmp_path / "a" / "step-00000006" / "training_state").exists()
    assert (stage.state.step, stage.state.tokens, stage.state.tokens_before) == (6, 384, 0)


@pytest.mark.parametrize("die_after", [1, 3, 5])
def test_killed_and_resumed_stage_ends_with_the_same_bits(corpus, tmp_path, die_after):
    settings, config = stage_settings(), micro_model()
    run(corpus, tmp_path / "whole", settings, config)
    with pytest.raises(Killed):
        run(corpus, tmp_path / "broken", settings, config, die_after=die_after)
    stage, entries, reports = run(corpus, tmp_path / "broken", settings, config)
    assert len(reports) == 6 - die_after // 2 * 2  # saved at 2, 4, 6
    assert stage.state.step == 6
    assert [entry.directory for entry in entries] == ["step-00000004", "step-00000006"]
    for name in ("step-00000004", "step-00000006"):
        assert_same_model(tmp_path / "whole" / name, tmp_path / "broken" / name)
    moments = "step-00000006/training_state/optimizer.safetensors"
    assert (tmp_path / "whole" / moments).read_bytes() == (tmp_path / "broken" / moments).read_bytes()


def test_damaged_newest_checkpoint_is_reported_and_made_again(corpus, tmp_path):
    settings, config = stage_settings(), micro_model()
    run(corpus, tmp_path / "whole", settings, config)
    with pytest.raises(Killed):
        run(corpus, tmp_path / "broken", settings, config, die_after=5)
    damaged = tmp_path / "broken" / "step-00000004" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    (tmp_path / "broken" / ".step-00000006").mkdir()  # left by a killed writer
    lines = []
    open_stage(tmp_path / "broken", settings, config, seed=0, previous=None, device=CPU, log=lines.append)
    assert [path.name for path in (tmp_path / "broken").iterdir()] == ["step-00000002"]
    _, _, reports = run(corpus, tmp_path / "broken", settings, config)
    assert len(reports) == 4
    assert "step-00000004/model.safetensors: damaged" in lines[0]
    assert "resumed at step 2 of 6" in lines[1]
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == ["step-00000004", "step-00000006"]
    for name in ("step-00000004", "step-00000006"):
        assert_same_model(tmp_path / "whole" / name, tmp_path / "broken" / name)


def test_where_no_checkpoint_is_whole_none_is_removed(corpus, tmp_path):
    settings, config = stage_settings(checkpoints_saved=6, retention=Retention(window=4)), micro_model()
    with pytest.raises(Killed):
        run(corpus, tmp_path / "a", settings, config, die_after=5)
    there = list_checkpoints(tmp_path / "a")
    for path in there[-2:]:
        moments = path / "training_state" / "optimizer.safetensors"
        moments.write_bytes(moments.read_bytes()[:-1])
    lines = []
    with pytest.raises(UserError, match=r"none of its 4 checkpoints up to step-00000005 can be gone on from"):
        run(corpus, tmp_path / "a", settings, config, log=lines.append)
    assert list_checkpoints(tmp_path / "a") == there and len(there) == 4
    assert len(lines) == 2 and all("optimizer.safetensors: damaged" in line for line in lines)


def test_finished_stage_has_nothing_left_to_train(corpus, tmp_path):
    settings, config = stage_settings(), micro_model()
    first, _, _ = run(corpus, tmp_path / "a", settings, config)
    again, entries, reports = run(corpus, tmp_path / "a", settings, config)
    assert reports == []
    assert again.state == first.state
    assert len(entries) == 2


def test_two_stages_are_one_run(corpus, tmp_path):
    """Same data settings: short then mid equals one stage of twice the length, bit for bit."""
    config = micro_model()
    run(corpus, tmp_path / "one", stage_settings(steps=12, checkpoints_saved=6), config)
    run(corpus, tmp_path / "short", stage_settings(), config)
    lines = []
    stage, entries, reports = run(
        corpus,
        tmp_path / "mid",
        stage_settings(stage="mid"),
        config,
        tmp_path / "short" / "step-00000006",
        log=lines.append,
    )
    assert lines == ["goes on from short: step 6, 384 tokens"]
    assert [report.learning_rate for report in reports] == [3e-3] * 6  # no second warm-up
    assert (stage.state.step, stage.state.tokens, stage.state.stage_start) == (12, 768, 6)
    assert [entry.step for entry in entries] == [10, 12]
    assert_same_model(tmp_path / "one" / "step-00000012", tmp_path / "mid" / "step-00000012")


def test_later_stage_resumes_in_itself_with_a_longer_context(corpus, tmp_path):
    run(corpus, tmp_path / "short", stage_settings(), micro_model(max_position_embeddings=16))
    previous = tmp_path / "short" / "step-00000006"
    settings = stage_settings(stage="mid", sequence_length=32, sequences_per_batch=2)
    longer = micro_model(max_position_embeddings=32, rope_theta=5e4)
    run(corpus, tmp_path / "whole", settings, longer, previous)
    with pytest.raises(Killed):
        run(corpus, tmp_path / "mid", settings, longer, previous, die_after=3)
    stage, _, reports = run(corpus, tmp_path / "mid", settings, longer, previous)
    assert len(reports) == 4
    assert stage.model.config.max_position_embeddings == 32
    assert stage.model.config.rope_theta == 5e4
    assert_same_model(tmp_path / "whole" / "step-00000012", tmp_path / "mid" / "step-00000012")


def test_previous_stage_must_be_the_same_model_and_whole(corpus, tmp_path):
    run(corpus, tmp_path / "short", stage_settings(), micro_model())
    previous = tmp_path / "short" / "step-00000006"
    with pytest.raises(UserError, match=r"model.num_experts: 8 asked for, but .* was trained with 4"):
        run(corpus, tmp_path / "mid", stage_settings(), micro_model(num_experts=8), previous)
    with pytest.raises(UserError, match=r"step-00000004/training_state/files.json: missing"):
        run(corpus, tmp_path / "mid", stage_settings(), micro_model(), tmp_path / "short" / "step-00000004")
    (previous / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config.json: damaged"):
        run(corpus, tmp_path / "mid", stage_settings(), micro_model(), previous)


class Eager(SaveClock):
    """Saves beside the plan after every step."""

    def due(self):
        return True


def test_saving_beside_the_plan_changes_no_bit_and_nothing_that_is_kept(corpus, tmp_path, monkeypatch):
    settings, config = stage_settings(steps=9, retention=Retention(window=2, every=2)), micro_model()
    _, plain, _ = run(corpus, tmp_path / "plain", settings, config)
    monkeypatch.setattr(stage_module, "SaveClock", Eager)
    reports = []
    _, eager, _ = run(corpus, tmp_path / "eager", settings, config, on_saved=reports.append)
    assert [report.step for report in reports] == list(range(1, 10))
    assert all(report.stall_seconds > 0 and report.seconds > 0 for report in reports)
    assert plain == eager
    names = [path.name for path in list_checkpoints(tmp_path / "plain")]
    assert names == ["step-00000006", "step-00000009"] == [path.name for path in list_checkpoints(tmp_path / "eager")]
    for name in names:
        assert_same_model(tmp_path / "plain" / name, tmp_path / "eager" / name)


def test_milestones_are_kept_and_told_apart_from_what_is_merged(corpus, tmp_path):
    settings = stage_settings(steps=8, checkpoints_saved=8, retention=Retention(window=3, every=3))
    stage = open_stage(tmp_path, settings, micro_model(), seed=0, previous=None, device=CPU, log=print)
    batches = Batches(corpus, {"words": 1}, 16, batch_sizes(settings), 0)
    kept = run_stage(
        stage, tmp_path, batches, settings, tokenizer_dir=corpus.path / "tokenizer", on_step=lambda _: None
    )
    assert [entry.step for entry in kept.window] == [6, 7, 8]
    assert [(entry.step, entry.tokens) for entry in kept.milestones] == [(3, 192)]
    assert len(list_checkpoints(tmp_path)) == 4


def test_told_to_stop_a_stage_saves_and_goes_on_bit_for_bit(corpus, tmp_path):
    settings, config = stage_settings(), micro_model()
    run(corpus, tmp_path / "whole", settings, config)
    asked = []

    def stop():
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(SystemFault, match="told to stop: short is saved at step 3 of 6; run again"):
        run(corpus, tmp_path / "stopped", settings, config, stop=stop)
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == ["step-00000002", "step-00000003"]
    _, _, reports = run(corpus, tmp_path / "stopped", settings, config)
    assert len(reports) == 3
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == ["step-00000004", "step-00000006"]
    for name in ("step-00000004", "step-00000006"):
        assert_same_model(tmp_path / "whole" / name, tmp_path / "stopped" / name)


def test_sigterm_is_noticed_within_the_block_and_means_what_it_did_after():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    try:
        with sigterm_noticed() as stop:
            assert not stop()
            signal.raise_signal(signal.SIGTERM)
            assert stop()
        assert heard == []
        signal.raise_signal(signal.SIGTERM)
        assert heard == [True]
    finally:
        signal.signal(signal.SIGTERM, before)
