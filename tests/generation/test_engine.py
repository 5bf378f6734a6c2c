from typing import Any

import pytest
import torch

from ling_flow.errors import UserError
from ling_flow.generation import engine
from ling_flow.generation.engine import Completion, generate, stream
from ling_flow.model.attention import KVCache
from ling_flow.model.config import ModelConfig, Yarn
from ling_flow.model.transformer import BailingMoeV2ForCausalLM

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [12, 13, 14, 15]]
NEVER: set[int] = set()


@pytest.fixture(scope="module")
def model() -> BailingMoeV2ForCausalLM:
    model = BailingMoeV2ForCausalLM(
        ModelConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            moe_intermediate_size=8,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            max_position_embeddings=48,
            initializer_range=0.4,
            torch_dtype="float32",
        )
    )
    model.init_weights(0)
    return model


def run(model: BailingMoeV2ForCausalLM, prompts: list[list[int]], **changes: Any) -> list[Completion]:
    settings: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.0, "stop_ids": NEVER, "seed": 0}
    return generate(model, prompts, **{**settings, **changes})


def greedy_by_full_passes(model: BailingMoeV2ForCausalLM, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_cached_batched_decoding_equals_full_passes(model: BailingMoeV2ForCausalLM) -> None:
    for prompt, completion in zip(PROMPTS, run(model, PROMPTS), strict=True):
        assert completion.tokens == greedy_by_full_passes(model, prompt, 20)
        assert not completion.finished


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.7, 1.0), (1.5, 0.8)])
def test_logprobs_are_those_of_the_unmodified_model(
    model: BailingMoeV2ForCausalLM, temperature: float, top_p: float
) -> None:
    for prompt, completion in zip(PROMPTS, run(model, PROMPTS, temperature=temperature, top_p=top_p), strict=True):
        expected = model.token_logprobs(torch.tensor([prompt + completion.tokens]))[0, len(prompt) - 1 :].detach()
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_each_sequence_stops_by_itself_and_leaves_the_others_alone(model: BailingMoeV2ForCausalLM) -> None:
    free = [greedy_by_full_passes(model, prompt, 20) for prompt in PROMPTS]
    stops = {free[0][2], free[1][5], free[3][9]}
    lengths = []
    for tokens, completion in zip(free, run(model, PROMPTS, stop_ids=stops), strict=True):
        end = next((i + 1 for i, token in enumerate(tokens) if token in stops), 20)
        assert completion.tokens == tokens[:end]
        assert len(completion.logprobs) == end
        assert completion.finished == (tokens[end - 1] in stops)
        lengths.append(end)
    assert len(set(lengths)) > 2  # rows did leave the batch at different times


def test_the_seed_decides(model: BailingMoeV2ForCausalLM) -> None:
    torch.manual_seed(1)
    one = run(model, PROMPTS, temperature=1.0, seed=5)
    torch.manual_seed(2)
    assert run(model, PROMPTS, temperature=1.0, seed=5) == one
    assert run(model, PROMPTS, temperature=1.0, seed=6) != one


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_distribution(model: BailingMoeV2ForCausalLM, temperature: float) -> None:
    count = 4000
    drawn = run(model, [[3, 1]] * count, max_new_tokens=1, temperature=temperature)
    counts = torch.bincount(torch.tensor([completion.tokens[0] for completion in drawn]), minlength=31).double()
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([[3, 1]]))[0, -1].double() / temperature, 0)
    error = (counts / count - expected) / (expected * (1 - expected) / count + 1e-6).sqrt()
    assert error.abs().max() < 4.5


def test_top_p_keeps_the_smallest_sufficient_set(model: BailingMoeV2ForCausalLM) -> None:
    with torch.no_grad():
        probabilities, order = torch.softmax(model(torch.tensor([[3, 1]]))[0, -1], 0).sort(descending=True)
    kept = int((probabilities.cumsum(0) < 0.6).sum()) + 1
    drawn = {
        completion.tokens[0] for completion in run(model, [[3, 1]] * 500, max_new_tokens=1, temperature=1.0, top_p=0.6)
    }
    assert drawn == set(order[:kept].tolist())


def test_stream_gives_the_same_tokens(model: BailingMoeV2ForCausalLM) -> None:
    expected = run(model, [PROMPTS[0]], temperature=1.0, seed=4)[0].tokens
    received = []
    for token in stream(model, PROMPTS[0], 20, 1.0, NEVER, 4):
        assert torch.is_grad_enabled()  # between tokens the caller's mode is untouched
        received.append(token)
    assert received == expected


def test_generating_changes_nothing_in_the_model(model: BailingMoeV2ForCausalLM) -> None:
    model.train()
    model.update_expert_bias(0.0)  # clears the counts
    run(model, PROMPTS)
    assert model.training
    assert all(gate.expert_counts.sum() == 0 for gate in model.gates())
    model.loss(torch.tensor([[1, 2, 3, 4]])).loss.backward()  # cached rotary tables stay usable for training


@pytest.mark.parametrize("prompts", [[[1] * 18], [[1, 2], [3]]])
def test_the_cache_takes_at_most_twice_what_is_used(
    model: BailingMoeV2ForCausalLM, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]]
) -> None:
    caches: list[tuple[int, int]] = []
    whole = model.hidden_states

    def watched(ids_BS: torch.Tensor, cache: KVCache) -> torch.Tensor:
        hidden_BSD = whole(ids_BS, cache)
        caches.append((cache.capacity, cache.length))
        return hidden_BSD

    monkeypatch.setattr(model, "hidden_states", watched)
    count = 48 - len(prompts[0])
    grown = run(model, prompts, max_new_tokens=count)
    assert len(caches) == count
    assert all(length <= capacity <= 2 * max(length, engine.FIRST_ROOM) for capacity, length in caches)
    assert caches[-1][0] == 47  # never more than the longest answer needs
    monkeypatch.setattr(engine, "FIRST_ROOM", 48)
    assert run(model, prompts, max_new_tokens=count) == grown
    assert {capacity for capacity, _ in caches[count:]} == {47}


def test_with_yarn_too_cached_decoding_equals_full_passes(model: BailingMoeV2ForCausalLM) -> None:
    extended = BailingMoeV2ForCausalLM(model.config)
    extended.load_state_dict(model.state_dict())
    extended.set_context(48, 10_000.0, Yarn(factor=4.0, original_max_position_embeddings=12))
    completions = run(extended, PROMPTS, max_new_tokens=24)
    assert completions != run(model, PROMPTS, max_new_tokens=24)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.tokens == greedy_by_full_passes(extended, prompt, 24)
        full = extended.token_logprobs(torch.tensor([prompt + completion.tokens]))[0, len(prompt) - 1 :].detach()
        torch.testing.assert_close(torch.tensor(completion.logprobs), full, atol=1e-4, rtol=1e-4)


def test_no_prompts_no_completions(model: BailingMoeV2ForCausalLM) -> None:
    assert run(model, []) == []


@pytest.mark.parametrize(
    ("prompts", "changes", "said"),
    [
        ([[1], []], {}, r"prompts\[1\]: is empty"),
        ([[1] * 29], {}, r"prompts\[0\]: 29 tokens and max_new_tokens=20 exceed max_position_embeddings \(48\)"),
        ([[31]], {}, "token ids must be from 0 to 30"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ([[1]], {"temperature": -1.0}, "temperature: must be 0 or more"),
        ([[1]], {"top_p": 0.0}, "top_p: must be above 0"),
    ],
)
def test_wrong_requests_are_refused(
    model: BailingMoeV2ForCausalLM, prompts: list[list[int]], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run(model, prompts, **changes)


def test_equal_prompts_are_read_once_and_answered_each(
    model: BailingMoeV2ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    whole = model.hidden_states

    def watched(ids_BS: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        rows.append(len(ids_BS))
        return whole(ids_BS, cache)

    monkeypatch.setattr(model, "hidden_states", watched)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    completions = run(model, prompts, max_new_tokens=5)
    assert rows == [2, 4, 4, 4, 4]
    monkeypatch.undo()
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.tokens == greedy_by_full_passes(model, prompt, 5)
    sampled = run(model, prompts, temperature=1.0)
    assert sampled[0].tokens != sampled[2].tokens
