"""Judge one completion: is the answer right, is the thinking block what was asked for, is the whole well formed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ling_flow.data.reasoning import Problem, score

_TAG = re.compile(r"</?think>")
_NUMBERS = re.compile(r"[+-]?[0-9]+( ?, ?[+-]?[0-9]+)*")
_WITH_THINKING = re.compile(r"\n<think>\n(.*?)\n</think>\n\n(.*)", re.DOTALL)


@dataclass(frozen=True)
class Grade:
    """What one completion is worth.

    Attributes:
        correct: ended by itself, and the task's own scorer gives the answer full marks.
        obeyed: thinking asked for: exactly one well-formed `<think>` block with a thought in it, then an answer; else:
            no trace of one.
        well_formed: ended by itself, obeyed, and what stands for the answer is numbers, as all tasks ask.
        answer: the text after the thinking.
    """

    correct: bool
    obeyed: bool
    well_formed: bool
    answer: str


def split_completion(text: str, thinking: bool) -> tuple[bool, str]:
    """(whether the thinking block is as the mode asks, the answer). What cannot be split is all answer."""
    tags = len(_TAG.findall(text))
    if not thinking:
        return tags == 0, text.strip()
    match = _WITH_THINKING.fullmatch(text)
    if match is None or tags != 2:
        return False, text.rpartition("</think>")[2].strip()
    return match[1].strip() != "", match[2].strip()


def grade(problem: Problem, text: str, finished: bool, thinking: bool) -> Grade:
    """Judge `text`, the completion without its stop token; `finished` says whether there was one."""
    obeyed, answer = split_completion(text, thinking)
    return Grade(
        correct=finished and score(problem, answer) == 1.0,
        obeyed=obeyed,
        well_formed=finished and obeyed and _NUMBERS.fullmatch(answer) is not None,
        answer=answer,
    )
