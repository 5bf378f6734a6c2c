from pathlib import Path

import pytest

from components.capability_pass import capability_pass
from ling_flow.data.tokenizer import Tokenizer
from ling_flow.errors import UserError
from ling_flow.model.hf import load_pretrained
from tests.components.steps import micro_corpus

CONFIG = {
    "tasks": [{"name": "chain_sum", "difficulties": [1]}],
    "problems": 40,
    "steps": 150,
    "examples_per_batch": 8,
    "learning_rate": 1e-2,
    "switch_prompts": 8,
    "max_new_tokens": 40,
}


def test_learns_the_switch_and_leaves_a_whole_model(base: str, corpus: str, tmp_path: Path) -> None:
    outcome = capability_pass(CONFIG, root=tmp_path, base=base, corpus=corpus)
    assert outcome.result.thinking_switch_obeyed > 0.5
    assert outcome.result.training_loss < 3
    assert 0 <= outcome.result.exact_match_on <= 1
    made = outcome.outputs["model"]
    network = load_pretrained(made)
    assert network.config.vocab_size >= Tokenizer.load(made).vocab_size
    assert outcome.manifest.outputs["model"].contract["tokenizer"] == Tokenizer.load(made).digest

    again = capability_pass(CONFIG, root=tmp_path / "again", base=base, corpus=corpus)
    assert again.result == outcome.result
    weights = "model.safetensors"
    assert (again.outputs["model"] / weights).read_bytes() == (made / weights).read_bytes()


def test_answers_that_do_not_fit_are_refused_before_it_trains(base: str, corpus: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"max_new_tokens: 5000 do not fit .* give at most \d+"):
        capability_pass({**CONFIG, "max_new_tokens": 5000, "steps": 10**6}, root=tmp_path, base=base, corpus=corpus)


def test_another_corpus_tokenizer_is_refused(base: str, tmp_path: Path) -> None:
    other = micro_corpus({"seed": 1}, root=tmp_path).refs["corpus"]
    with pytest.raises(UserError, match=r"tokenizer is .*; give the corpus that the model was trained on"):
        capability_pass(CONFIG, root=tmp_path, base=base, corpus=other)
