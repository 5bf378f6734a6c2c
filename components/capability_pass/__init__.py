"""Capability pass: decoupled fine-tuning, after which the system prompt switches thinking on and off."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from components.contracts import check_same_tokenizer
from components.problems import TASKS
from ling_flow.config import StrictModel, context_field
from ling_flow.data.reasoning import TaskSpec
from ling_flow.flow.component import Dataset, Input, Model, Output, Resources, Step, component


class CapabilityPassConfig(StrictModel):
    """What is learnt, and how."""

    tasks: tuple[TaskSpec, ...] = Field(TASKS, min_length=1, description="families of problems and their difficulties")
    problems: int = Field(8_000, ge=1, description="training problems, each learnt with thinking and without")
    steps: int = Field(300, ge=1, description="optimizer steps")
    warmup_steps: int = Field(20, ge=0, description="steps of linear warm-up")
    examples_per_batch: int = Field(32, ge=1, description="examples per optimizer step")
    learning_rate: float = Field(1e-3, gt=0, description="peak of AdamW's learning rate; falls to 0 along a cosine")
    switch_prompts: int = Field(
        200, ge=1, description="held-out problems asked at the end, each with thinking and without"
    )
    max_new_tokens: int = Field(128, ge=1, description="longest answer to them, tokens")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of problems, order and sampling")
    threads: int | None = context_field(
        None,
        why="how many cores a machine lends does not change the method; bits are equal for equal numbers of threads",
        description="CPU threads; null: one per core",
        gt=0,
    )

    @model_validator(mode="after")
    def _the_peak_is_reached(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps must be less than steps ({self.steps}), got {self.warmup_steps}")
        return self


class CapabilityPassResult(StrictModel):
    """What the pass gave."""

    thinking_switch_obeyed: float = Field(
        description="share of held-out answers, sampled at temperature 1, with a well-formed thinking "
        "block exactly where asked for, 0 to 1"
    )
    exact_match_on: float = Field(description="share of those answers that are right, with thinking, 0 to 1")
    exact_match_off: float = Field(description="share of those answers that are right, without, 0 to 1")
    training_loss: float = Field(description="mean over the last tenth of the steps, nats per token of the assistant's")


@component(version=4, resources=Resources(cpus=2, memory_gib=4), runs_on="job")
def capability_pass(
    config: CapabilityPassConfig, base: Input[Model], corpus: Input[Dataset], model: Output[Model], step: Step
) -> CapabilityPassResult:
    """Fine-tune a base model to answer with and without thinking, as the system prompt says."""
    check_same_tokenizer(base, corpus)
    from statistics import fmean

    import torch

    from ling_flow.alignment.dft import DftBatches, dft_examples, fine_tune
    from ling_flow.data.reasoning import problems
    from ling_flow.data.tokenizer import Tokenizer
    from ling_flow.evaluation.tasks import ask, both_modes, exact_match, prompts_of, switch_obeyed
    from ling_flow.model.hf import load_pretrained, save_pretrained
    from ling_flow.training.settings import OptimizerSettings

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = Tokenizer.load(corpus.path / "tokenizer")
    network = load_pretrained(base.path, dtype=torch.float32).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    held_out = problems(config.tasks, config.switch_prompts, config.seed, "held_out")
    questions = both_modes(held_out)
    prompts_of(questions, tokenizer, config.max_new_tokens, network.config.max_position_embeddings)  # before it trains
    learnt = [
        example
        for problem in problems(config.tasks, config.problems, config.seed)
        for example in dft_examples(problem, tokenizer)
    ]
    batches = DftBatches(learnt, config.examples_per_batch, config.seed, network.config.max_position_embeddings)
    total = config.steps + 1
    losses: list[float] = []

    def on_step(done: int, loss: float, learning_rate: float) -> None:
        losses.append(loss)
        step.progress(done, total, "fine-tuning", loss=loss)
        step.metrics({"loss": loss, "learning_rate": learning_rate}, step=done)

    fine_tune(
        network,
        batches,
        steps=config.steps,
        warmup_steps=config.warmup_steps,
        optimizer_settings=OptimizerSettings(learning_rate=config.learning_rate),
        on_step=on_step,
    )
    answers = ask(
        network,
        tokenizer,
        questions,
        max_new_tokens=config.max_new_tokens,
        temperature=1.0,
        seed=config.seed,
    )
    save_pretrained(network, model.path, corpus.path / "tokenizer")
    model.contract.update(base.contract)
    step.progress(total, total, "held-out problems answered")
    return CapabilityPassResult(
        thinking_switch_obeyed=switch_obeyed(answers),
        exact_match_on=exact_match([answer for answer in answers if answer.question.thinking]),
        exact_match_off=exact_match([answer for answer in answers if not answer.question.thinking]),
        training_loss=fmean(losses[-max(1, len(losses) // 10) :]),
    )
