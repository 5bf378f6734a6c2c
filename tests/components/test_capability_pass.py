from pathlib import Path

import pytest
import torch

from components.capability_pass import CapabilityPassConfig, capability_pass
from ling_flow.config import parse
from ling_flow.data.tokenizer import Tokenizer
from ling_flow.errors import UserError
from ling_flow.model.hf import load_pretrained
from tests.components.steps import micro_base, micro_corpus

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


def test_bfloat16_weights_are_trained_in_float32(corpus: str, tmp_path: Path) -> None:
    """In bfloat16 most of an optimizer's small steps would round to nothing."""
    base = micro_base({"bfloat16": True}, root=tmp_path, corpus=corpus)
    before = load_pretrained(base.outputs["model"])
    assert before.lm_head.weight.dtype == torch.bfloat16
    config = {**CONFIG, "steps": 2, "warmup_steps": 0, "learning_rate": 1e-6, "max_new_tokens": 4}
    made = capability_pass(config, root=tmp_path, base=base.refs["model"], corpus=corpus).outputs["model"]
    after = load_pretrained(made)
    assert after.config.torch_dtype == "float32"
    moved = after.lm_head.weight != before.lm_head.weight
    assert moved.float().mean() > 0.9


def test_answers_that_do_not_fit_are_refused_before_it_trains(base: str, corpus: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"max_new_tokens: 5000 do not fit .* give at most \d+"):
        capability_pass({**CONFIG, "max_new_tokens": 5000, "steps": 10**6}, root=tmp_path, base=base, corpus=corpus)


def test_another_corpus_tokenizer_is_refused(base: str, tmp_path: Path) -> None:
    other = micro_corpus({"seed": 1}, root=tmp_path).refs["corpus"]
    with pytest.raises(UserError, match=r"tokenizer is .*; give the corpus that the model was trained on"):
        capability_pass(CONFIG, root=tmp_path, base=base, corpus=other)


def test_a_peak_that_is_never_reached_is_refused() -> None:
    with pytest.raises(UserError, match=r"^capability_pass: warmup_steps must be less than steps \(20\), got 20$"):
        parse(CapabilityPassConfig, {"steps": 20}, "capability_pass")
