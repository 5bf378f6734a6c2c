"""The evaluation as data (`evaluation.json`) and as a page for people (`index.html`, nothing outside it)."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from ling_flow.config import StrictModel

if TYPE_CHECKING:
    from ling_flow.evaluation.tasks import Answer

MODES = {"on": True, "off": False}


class TaskScore(StrictModel):
    """One task at one difficulty."""

    task: str = Field(description="name of the task")
    difficulty: int = Field(description="level; 1 is easiest")
    problems: int = Field(description="held-out problems asked")
    exact_match_on: float = Field(description="share of right answers with thinking, 0 to 1")
    exact_match_off: float = Field(description="share of right answers without, 0 to 1")
    chance: float = Field(description="share of right answers of one who always gives the most common answer, 0 to 1")


class Sample(StrictModel):
    """One completion, to be read."""

    task: str
    difficulty: int
    thinking: bool
    question: str
    expected: str
    completion: str
    correct: bool


class Evaluation(StrictModel):
    """What `evaluation.json` holds."""

    problems: int = Field(description="held-out problems, each asked with thinking and without, greedily")
    exact_match_thinking_on: float = Field(description="share of right answers with thinking, 0 to 1")
    exact_match_thinking_off: float = Field(description="share of right answers without, 0 to 1")
    exact_match_easiest: float = Field(description="share of right answers to the easiest problems, both modes, 0 to 1")
    chance_easiest: float = Field(description="the same of always giving each task's most common answer, 0 to 1")
    well_formed: float = Field(
        description="share of answers that stop, keep to the mode asked for, and can be read, 0 to 1"
    )
    thinking_switch_obeyed: float = Field(
        description="share of answers with a thinking block exactly where asked for, 0 to 1"
    )
    validation_loss: float = Field(description="mean cross-entropy over the sources' validation parts, nats per token")
    validation_loss_by_source: dict[str, float] = Field(description="cross-entropy by source, nats per token")
    tasks: list[TaskScore] = Field(description="exact match by task and difficulty")
    samples: list[Sample] = Field(description="some completions")

    def metrics(self) -> dict[str, float]:
        """Every number under a flat name, for gates and trackers: `exact_match_on/chain_sum/1`."""
        flat = {name: float(value) for name, value in self.model_dump().items() if isinstance(value, int | float)}
        flat |= {f"validation_loss/{source}": loss for source, loss in self.validation_loss_by_source.items()}
        for score in self.tasks:
            where = f"{score.task}/{score.difficulty}"
            flat |= {
                f"exact_match_on/{where}": score.exact_match_on,
                f"exact_match_off/{where}": score.exact_match_off,
                f"chance/{where}": score.chance,
            }
        return flat


def evaluation_of(
    answers: Sequence[Answer],
    validation_loss: float,
    validation_loss_by_source: Mapping[str, float],
    samples_per_task: int = 1,
) -> Evaluation:
    """Sum up answers to problems that were each asked in both modes."""
    from ling_flow.evaluation.tasks import chance, exact_match, share, switch_obeyed

    by_mode = {name: [a for a in answers if a.question.thinking is thinking] for name, thinking in MODES.items()}
    levels = sorted({(a.question.problem.task, a.question.problem.difficulty) for a in answers})
    scores, samples = [], []
    for task, difficulty in levels:
        here = {
            name: [a for a in mode if (a.question.problem.task, a.question.problem.difficulty) == (task, difficulty)]
            for name, mode in by_mode.items()
        }
        scores.append(
            TaskScore(
                task=task,
                difficulty=difficulty,
                problems=len(here["on"]),
                exact_match_on=exact_match(here["on"]),
                exact_match_off=exact_match(here["off"]),
                chance=chance([a.question.problem for a in here["on"]]),
            )
        )
        samples += [_sample(a) for mode in here.values() for a in mode[:samples_per_task]]
    lowest = min(difficulty for _, difficulty in levels)
    easiest = [a for a in answers if a.question.problem.difficulty == lowest]
    return Evaluation(
        problems=len(by_mode["on"]),
        exact_match_thinking_on=exact_match(by_mode["on"]),
        exact_match_thinking_off=exact_match(by_mode["off"]),
        exact_match_easiest=exact_match(easiest),
        chance_easiest=chance([a.question.problem for a in easiest if a.question.thinking]),
        well_formed=share(answers, lambda grade: grade.well_formed),
        thinking_switch_obeyed=switch_obeyed(answers),
        validation_loss=validation_loss,
        validation_loss_by_source=dict(validation_loss_by_source),
        tasks=scores,
        samples=samples,
    )


def _sample(answer: Answer) -> Sample:
    problem = answer.question.problem
    return Sample(
        task=problem.task,
        difficulty=problem.difficulty,
        thinking=answer.question.thinking,
        question=problem.question,
        expected=problem.answer,
        completion=answer.text,
        correct=answer.grade.correct,
    )


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { margin: 0; white-space: pre-wrap; font-size: 13px }
img { max-width: 100% }
"""


def html_page(evaluation: Evaluation, title: str) -> str:
    """The evaluation as one self-contained page; everything a model wrote is escaped."""
    numbers = {
        "exact match, thinking on": evaluation.exact_match_thinking_on,
        "exact match, thinking off": evaluation.exact_match_thinking_off,
        "exact match, easiest level": evaluation.exact_match_easiest,
        "chance, easiest level": evaluation.chance_easiest,
        "well formed": evaluation.well_formed,
        "thinking switch obeyed": evaluation.thinking_switch_obeyed,
        "validation loss, nats per token": evaluation.validation_loss,
    }
    scores = [
        (s.task, s.difficulty, s.problems, f"{s.exact_match_on:.3f}", f"{s.exact_match_off:.3f}", f"{s.chance:.3f}")
        for s in evaluation.tasks
    ]
    samples = [
        (
            s.task,
            s.difficulty,
            "on" if s.thinking else "off",
            s.question,
            s.expected,
            s.completion,
            "yes" if s.correct else "no",
        )
        for s in evaluation.samples
    ]
    return "".join(
        [
            f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>",
            f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>",
            f"<p>{evaluation.problems} held-out problems, each asked with thinking on and off, decoded greedily. "
            "Chance: always giving the task's most common answer.</p>",
            _table(("", ""), [(name, f"{value:.3f}") for name, value in numbers.items()]),
            "<h2>By task and difficulty</h2>",
            f"<img alt='exact match by task' src='data:image/png;base64,{_plot(evaluation)}'>",
            _table(("task", "difficulty", "problems", "thinking on", "thinking off", "chance"), scores),
            "<h2>Validation loss by source, nats per token</h2>",
            _table(
                ("source", "loss"),
                [(name, f"{loss:.4f}") for name, loss in evaluation.validation_loss_by_source.items()],
            ),
            "<h2>Completions</h2>",
            _table(("task", "difficulty", "thinking", "question", "expected", "completion", "right"), samples),
            "</body></html>\n",
        ]
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    text = html.escape(str(value))
    return f"<td><pre>{text}</pre></td>" if "\n" in text else f"<td>{text}</td>"


def _plot(evaluation: Evaluation) -> str:
    """Bars of exact match by task and difficulty, as base64 PNG."""
    from matplotlib.figure import Figure

    scores = evaluation.tasks
    figure = Figure(figsize=(8, 0.5 * len(scores) + 1.5), layout="constrained")
    axes = figure.subplots()
    rows = range(len(scores))
    axes.barh(
        [row - 0.2 for row in rows], [s.exact_match_on for s in scores], 0.4, label="thinking on", color="#3b6ea5"
    )
    axes.barh(
        [row + 0.2 for row in rows], [s.exact_match_off for s in scores], 0.4, label="thinking off", color="#e0a458"
    )
    axes.scatter([s.chance for s in scores], rows, marker="|", s=300, color="black", label="chance", zorder=3)
    axes.set_yticks(rows, [f"{s.task} {s.difficulty}" for s in scores])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of right answers")
    axes.legend(loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
