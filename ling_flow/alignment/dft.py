"""Decoupled fine-tuning (DFT, Ling 2.0 §4): one model, two ways of answering, switched by the system prompt.

Each problem is learnt twice: with `detailed thinking on` the target is
`\\n<think>\\nsteps\\n</think>\\n\\nanswer<|role_end|>`, with `detailed thinking off` it is `answer<|role_end|>`.
Both end with `<|endoftext|>`. The loss counts the target alone.

Shapes: S1 tokens of all examples of a batch, S = S1 - 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ling_flow.data.chat import encode_answer
from ling_flow.data.reasoning import Problem
from ling_flow.data.tokenizer import Tokenizer
from ling_flow.errors import UserError
from ling_flow.evaluation.tasks import prompt_tokens
from ling_flow.model.packing import in_one_row
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.optimizer import build_optimizer
from ling_flow.training.settings import OptimizerSettings


@dataclass(frozen=True)
class Example:
    """A prompt and what the assistant should say to it, tokens."""

    prompt: list[int]
    target: list[int]


def dft_examples(problem: Problem, tokenizer: Tokenizer) -> list[Example]:
    """The problem with thinking and without."""
    return [
        Example(
            prompt=prompt_tokens(problem, thinking, tokenizer),
            target=[*encode_answer(tokenizer, reasoning, problem.answer), tokenizer.eos_id],
        )
        for thinking, reasoning in ((True, "\n".join(problem.steps)), (False, None))
    ]


class DftBatch(NamedTuple):
    """Arguments of `model.loss`."""

    tokens_1S1: Tensor  # int64
    documents_1S1: Tensor  # int64: number of the example
    mask_1S: Tensor  # bool: true where the next token is one of the assistant's


class DftBatches:
    """Shuffled examples, packed into one row; `batch(step)` is a pure function of the arguments."""

    def __init__(self, examples: Sequence[Example], examples_per_batch: int, seed: int, max_tokens: int) -> None:
        """
        Args:
            max_tokens: longer examples are left out.

        Raises:
            UserError: no example, or fewer than one batch of them, is short enough.
        """
        self.examples = [item for item in examples if len(item.prompt) + len(item.target) <= max_tokens]
        if len(self.examples) < examples_per_batch:
            raise UserError(
                f"examples_per_batch: {examples_per_batch} asked, but only {len(self.examples)} of "
                f"{len(examples)} examples fit in {max_tokens} tokens"
            )
        self.examples_per_batch = examples_per_batch
        self.seed = seed

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass; what is left over at its end is dropped."""
        return len(self.examples) // self.examples_per_batch

    def batch(self, step: int) -> DftBatch:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.examples))
        chosen = [self.examples[i] for i in order[place * self.examples_per_batch :][: self.examples_per_batch]]
        tokens_1S1, documents_1S1 = in_one_row([item.prompt + item.target for item in chosen])
        is_target = [[False] * len(item.prompt) + [True] * len(item.target) for item in chosen]
        mask_1S = torch.tensor([list(itertools.chain.from_iterable(is_target))[1:]])
        return DftBatch(tokens_1S1, documents_1S1, mask_1S)


def warmup_then_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate at `step` of `steps`: linear up to 1 over `warmup` steps, then a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def fine_tune(
    model: BailingMoeV2ForCausalLM,
    batches: DftBatches,
    *,
    steps: int,
    warmup_steps: int,
    optimizer_settings: OptimizerSettings,
    on_step: Callable[[int, float, float], None],
) -> None:
    """Train `model` in place, on its device. The router's expert bias stays as pre-training left it.

    Args:
        on_step: called after each step with (steps done, loss, learning rate); the loss is the cross-entropy,
            nats per target token.

    Raises:
        UserError: the loss is not finite.
    """
    optimizer = build_optimizer(model, optimizer_settings)
    device = next(model.parameters()).device
    model.eval()  # nothing but the router's counts differs from training, and those move a bias that is frozen here
    for step in range(steps):
        learning_rate = optimizer_settings.learning_rate * warmup_then_cosine(step, steps, warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        batch = DftBatch(*(part.to(device) for part in batches.batch(step)))
        output = model.loss(batch.tokens_1S1, batch.mask_1S, batch.documents_1S1)
        require_finite(float(output.cross_entropy), optimizer_settings.learning_rate, f"step {step + 1}")
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer_settings.gradient_clip)
        optimizer.step()
        on_step(step + 1, float(output.cross_entropy), learning_rate)


def require_finite(loss: float, learning_rate: float, where: str) -> None:
    """Stop what has diverged.

    Raises:
        UserError: `loss` is not finite.
    """
    if not math.isfinite(loss):
        raise UserError(
            f"learning_rate: {learning_rate:g} is too high, the loss is {loss} at {where}; choose a lower one"
        )
