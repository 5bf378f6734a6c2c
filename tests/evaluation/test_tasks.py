import pytest

from ling_flow.data.reasoning import Problem
from ling_flow.errors import UserError
from ling_flow.evaluation.tasks import ask, both_modes, chance
from tests.alignment.micro import easy_problems, model, tokenizer


def problem(answer: str, task: str = "chain_sum") -> Problem:
    return Problem(question=f"{answer} + 0 = ?", steps=[], answer=answer, task=task, difficulty=1)


def test_chance_is_the_most_common_answer_of_each_task() -> None:
    sums = [problem(answer) for answer in ("3", "3", "3", "5")]
    divisors = [problem(answer, task="gcd") for answer in ("1", "1", "2", "4")]
    assert chance(sums) == 0.75
    assert chance(sums + divisors) == (3 + 2) / 8


def test_every_problem_is_asked_in_both_modes() -> None:
    questions = both_modes([problem("1"), problem("2")])
    assert [(question.problem.answer, question.thinking) for question in questions] == [
        ("1", True), ("2", True), ("1", False), ("2", False),
    ]  # fmt: skip


def test_answers_come_in_the_order_of_the_questions_whatever_the_batches() -> None:
    questions = both_modes(easy_problems(5))[::-1]
    told: list[tuple[int, int]] = []

    def greedy(size: int):
        return ask(
            model(), tokenizer(), questions, max_new_tokens=8, temperature=0.0, seed=0, sequences_per_batch=size,
            on_progress=lambda done, total: told.append((done, total)),
        )  # fmt: skip

    one, other = greedy(4), greedy(10)
    assert [answer.question for answer in one] == questions
    assert [answer.tokens for answer in one] == [answer.tokens for answer in other]
    assert told == [(4, 10), (8, 10), (10, 10), (10, 10)]
    for answer in one:
        asked = tokenizer().decode(answer.prompt)
        assert f"detailed thinking {'on' if answer.question.thinking else 'off'}<|role_end|>" in asked
        assert answer.question.problem.question in asked


def test_an_answer_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_new_tokens: 500 do not fit the model.s context of \d+ tokens beside"):
        ask(model(), tokenizer(), both_modes(easy_problems(1)), max_new_tokens=500, temperature=0.0, seed=0)
