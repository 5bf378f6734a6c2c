import json
from pathlib import Path

from components.evaluate import evaluate
from ling_flow.config import parse
from ling_flow.evaluation.report import Evaluation
from tests.components.steps import micro_base

CONFIG = {
    "tasks": [{"name": "chain_sum", "difficulties": [1, 2]}],
    "problems": 12,
    "max_new_tokens": 12,
    "validation_sequence_length": 32,
    "validation_tokens": 200,
}


def test_writes_metrics_and_a_page(base: str, corpus: str, tmp_path: Path) -> None:
    outcome = evaluate(CONFIG, root=tmp_path, model=base, corpus=corpus)
    result = outcome.result
    text = (outcome.outputs["metrics"] / "evaluation.json").read_text()
    found = parse(Evaluation, text, "evaluation.json")
    assert found.problems == result.problems == 12
    assert found.validation_loss_by_source["chat"] == result.validation_loss
    assert 4 < result.validation_loss < 7  # a model that learnt nothing: about log 300
    assert {(score.task, score.difficulty) for score in found.tasks} == {("chain_sum", 1), ("chain_sum", 2)}
    assert result.chance_easiest > 0
    assert set(json.loads(text)) == set(Evaluation.model_fields)
    page = (outcome.outputs["report"] / "index.html").read_text()
    assert "chain_sum" in page
    assert "data:image/png;base64," in page


def test_what_was_asked_is_told_whoever_answers(base: str, corpus: str, tmp_path: Path) -> None:
    other = micro_base({"bfloat16": True}, root=tmp_path, corpus=corpus).refs["model"]

    def asked(model: str, **changes: int) -> str:
        config = {**CONFIG, "problems": 2, "max_new_tokens": 2, **changes}
        outcome = evaluate(config, root=tmp_path, model=model, corpus=corpus)
        return str(outcome.manifest.outputs["metrics"].contract["asked"])

    assert asked(base) == asked(other)
    assert asked(base, seed=2) != asked(base)
