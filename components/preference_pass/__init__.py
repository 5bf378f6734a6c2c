"""Preference pass: reinforcement with the Evo-CoT reward and linguistic-unit policy optimisation."""

from __future__ import annotations

from pydantic import Field

from components.contracts import check_same_tokenizer
from ling_flow.alignment.settings import LpoSettings
from ling_flow.config import StrictModel, context_field
from ling_flow.data.reasoning import TaskSpec
from ling_flow.flow.component import Dataset, Input, Model, Output, Resources, Step, component

# Where a sampled answer is right now and then: groups in which all are right, or none, teach little.
TASKS = (
    TaskSpec(name="number_sorting", difficulties=(1,), weight=4),
    TaskSpec(name="chain_sum", difficulties=(1, 2), weight=3),
    TaskSpec(name="gcd", difficulties=(1,), weight=1),
)


class PreferencePassConfig(StrictModel):
    """What is practised, how, and how the gain is measured."""

    tasks: tuple[TaskSpec, ...] = Field(TASKS, min_length=1, description="families of problems and their difficulties")
    lpo: LpoSettings = Field(LpoSettings(), description="sampling, reward and optimisation")
    held_out_problems: int = Field(
        300, ge=2, description="held-out problems for the comparison, each asked with thinking and without"
    )
    held_out_samples: int = Field(
        4, ge=1, description="answers to each of these prompts, before and after, sampled at temperature 1"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of problems and sampling")
    threads: int | None = context_field(
        None,
        why="how many cores a machine lends does not change the method; bits are equal for equal numbers of threads",
        description="CPU threads; null: one per core",
        gt=0,
    )


class PreferencePassResult(StrictModel):
    """The model before and after: the same held-out prompts, the same seeds, sampled at temperature 1."""

    reward_before: float = Field(
        description="mean held-out reward before; answers from before and after are scored in one group per prompt"
    )
    reward_after: float = Field(description="mean held-out reward after, scored in the same groups")
    reward_gain: float = Field(description="reward_after - reward_before")
    reward_standard_error: float = Field(description="standard error of the gain, paired by prompt, over problems")
    exact_match_before: float = Field(description="share of right held-out answers before, 0 to 1")
    exact_match_after: float = Field(description="share of right held-out answers after, 0 to 1")
    response_tokens_before: float = Field(description="mean length of a held-out answer before, tokens")
    response_tokens_after: float = Field(description="mean length of a held-out answer after, tokens")
    thinking_switch_obeyed: float = Field(
        description="share of held-out answers after the pass with a well-formed thinking block exactly "
        "where asked for, 0 to 1"
    )


@component(version=5, resources=Resources(cpus=2, memory_gib=4), runs_on="job")
def preference_pass(
    config: PreferencePassConfig, base: Input[Model], corpus: Input[Dataset], model: Output[Model], step: Step
) -> PreferencePassResult:
    """Improve a model on verifiable problems by its own samples."""
    check_same_tokenizer(base, corpus)
    from statistics import fmean

    import torch

    from ling_flow.alignment.compare import compare
    from ling_flow.alignment.policy import align
    from ling_flow.data.reasoning import problems
    from ling_flow.data.tokenizer import Tokenizer
    from ling_flow.evaluation.tasks import Answer, ask, both_modes, exact_match, switch_obeyed
    from ling_flow.model.hf import load_pretrained, save_pretrained

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = Tokenizer.load(corpus.path / "tokenizer")
    network = load_pretrained(base.path, dtype=torch.float32).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    lpo = config.lpo
    total = lpo.rollouts + 2
    held_out = problems(config.tasks, config.held_out_problems, config.seed, "held_out")
    repeated = [question for question in both_modes(held_out) for _ in range(config.held_out_samples)]

    def held_out_answers() -> list[list[Answer]]:
        answers = ask(
            network,
            tokenizer,
            repeated,
            max_new_tokens=lpo.max_new_tokens,
            temperature=1.0,
            seed=config.seed,
            sequences_per_batch=lpo.sequences_per_batch,
        )
        return [
            answers[first : first + config.held_out_samples]
            for first in range(0, len(answers), config.held_out_samples)
        ]

    def on_rollout(rollout: int, numbers: dict[str, float]) -> None:
        step.progress(rollout + 2, total, "learning from samples", reward=numbers["reward"])
        step.metrics(numbers, step=rollout)

    step.progress(0, total, "held-out reward before")
    before = held_out_answers()
    step.progress(1, total, "learning from samples")
    # Other problems than the capability pass saw: a seed of their own.
    practised = problems(config.tasks, lpo.rollouts * lpo.questions_per_rollout, config.seed + 1)
    align(network, tokenizer, practised, lpo, config.seed, on_rollout)
    after = held_out_answers()
    comparison = compare(before, after, lpo.rewards)
    save_pretrained(network, model.path, corpus.path / "tokenizer")
    model.contract.update(base.contract)
    step.progress(total, total, "held-out reward compared", gain=comparison.gain)
    old, new = ([answer for group in side for answer in group] for side in (before, after))
    return PreferencePassResult(
        reward_before=comparison.before,
        reward_after=comparison.after,
        reward_gain=comparison.gain,
        reward_standard_error=comparison.standard_error,
        exact_match_before=exact_match(old),
        exact_match_after=exact_match(new),
        response_tokens_before=fmean(len(answer.tokens) for answer in old),
        response_tokens_after=fmean(len(answer.tokens) for answer in new),
        thinking_switch_obeyed=switch_obeyed(new),
    )
