from pathlib import Path

import pytest

from components.preference_pass import preference_pass
from ling_flow.data.tokenizer import Tokenizer
from ling_flow.model.hf import load_pretrained
from tests.components.steps import micro_base

CONFIG = {
    "tasks": [{"name": "chain_sum", "difficulties": [1]}],
    "lpo": {
        "rollouts": 3,
        "questions_per_rollout": 16,  # few groups of a model that has learnt nothing teach anything
        "group_size": 4,
        "groups_per_minibatch": 2,
        "max_new_tokens": 12,
        "learning_rate": 1e-2,
    },
    "held_out_problems": 6,
    "held_out_samples": 2,
}


def test_compares_before_with_after_and_leaves_a_whole_model(base: str, corpus: str, tmp_path: Path) -> None:
    outcome = preference_pass(CONFIG, root=tmp_path, base=base, corpus=corpus)
    result = outcome.result
    assert result.reward_gain == pytest.approx(result.reward_after - result.reward_before)
    assert result.reward_standard_error > 0
    assert 1 <= result.response_tokens_after <= 12
    made = outcome.outputs["model"]
    load_pretrained(made)
    assert outcome.manifest.outputs["model"].contract["tokenizer"] == Tokenizer.load(made).digest
    again = preference_pass(CONFIG, root=tmp_path / "again", base=base, corpus=corpus)
    assert again.result == result


def test_bfloat16_weights_are_trained_in_float32(corpus: str, tmp_path: Path) -> None:
    base = micro_base({"bfloat16": True}, root=tmp_path, corpus=corpus).refs["model"]
    made = preference_pass(CONFIG, root=tmp_path, base=base, corpus=corpus).outputs["model"]
    assert load_pretrained(made).config.torch_dtype == "float32"


def test_a_pass_that_learns_nothing_shows_no_gain(base: str, corpus: str, tmp_path: Path) -> None:
    # The same seeds before and after: with weights that did not move, every answer is the same.
    still = {**CONFIG, "lpo": {**CONFIG["lpo"], "learning_rate": 1e-30}}
    result = preference_pass(still, root=tmp_path, base=base, corpus=corpus).result
    assert result.reward_gain == 0
    assert result.reward_standard_error == 0
