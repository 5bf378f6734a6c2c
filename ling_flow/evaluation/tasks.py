"""Ask a model problems and judge what it answers; exact match beside the chance of guessing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ling_flow.data.chat import encode_prompt
from ling_flow.data.reasoning import Problem
from ling_flow.data.tokenizer import Tokenizer
from ling_flow.errors import UserError
from ling_flow.evaluation.graders import Grade, grade
from ling_flow.generation.engine import generate
from ling_flow.model.transformer import BailingMoeV2ForCausalLM


@dataclass(frozen=True)
class Question:
    """A problem, and whether the system prompt asks for thinking."""

    problem: Problem
    thinking: bool


@dataclass(frozen=True)
class Answer:
    """One completion and its grade."""

    question: Question
    prompt: list[int]  # tokens
    tokens: list[int]  # the completion, stop token included
    logprobs: list[float]  # of `tokens` when they were sampled, nats
    text: str  # the completion without its stop token
    finished: bool  # a stop token came before the limit
    grade: Grade


def both_modes(problems: Sequence[Problem]) -> list[Question]:
    """Every problem twice: first all with thinking, then all without."""
    return [Question(problem, thinking) for thinking in (True, False) for problem in problems]


def prompt_tokens(problem: Problem, thinking: bool, tokenizer: Tokenizer) -> list[int]:
    """The chat prompt of a problem, up to where the assistant begins."""
    return encode_prompt(tokenizer, [{"role": "user", "content": problem.question}], thinking)


def prompts_of(
    questions: Sequence[Question], tokenizer: Tokenizer, max_new_tokens: int, context: int
) -> list[list[int]]:
    """The tokens that ask each question.

    Raises:
        UserError: `max_new_tokens` more do not fit a context of so many tokens.
    """
    prompts = [prompt_tokens(question.problem, question.thinking, tokenizer) for question in questions]
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > context:
        raise UserError(
            f"max_new_tokens: {max_new_tokens} do not fit the model's context of {context} tokens beside a prompt of "
            f"{longest}; give at most {context - longest}"
        )
    return prompts


def ask(
    model: BailingMoeV2ForCausalLM,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    sequences_per_batch: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """One answer to each question, in their order.

    Args:
        temperature: 0 is greedy; 1 samples from the model itself.
        seed: of the sampling; the same questions with the same seed and model give the same answers.
        on_progress: called with (answered, all) after each batch.
    """
    prompts = prompts_of(questions, tokenizer, max_new_tokens, model.config.max_position_embeddings)
    # Thinking and instant answers differ much in length: batches of one kind waste fewer steps.
    order = sorted(range(len(questions)), key=lambda index: questions[index].thinking)
    answers: dict[int, Answer] = {}
    for first in range(0, len(order), sequences_per_batch):
        chosen = order[first : first + sequences_per_batch]
        completions = generate(
            model,
            [prompts[index] for index in chosen],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_ids=tokenizer.stop_ids,
            seed=seed + first,
        )
        for index, completion in zip(chosen, completions, strict=True):
            question, tokens = questions[index], list(completion.tokens)
            text = tokenizer.decode(tokens[:-1] if completion.finished else tokens)
            answers[index] = Answer(
                question=question,
                prompt=prompts[index],
                tokens=tokens,
                logprobs=list(completion.logprobs),
                text=text,
                finished=completion.finished,
                grade=grade(question.problem, text, completion.finished, question.thinking),
            )
        if on_progress:
            on_progress(len(answers), len(questions))
    return [answers[index] for index in range(len(questions))]


def share(answers: Sequence[Answer], of: Callable[[Grade], bool]) -> float:
    """Share of the answers whose grade has the property; 0 for none."""
    return sum(of(answer.grade) for answer in answers) / max(len(answers), 1)


def exact_match(answers: Sequence[Answer]) -> float:
    """Share of right answers."""
    return share(answers, lambda grade: grade.correct)


def switch_obeyed(answers: Sequence[Answer]) -> float:
    """Share of answers that think when asked to and do not when not."""
    return share(answers, lambda grade: grade.obeyed)


def chance(problems: Sequence[Problem]) -> float:
    """Exact match of always giving a task's most common answer, the best that can be done without reading the question.

    Measured on the same problems, so on few of them it flatters the guesser.
    """
    answers: dict[str, Counter[str]] = {}
    for problem in problems:
        answers.setdefault(problem.task, Counter())[problem.answer] += 1
    return sum(counter.most_common(1)[0][1] for counter in answers.values()) / max(len(problems), 1)
