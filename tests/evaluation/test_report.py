import pytest

from ling_flow.data.reasoning import Problem
from ling_flow.evaluation.gate import Gate, judge
from ling_flow.evaluation.graders import grade
from ling_flow.evaluation.report import Evaluation, evaluation_of, html_page
from ling_flow.evaluation.tasks import Answer, Question


def answer(text: str, thinking: bool, task: str = "chain_sum", difficulty: int = 1, expected: str = "7") -> Answer:
    problem = Problem(question="4 + 3 = ?", steps=[], answer=expected, task=task, difficulty=difficulty)
    return Answer(
        question=Question(problem, thinking),
        prompt=[1],
        tokens=[1],
        logprobs=[0.0],
        text=text,
        finished=True,
        grade=grade(problem, text, finished=True, thinking=thinking),
    )


THOUGHT = "\n<think>\n4 + 3 = 7\n</think>\n\n"
ANSWERS = [
    answer(THOUGHT + "7", True),
    answer(THOUGHT + "7", True),
    answer(THOUGHT + "8", True, difficulty=2),
    answer("7", False),
    answer("<script>alert(1)</script>", False),
    answer("7", False, difficulty=2),
]


@pytest.fixture
def evaluation() -> Evaluation:
    return evaluation_of(ANSWERS, validation_loss=1.5, validation_loss_by_source={"code": 1.0, "chat": 2.0})


def test_numbers(evaluation: Evaluation) -> None:
    assert evaluation.problems == 3
    assert evaluation.exact_match_thinking_on == pytest.approx(2 / 3)
    assert evaluation.exact_match_thinking_off == pytest.approx(2 / 3)
    assert evaluation.exact_match_easiest == pytest.approx(3 / 4)
    assert evaluation.chance_easiest == 1.0
    assert evaluation.well_formed == pytest.approx(5 / 6)
    assert [(score.difficulty, score.problems, score.exact_match_on) for score in evaluation.tasks] == [
        (1, 2, 1.0),
        (2, 1, 0.0),
    ]


def test_metrics_are_flat_and_what_gates_ask_for(evaluation: Evaluation) -> None:
    metrics = evaluation.metrics()
    assert metrics["validation_loss/chat"] == 2.0
    assert metrics["exact_match_off/chain_sum/2"] == 1.0
    gates = [Gate(metric="well_formed", threshold=0.8), Gate(metric="validation_loss", comparison="<", threshold=1.0)]
    assert [verdict.passed for verdict in judge(gates, metrics)] == [True, False]


def test_the_page_stands_alone_and_escapes_what_the_model_wrote(evaluation: Evaluation) -> None:
    broken = evaluation.samples[0].model_copy(update={"completion": "<script>alert(1)</script>"})
    page = html_page(evaluation.model_copy(update={"samples": [broken]}), "Evaluation of <x>")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "Evaluation of &lt;x&gt;" in page
    assert "http" not in page
    assert "src='data:image/png;base64,iVBOR" in page


def test_reading_back_what_was_written(evaluation: Evaluation) -> None:
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation
