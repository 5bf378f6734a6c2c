import hashlib
import math
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ling_flow.config import parse
from ling_flow.data import reasoning
from ling_flow.data.reasoning import FAMILIES, Problem, TaskSpec, is_held_out, plain_text, problems, score, worked_text
from ling_flow.errors import UserError

EVERY_LEVEL = [
    TaskSpec(name=name, difficulties=tuple(range(1, len(family.levels) + 1))) for name, family in FAMILIES.items()
]


def solve(problem: Problem) -> list[int]:
    """The answer, worked out from the question alone."""
    numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
    if problem.task == "chain_sum":
        return [eval(problem.question.removesuffix("= ?"))]
    if problem.task == "gcd":
        return [math.gcd(*numbers)]
    if problem.task == "count_bits":
        return [bin(numbers[0]).count("1")]
    return sorted(numbers, reverse="down" in problem.question)


@pytest.fixture(scope="module")
def all_problems() -> list[Problem]:
    return problems(EVERY_LEVEL, 2000, seed=0)


def test_answers_are_right_at_every_level(all_problems: list[Problem]) -> None:
    seen = set()
    for problem in all_problems:
        assert [int(number) for number in problem.answer.split(",")] == solve(problem), problem
        assert problem.question.endswith(" = ?")
        assert score(problem, problem.answer) == 1.0
        seen.add((problem.task, problem.difficulty))
    assert seen == {(spec.name, level) for spec in EVERY_LEVEL for level in spec.difficulties}


def test_steps_are_true_and_lead_to_the_answer(all_problems: list[Problem]) -> None:
    for problem in all_problems:
        if problem.task == "number_sorting":
            assert ", ".join(step.split(" of ")[0] for step in problem.steps) == problem.answer
            continue
        for step in problem.steps:
            left, right = step.split(" : ")[0].split(" = ")
            assert eval(left) == eval(right), problem
        if problem.task == "chain_sum":
            assert problem.steps[-1].endswith(f" = {problem.answer}")
            # each step starts from the running total and adds one digit of one term
            for before, after in zip(problem.steps, problem.steps[1:], strict=False):
                assert after.startswith(before.split(" = ")[1] + " ")
            assert all(re.search(r" [+-] \d0* = ", step) for step in problem.steps)
        elif problem.task == "gcd":
            assert problem.steps[-1].endswith(" + 0") and f" * {problem.answer} +" in problem.steps[-1]
        else:
            assert problem.steps[-1].endswith(f" : {problem.answer}")


@pytest.mark.parametrize(("level", "pattern"), [(1, r"\d [+-] \d = \?"), (2, r"\d\d [+-] \d\d = \?")])
def test_first_levels_of_sums(level: int, pattern: str) -> None:
    for problem in problems([TaskSpec(name="chain_sum", difficulties=(level,))], 50, seed=3):
        assert re.fullmatch(pattern, problem.question)


def test_same_arguments_same_problems_and_no_trace_in_global_generators() -> None:
    state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()
    first = problems(EVERY_LEVEL, 60, seed=5)
    assert first == problems(EVERY_LEVEL, 60, seed=5)
    assert first[:20] == problems(EVERY_LEVEL, 20, seed=5)
    assert first != problems(EVERY_LEVEL, 60, seed=6)
    assert random.getstate() == state
    assert np.random.get_state()[1].tolist() == numpy_state


def test_neighbouring_seeds_share_no_stream() -> None:
    spec = [TaskSpec(name="chain_sum", difficulties=(5,))]
    one, other = ({problem.question for problem in problems(spec, 300, seed=seed)} for seed in (1, 2))
    assert not one & other


def test_training_never_holds_a_held_out_question(all_problems: list[Problem]) -> None:
    held_out = problems(EVERY_LEVEL, 200, seed=0, split="held_out")
    assert all(map(is_held_out, held_out))
    assert not any(map(is_held_out, all_problems))
    assert len({problem.question for problem in held_out}) == 200


def test_held_out_rule_is_one_in_ten_of_the_hash() -> None:
    def posed(question: str, task: str = "chain_sum") -> Problem:
        return Problem(question, [], "", task, 1)

    for a in range(200):
        digest = hashlib.sha256(f"chain_sum: {-a}, 7".encode()).hexdigest()
        assert is_held_out(posed(f"7 - {a} = ?")) == (int(digest, 16) % 10 == 0)
    sums = [posed(f"{a} + {b} = ?") for a in range(100) for b in range(100)]
    assert 900 < sum(map(is_held_out, sums)) < 1100


@pytest.mark.parametrize(
    ("task", "questions"),
    [
        ("chain_sum", [f"{a} + {a + 5} - 9 = ?|{a + 5} - 9 + {a} = ?" for a in range(10, 60)]),
        ("gcd", [f"gcd {a}, 12 = ?|gcd 12, {a} = ?" for a in range(13, 63)]),
        ("number_sorting", [f"sort up {a}, 7, 93 = ?|sort down 7, 93, {a} = ?" for a in range(10, 60)]),
    ],
)
def test_the_order_of_the_numbers_does_not_let_a_held_out_problem_in(task: str, questions: list[str]) -> None:
    sides = [{is_held_out(Problem(text, [], "", task, 1)) for text in pair.split("|")} for pair in questions]
    assert all(len(side) == 1 for side in sides) and {True} in sides and {False} in sides


def test_held_out_problems_of_the_easiest_levels_have_varied_answers() -> None:
    for name in FAMILIES:
        answers = Counter(problem.answer for problem in problems([TaskSpec(name=name)], 4, seed=0, split="held_out"))
        assert len(answers) > 1
    gcds = Counter(problem.answer for problem in problems([TaskSpec(name="gcd")], 39, seed=0, split="held_out"))
    assert gcds["1"] < 20


def test_a_task_without_new_held_out_questions_leaves_its_place() -> None:
    both = [TaskSpec(name="chain_sum", difficulties=(1,)), TaskSpec(name="chain_sum", difficulties=(2,))]
    found = problems(both, 300, seed=0, split="held_out")
    assert len({problem.question for problem in found}) == 300
    assert 10 < sum(problem.difficulty == 1 for problem in found) < 40
    with pytest.raises(UserError, match=r"tasks: only \d\d different held-out problems exist, 300 were asked for"):
        problems(both[:1], 300, seed=0, split="held_out")


def test_weights_decide_how_often_a_task_is_drawn() -> None:
    specs = [TaskSpec(name="chain_sum", weight=9), TaskSpec(name="gcd", weight=1)]
    sums = sum(problem.task == "chain_sum" for problem in problems(specs, 500, seed=0))
    assert 420 < sums < 480
    in_parts = [TaskSpec(name="chain_sum", weight=4), *specs[1:], TaskSpec(name="chain_sum", weight=5)]
    assert sum(problem.task == "chain_sum" for problem in problems(in_parts, 500, seed=0)) == sums


def test_a_wrong_answer_of_ours_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(FAMILIES["gcd"], pose=lambda metadata: ("gcd = ?", [], str(metadata["result"] + 1)))
    monkeypatch.setitem(reasoning.FAMILIES, "gcd", wrong)
    with pytest.raises(AssertionError, match="reasoning-gym does not accept"):
        problems([TaskSpec(name="gcd")], 1, seed=0)


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("85", "85", 1.0),
        ("85", " 085 ", 1.0),
        ("85", "85.", 0.0),
        ("85", "the answer is 85", 0.0),
        ("85", "-85", 0.0),
        ("85", "", 0.0),
        ("-3", "-3", 1.0),
        ("7, 42", "7,42", 1.0),
        ("7, 42", "42, 7", 0.0),
        ("7, 42", "7, 41", 0.0),
        ("85", "1" * 5000, 0.0),
    ],
)
def test_score(answer: str, text: str, expected: float) -> None:
    assert score(Problem("= ?", [], answer, "chain_sum", 1), text) == expected


def test_texts() -> None:
    problem = Problem("47 + 38 = ?", ["47 + 30 = 77", "77 + 8 = 85"], "85", "chain_sum", 2)
    assert plain_text(problem) == "47 + 38 = 85"
    assert worked_text(problem) == "47 + 38 = ?\n47 + 30 = 77\n77 + 8 = 85\nAnswer: 85"


def test_unknown_level_is_refused() -> None:
    with pytest.raises(UserError, match="difficulty 9 of gcd does not exist; it has 1 to 4"):
        parse(TaskSpec, {"name": "gcd", "difficulties": [9]}, "tasks")
    with pytest.raises(UserError, match="at least one task"):
        problems([], 1, seed=0)
