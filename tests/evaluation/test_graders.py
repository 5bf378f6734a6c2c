import pytest

from ling_flow.data.reasoning import Problem
from ling_flow.evaluation.graders import grade, split_completion

PROBLEM = Problem(question="4 + 3 = ?", steps=["4 + 3 = 7"], answer="7", task="chain_sum", difficulty=1)
THOUGHT = "\n<think>\n4 + 3 = 7\n</think>\n\n"


@pytest.mark.parametrize(
    ("text", "thinking", "obeyed", "answer"),
    [
        (THOUGHT + "7", True, True, "7"),
        ("7", False, True, "7"),
        ("7", True, False, "7"),
        (THOUGHT + "7", False, False, THOUGHT.strip() + "\n\n7"),
        ("\n<think>\n4 + 3", True, False, "\n<think>\n4 + 3".strip()),
        ("\n<think>\na\n</think>\n7", True, False, "7"),  # one newline too few
        ("\n<think>\na\n</think>\n\nb\n</think>\n\n7", True, False, "7"),
        ("7</think>", False, False, "7</think>"),
        ("\n<think>\n\n</think>\n\n7", True, False, "7"),
        ("\n<think>\n \n\n</think>\n\n7", True, False, "7"),
    ],
)
def test_the_block_must_be_what_the_mode_asks(text: str, thinking: bool, obeyed: bool, answer: str) -> None:
    assert split_completion(text, thinking) == (obeyed, answer)


def test_right_answer() -> None:
    found = grade(PROBLEM, THOUGHT + "7", finished=True, thinking=True)
    assert (found.correct, found.obeyed, found.well_formed) == (True, True, True)


def test_wrong_answer_can_be_well_formed() -> None:
    found = grade(PROBLEM, "8", finished=True, thinking=False)
    assert (found.correct, found.obeyed, found.well_formed) == (False, True, True)


def test_an_answer_that_did_not_stop_is_neither_right_nor_well_formed() -> None:
    found = grade(PROBLEM, "7", finished=False, thinking=False)
    assert (found.correct, found.obeyed, found.well_formed) == (False, True, False)


@pytest.mark.parametrize("text", ["", "seven", "7 or 8", "4 + 3 = 7"])
def test_what_is_no_number_is_not_well_formed(text: str) -> None:
    assert not grade(PROBLEM, text, finished=True, thinking=False).well_formed


def test_right_answer_in_the_wrong_mode_is_right_but_not_well_formed() -> None:
    found = grade(PROBLEM, "7", finished=True, thinking=True)
    assert (found.correct, found.obeyed, found.well_formed) == (True, False, False)


def test_an_empty_thinking_block_is_no_thinking() -> None:
    found = grade(PROBLEM, "\n<think>\n\n</think>\n\n7", finished=True, thinking=True)
    assert (found.correct, found.obeyed, found.well_formed) == (True, False, False)
