import pytest
import torch

from ling_flow.alignment.dft import DftBatch, DftBatches, dft_examples, fine_tune, warmup_then_cosine
from ling_flow.data.reasoning import Problem
from ling_flow.errors import UserError
from ling_flow.evaluation.tasks import ask, both_modes, switch_obeyed
from ling_flow.training.settings import OptimizerSettings
from tests.alignment.micro import easy_problems, model, tokenizer

PROBLEM = Problem("47 + 38 = ?", ["47 + 30 = 77", "77 + 8 = 85"], "85", "chain_sum", 2)
PROMPT = (
    "<role>SYSTEM</role>detailed thinking {}<|role_end|><role>HUMAN</role>47 + 38 = ?<|role_end|><role>ASSISTANT</role>"
)
THOUGHT = "\n<think>\n47 + 30 = 77\n77 + 8 = 85\n</think>\n\n"
ANSWER = "85<|role_end|><|endoftext|>"


def test_both_targets_are_the_published_format() -> None:
    on, off = dft_examples(PROBLEM, tokenizer())
    assert tokenizer().decode(on.prompt) == PROMPT.format("on")
    assert tokenizer().decode(on.target) == THOUGHT + ANSWER
    assert tokenizer().decode(off.prompt) == PROMPT.format("off")
    assert tokenizer().decode(off.target) == ANSWER


def targets_of(batch: DftBatch) -> list[str]:
    """What each example of a packed batch is to be answered with."""
    next_tokens, numbers = batch.tokens_1S1[:, 1:], batch.documents_1S1[:, 1:]
    return [
        tokenizer().decode(next_tokens[batch.mask_1S & (numbers == number)].tolist())
        for number in range(int(numbers.max()) + 1)
    ]


def test_the_mask_marks_the_assistant_alone() -> None:
    batches = DftBatches(dft_examples(PROBLEM, tokenizer()), examples_per_batch=2, seed=0, max_tokens=160)
    assert sorted(targets_of(batches.batch(0)), key=len) == [ANSWER, THOUGHT + ANSWER]


def test_batches_are_a_pure_function_and_an_epoch_holds_everything_once() -> None:
    examples = [example for problem in easy_problems(12) for example in dft_examples(problem, tokenizer())]
    one, other = (DftBatches(examples, examples_per_batch=6, seed=7, max_tokens=160) for _ in range(2))
    for step in (3, 5, 0):
        assert all(torch.equal(a, b) for a, b in zip(one.batch(step), other.batch(step), strict=True))
    seen = []
    for step in range(len(examples) // 6):
        batch = one.batch(step)
        seen += [tuple(batch.tokens_1S1[batch.documents_1S1 == number].tolist()) for number in range(6)]
    assert sorted(seen) == sorted((*example.prompt, *example.target) for example in examples)
    assert not torch.equal(one.batch(0)[0], DftBatches(examples, 6, 8, 160).batch(0)[0])


def test_too_long_examples_are_left_out_and_none_left_is_an_error() -> None:
    on, off = dft_examples(PROBLEM, tokenizer())
    limit = len(off.prompt) + len(off.target)
    assert DftBatches([on, off], examples_per_batch=1, seed=0, max_tokens=limit).examples == [off]
    with pytest.raises(UserError, match="examples_per_batch: 2 asked, but only 1 of 2 examples fit"):
        DftBatches([on, off], examples_per_batch=2, seed=0, max_tokens=limit)


def test_schedule() -> None:
    factors = [warmup_then_cosine(step, steps=20, warmup=4) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.02


def test_a_rate_that_is_too_high_is_told() -> None:
    examples = [example for problem in easy_problems(20) for example in dft_examples(problem, tokenizer())]
    with pytest.raises(UserError, match=r"learning_rate: 1e\+20 is too high, the loss is nan at step \d"):
        fine_tune(
            model(),
            DftBatches(examples, examples_per_batch=16, seed=0, max_tokens=160),
            steps=5,
            warmup_steps=1,
            optimizer_settings=OptimizerSettings(learning_rate=1e20),
            on_step=lambda step, loss, rate: None,
        )


def test_fine_tuning_teaches_the_switch() -> None:
    # A random model learns in a few steps to open a block or not, by the system prompt alone.
    problems = easy_problems(200)
    examples = [example for problem in problems for example in dft_examples(problem, tokenizer())]
    network = model()
    bias = [gate.expert_bias.clone() for gate in network.gates()]
    losses: list[float] = []
    fine_tune(
        network,
        DftBatches(examples, examples_per_batch=16, seed=0, max_tokens=160),
        steps=120,
        warmup_steps=5,
        optimizer_settings=OptimizerSettings(learning_rate=1e-2),
        on_step=lambda step, loss, rate: losses.append(loss),
    )
    answers = ask(network, tokenizer(), both_modes(problems[:20]), max_new_tokens=48, temperature=0.0, seed=0)
    assert losses[-1] < 0.5 * losses[0]
    assert switch_obeyed(answers) > 0.9
    assert all(torch.equal(gate.expert_bias, before) for gate, before in zip(network.gates(), bias, strict=True))
    assert all(int(gate.expert_counts.sum()) == 0 for gate in network.gates())
