"""Designs, identities and records of trials."""

import json
import math

import pytest
from pydantic import ValidationError

from ling_flow.errors import UserError
from ling_flow.model.flops import training_flops_per_token
from ling_flow.model.presets import model_preset
from ling_flow.scaling.design import Rung, Sweep, SweepDesign, finished_trial, plan_trials, scaled_model
from ling_flow.training.settings import OptimizerSettings

MIXTURE = {"a": 1.0}
BASE = model_preset("tiny").model_copy(
    update={"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32}
)
OPTIMIZER = OptimizerSettings(learning_rate=1.0)


def design(**changes) -> SweepDesign:
    fields = {
        "rungs": (Rung(hidden_size=32, compute_flops=3e10), Rung(hidden_size=64, compute_flops=1e11)),
        "learning_rates": (2e-3, 4e-3, 8e-3),
        "batch_tokens": (512, 1024, 2048),
        "sequence_length": 128,
        "warmup_tokens": 4096,
        "validation_tokens": 1024,
    }
    return SweepDesign(**{**fields, **changes})


def plan(**changes):
    return plan_trials(BASE, design(**changes), OPTIMIZER, 1e-3, MIXTURE, 0)


def test_each_rung_runs_half_of_the_grid_and_meets_every_value():
    trials = plan()
    by_width = {width: [trial for trial in trials if trial.model.hidden_size == width] for width in (32, 64)}
    assert [len(by_width[width]) for width in (32, 64)] == [5, 4]
    cells = {(trial.optimizer.learning_rate, trial.batch_tokens) for trial in trials}
    assert len(cells) == 9, "the two rungs take complementary halves"
    for mine in by_width.values():
        assert {trial.optimizer.learning_rate for trial in mine} == {2e-3, 4e-3, 8e-3}
        assert {trial.batch_tokens for trial in mine} == {512, 1024, 2048}


def test_tokens_follow_from_the_compute_budget():
    for trial in plan():
        budget = {32: 3e10, 64: 1e11}[trial.model.hidden_size]
        assert trial.compute_flops == pytest.approx(budget, rel=0.04)
        assert trial.model_flops_per_token == training_flops_per_token(trial.model, 128).non_embedding
        assert [round(step / trial.steps, 1) for step in trial.reading_steps] == pytest.approx([0.25, 0.5, 1], abs=0.06)
        assert trial.warmup_steps == 4096 // trial.batch_tokens


@pytest.mark.parametrize("preset", ["tiny", "small", "mini", "flash"])
def test_width_is_the_only_dial(preset):
    base = model_preset(preset)
    half = scaled_model(base, base.hidden_size // 2)
    ratio = half.hidden_size / base.hidden_size
    assert half.num_attention_heads == base.num_attention_heads * ratio
    assert half.moe_intermediate_size == pytest.approx(base.moe_intermediate_size * ratio, abs=4)
    same = ("head_dim", "num_hidden_layers", "num_experts", "num_key_value_heads", "vocab_size")
    assert all(getattr(half, name) == getattr(base, name) for name in same)


def test_widths_that_give_whole_heads_are_taken():
    # 224 / 28 = 8 elements a head: in floating point 232 / 224 · 28 is not 29.
    base = BASE.model_copy(update={"hidden_size": 224, "num_attention_heads": 28, "num_key_value_heads": 1})
    assert scaled_model(base, 232).num_attention_heads == 29


def test_near_learning_rates_have_names_of_their_own():
    trials = plan(learning_rates=(1e-3, 1.02e-3, 1.04e-3))
    assert len({trial.name for trial in trials}) == len(trials)


def test_impossible_designs_are_refused_by_field():
    with pytest.raises(UserError, match=r"rungs\.hidden_size: 40 .* multiple of 32"):
        scaled_model(BASE, 40)
    with pytest.raises(UserError, match=r"rungs\.0\.compute_flops"):
        plan(rungs=(Rung(hidden_size=32, compute_flops=1e9),), warmup_tokens=0)
    with pytest.raises(UserError, match=r"warmup_tokens: 10,000,000 are \d+ steps of .*rung 0 is read after"):
        plan(warmup_tokens=10_000_000)
    for changes in (
        {"learning_rates": (4e-3, 2e-3)},
        {"read_at": (0.5,)},
        {"read_at": ()},
        {"batch_tokens": (500, 1000)},
    ):
        with pytest.raises(ValidationError, match=next(iter(changes))):
            design(**changes)


def test_fingerprint_is_of_spec_and_corpus():
    first, second = plan()[:2]
    assert first.fingerprint("c1") == plan()[0].fingerprint("c1")
    assert len({first.fingerprint("c1"), second.fingerprint("c1"), first.fingerprint("c2")}) == 3
    other_seed = first.model_copy(update={"seed": 1})
    assert other_seed.fingerprint("c1") != first.fingerprint("c1")


def test_only_whole_records_count_as_finished(tiny_sweep, tmp_path):
    trial = tiny_sweep[0].model_copy(update={"fingerprint": "f00"})
    assert finished_trial(tmp_path, "f00") is None
    trial.save(tmp_path)
    assert finished_trial(tmp_path, "f00") == trial
    assert [path.name for path in tmp_path.iterdir()] == ["f00.json"]
    path = tmp_path / "f00.json"
    path.write_text(path.read_text()[:50])
    assert finished_trial(tmp_path, "f00") is None
    (tmp_path / "bar.json").write_text(trial.model_dump_json())
    assert finished_trial(tmp_path, "bar") is None, "a record under another trial's name"


def test_sweep_survives_saving_and_damage_is_named(tiny_sweep, tmp_path):
    Sweep(trials=tuple(tiny_sweep)).save(tmp_path)
    assert Sweep.load(tmp_path).trials == tuple(tiny_sweep)
    assert math.isclose(Sweep.load(tmp_path).trials[0].loss, tiny_sweep[0].loss)
    data = json.loads((tmp_path / "trials.json").read_text())
    del data["trials"][0]["learning_rate"]
    (tmp_path / "trials.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"trials\.json\.trials\.0\.learning_rate"):
        Sweep.load(tmp_path)
