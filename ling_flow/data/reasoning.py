"""Procedural reasoning problems from reasoning-gym, with worked steps of our own.

reasoning-gym draws the problem and knows the answer; we pose it in few tokens (`47 + 38 = ?`) and write the steps
that lead to the answer, each small enough for a small model (a term of a sum is added digit by digit, largest place
first). Every answer is held to the data set's own scorer when it is made.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from pydantic import Field, model_validator

from ling_flow.config import StrictModel
from ling_flow.errors import UserError

Split = Literal["train", "held_out"]
HELD_OUT_ONE_IN = 10
PATIENCE = 2000
"""Draws without a new held-out question after which a task counts as exhausted."""


@dataclass(frozen=True)
class Problem:
    """A question that ends in `= ?`, the steps that solve it (one line each), and the answer."""

    question: str
    steps: list[str]
    answer: str
    task: str
    difficulty: int


@dataclass(frozen=True)
class Family:
    """How one reasoning-gym data set is used."""

    levels: tuple[dict[str, int], ...]
    """reasoning-gym options of difficulty 1, 2, …"""
    pose: Callable[[dict[str, Any]], tuple[str, list[str], str]]
    """Metadata of an entry → question, steps, answer."""
    scorer_form: Callable[[str], str] = str
    """Our answer in the form the data set's scorer expects."""


def _chain_sum(metadata: dict[str, Any]) -> tuple[str, list[str], str]:
    """`47 + 38 = ?` → `47 + 30 = 77`, `77 + 8 = 85`."""
    expression: str = metadata["expression"]
    first, *rest = expression.split(" ")
    total = int(first)
    steps = []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        places = [int(digit) * 10**place for place, digit in zip(range(len(term) - 1, -1, -1), term, strict=True)]
        for part in [value for value in places if value] or [0]:
            after = total + part if sign == "+" else total - part
            steps.append(f"{total} {sign} {part} = {after}")
            total = after
    return f"{expression} = ?", steps, str(total)


def _number_sorting(metadata: dict[str, Any]) -> tuple[str, list[str], str]:
    """`sort up 42, 7, 93 = ?` → `7 of 42, 7, 93`, `42 of 42, 93`, `93 of 93`: what is taken, and from what."""
    left = [int(float(number)) for number in metadata["original_numbers"]]
    up = metadata["direction"] == "ascending"
    question = f"sort {'up' if up else 'down'} {_listed(left)} = ?"
    taken, steps = [], []
    while left:
        number = min(left) if up else max(left)
        steps.append(f"{number} of {_listed(left)}")
        left.remove(number)
        taken.append(number)
    return question, steps, _listed(taken)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _count_bits(metadata: dict[str, Any]) -> tuple[str, list[str], str]:
    """`bits 13 = ?` → `13 = 2 * 6 + 1 : 1`, `6 = 2 * 3 + 0 : 1`, …: halving, and the bits counted so far."""
    number, count = metadata["number"], 0
    question, steps = f"bits {number} = ?", []
    while number:
        half, bit = divmod(number, 2)
        count += bit
        steps.append(f"{number} = 2 * {half} + {bit} : {count}")
        number = half
    return question, steps, str(count)


def _gcd(metadata: dict[str, Any]) -> tuple[str, list[str], str]:
    """`gcd 48, 36 = ?` → `48 = 1 * 36 + 12`, `36 = 3 * 12 + 0`: Euclid's divisions."""
    a, b = metadata["numbers"]
    question, steps = f"gcd {a}, {b} = ?", []
    while b:
        quotient, remainder = divmod(a, b)
        steps.append(f"{a} = {quotient} * {b} + {remainder}")
        a, b = b, remainder
    return question, steps, str(a)


def _sum_level(terms: int, digits: tuple[int, int]) -> dict[str, int]:
    return {"min_terms": terms, "max_terms": terms, "min_digits": digits[0], "max_digits": digits[1]}


def _sorting_level(count: int) -> dict[str, int]:
    return {"min_numbers": count, "max_numbers": count, "max_decimals": 0, "min_value": 0, "max_value": 99}


FAMILIES: dict[str, Family] = {
    "chain_sum": Family(
        levels=(
            _sum_level(2, (1, 1)),
            _sum_level(2, (2, 2)),
            _sum_level(3, (1, 2)),
            _sum_level(4, (1, 2)),
            _sum_level(5, (2, 2)),
            _sum_level(3, (3, 3)),
        ),
        pose=_chain_sum,
    ),
    "number_sorting": Family(
        levels=tuple(_sorting_level(count) for count in (3, 4, 5, 7, 10)),
        pose=_number_sorting,
        scorer_form=lambda answer: str(answer.split(", ")),
    ),
    "count_bits": Family(
        levels=tuple({"min_n": low, "max_n": 4 * low - 1} for low in (8, 32, 128, 512, 2048)),
        pose=_count_bits,
    ),
    "gcd": Family(
        levels=tuple({"min_value": 2, "max_value": high} for high in (20, 50, 100, 1000)),
        pose=_gcd,
    ),
}


class TaskSpec(StrictModel):
    """One family of problems at some difficulties."""

    name: Literal["chain_sum", "number_sorting", "count_bits", "gcd"] = Field(description="family of problems")
    difficulties: tuple[int, ...] = Field(
        default=(1,), min_length=1, description="difficulty levels, drawn equally often; 1 is easiest"
    )
    weight: float = Field(default=1.0, gt=0, description="how often this family is drawn, relative to the others")

    @model_validator(mode="after")
    def _levels_exist(self) -> TaskSpec:
        highest = len(FAMILIES[self.name].levels)
        for level in self.difficulties:
            if not 1 <= level <= highest:
                raise ValueError(f"difficulty {level} of {self.name} does not exist; it has 1 to {highest}")
        return self


def is_held_out(problem: Problem) -> bool:
    """Whether a problem is kept for evaluation, by its family and signed numbers alone (SHA-256 mod 10).

    Their order plays no part: `gcd 12, 18` and `gcd 18, 12`, or `2 + 5 - 3` and `5 - 3 + 2`, are on one side.
    """
    numbers = sorted(int(sign + digits) for sign, digits in re.findall(r"(-?) ?(\d+)", problem.question))
    # Of the ways to write a key, one by which the few held-out problems of the easiest levels have varied answers.
    key = f"{problem.task}: {', '.join(map(str, numbers))}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()) % HELD_OUT_ONE_IN == 0


def problems(specs: Iterable[TaskSpec], count: int, seed: int, split: Split = "train") -> list[Problem]:
    """`count` problems of the mixture `specs`; the same arguments always give the same list.

    `train` never holds a held-out problem, in any order of its numbers, and may repeat itself; `held_out` holds only
    those, each question once. A task whose different held-out questions run out (one-digit sums have about twenty)
    leaves its place to the others.

    Raises:
        UserError: fewer than `count` different held-out problems exist.
    """
    found = list(islice(problem_stream(specs, str(seed), split), count))
    if len(found) < count:
        raise UserError(
            f"tasks: only {len(found)} different held-out problems exist, {count} were asked for; "
            "ask for fewer or add difficulties"
        )
    return found


def problem_stream(specs: Iterable[TaskSpec], seed: str, split: Split) -> Iterator[Problem]:
    """The problems behind `problems`: endless for `train`, until nothing new turns up for `held_out`."""
    weights: dict[tuple[str, int], float] = {}
    for spec in specs:
        for level in spec.difficulties:
            weights[spec.name, level] = weights.get((spec.name, level), 0.0) + spec.weight / len(spec.difficulties)
    open_tasks = {task: (weight, _draws(*task, f"{seed}/{split}")) for task, weight in weights.items()}
    if not open_tasks:
        raise UserError("tasks: must name at least one task")
    rng = random.Random(f"{seed}/{split}/mixture")
    seen: set[str] = set()
    while open_tasks:
        tasks = list(open_tasks)
        task = rng.choices(tasks, [open_tasks[key][0] for key in tasks])[0]
        draws = open_tasks[task][1]
        if split == "train":
            yield next(problem for problem in draws if not is_held_out(problem))
            continue
        for problem in islice(draws, PATIENCE):
            if problem.question not in seen and is_held_out(problem):
                seen.add(problem.question)
                yield problem
                break
        else:
            del open_tasks[task]


def _draws(name: str, level: int, seed: str) -> Iterator[Problem]:
    """Endless problems of one task and level, verified by reasoning-gym's scorer."""
    family = FAMILIES[name]
    # reasoning-gym seeds item i with seed + i, so neighbouring seeds would share problems: spread them by a hash.
    spread = int.from_bytes(hashlib.sha256(f"{seed}/{name}/{level}".encode()).digest()[:7])
    dataset = _gym().create_dataset(name, seed=spread, **family.levels[level - 1])
    index = 0
    while True:
        entry = dataset[index]
        index += 1
        question, steps, answer = family.pose(entry["metadata"])
        if dataset.score_answer(family.scorer_form(answer), entry) != 1.0:
            raise AssertionError(f"{name}: reasoning-gym does not accept {answer!r} for {question!r}")
        yield Problem(question, steps, answer, name, level)


@functools.cache
def _gym() -> Any:
    import reasoning_gym

    return reasoning_gym


def score(problem: Problem, answer_text: str) -> float:
    """1.0 if `answer_text` is the answer (a whole number, or numbers separated by commas), else 0.0.

    Stricter than reasoning-gym's scorers, which give part marks to text that contains the answer and let sorted numbers
    be off by one.
    """
    numbers = _numbers(answer_text)
    return float(numbers is not None and numbers == _numbers(problem.answer))


def _numbers(text: str) -> list[int] | None:
    text = text.strip()
    if not re.fullmatch(r"[+-]?[0-9]{1,1000}( ?, ?[+-]?[0-9]{1,1000})*", text):  # Python reads no longer ones
        return None
    return [int(number) for number in text.split(",")]


def plain_text(problem: Problem) -> str:
    """The problem with its answer in place: `47 + 38 = 85`."""
    return problem.question.removesuffix("?") + problem.answer


def worked_text(problem: Problem) -> str:
    """Question, steps and answer on lines of their own."""
    return "\n".join([problem.question, *problem.steps, f"Answer: {problem.answer}"])
