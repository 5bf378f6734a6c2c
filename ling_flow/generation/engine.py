"""Batched decoding with a key-value cache.

Shapes: B active sequences, S prompt slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ling_flow.errors import UserError
from ling_flow.model.attention import KVCache
from ling_flow.model.transformer import BailingMoeV2ForCausalLM

GREEDY_BELOW = 1e-5
"""Temperatures below are taken for 0: logits divided by less leave float32."""
FIRST_ROOM = 16
"""Slots of the cache beyond the prompts, at first. Most answers end long before the length that is allowed to them."""


@dataclass
class Completion:
    """What follows one prompt.

    `logprobs` are those of the chosen tokens under the model itself (temperature 1, all of the vocabulary), however
    they were sampled.
    `finished`: ended by a stop token, which is then the last of `tokens`; otherwise the length ran out.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


class Step(NamedTuple):
    """One decoding step: the prompts still running and what was chosen for each."""

    rows: list[int]
    tokens: list[int]
    logprobs: list[float]


def generate(
    model: BailingMoeV2ForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    stop_ids: Collection[int],
    seed: int,
    top_p: float = 1.0,
) -> list[Completion]:
    """Continue each prompt until a token of `stop_ids`, or for `max_new_tokens` tokens. Same arguments, same result.

    Args:
        temperature: 0 takes the most likely token.
        top_p: sample from the smallest set of tokens that holds this much probability.

    Raises:
        UserError: an empty prompt, a wrong setting, or a prompt that with `max_new_tokens` exceeds
        max_position_embeddings.
    """
    completions = [Completion() for _ in prompts]
    for step in decode(model, prompts, max_new_tokens, temperature, stop_ids, seed, top_p):
        for row, token, logprob in zip(*step, strict=True):
            completions[row].tokens.append(token)
            completions[row].logprobs.append(logprob)
            completions[row].finished = token in stop_ids
    return completions


def stream(
    model: BailingMoeV2ForCausalLM,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    stop_ids: Collection[int],
    seed: int,
    top_p: float = 1.0,
) -> Generator[int]:
    """The tokens that `generate` returns for one prompt, each as soon as it is chosen."""
    for step in decode(model, [prompt], max_new_tokens, temperature, stop_ids, seed, top_p):
        yield step.tokens[0]


@torch.no_grad()
def decode(
    model: BailingMoeV2ForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    stop_ids: Collection[int],
    seed: int,
    top_p: float = 1.0,
) -> Iterator[Step]:
    """The steps behind `generate`. Prompts are padded on the left and equal ones read once; finished rows leave the
    batch when half of it is done. The cache doubles when it is full: it takes at most twice what is used."""
    if not prompts:
        return
    _check(model, prompts, max_new_tokens, temperature, top_p)
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    different = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: index for index, prompt in enumerate(different)}
    longest = max(map(len, different))
    padding = [longest - len(prompt) for prompt in different]
    ids_BS = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, different, strict=True)]).to(device)
    cache = KVCache(
        model.config,
        torch.tensor(padding, device=device),
        longest + min(FIRST_ROOM, max_new_tokens - 1),
        model.compute_dtype or model.lm_head.weight.dtype,
    )
    hidden_BD = model.hidden_states(ids_BS, cache)[:, -1]
    if len(different) < len(prompts):  # several samples of one prompt
        rows_B = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
        hidden_BD = hidden_BD[rows_B]
        cache.keep(rows_B)
    batch = list(range(len(prompts)))  # prompt of each row of the batch
    running = set(batch)
    for count in range(1, max_new_tokens + 1):
        logits_BV = model.lm_head(hidden_BD).float()
        normaliser_B = logits_BV.logsumexp(1)
        if not normaliser_B.isfinite().all():
            raise UserError("the model's logits are not finite: its learning rate was too high, or weights are damaged")
        tokens_B = _choose(logits_BV, temperature, top_p, generator)
        logprobs_B = logits_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1) - normaliser_B
        tokens, logprobs = tokens_B.tolist(), logprobs_B.tolist()
        places = [place for place, row in enumerate(batch) if row in running]
        yield Step(
            [batch[place] for place in places],
            [tokens[place] for place in places],
            [logprobs[place] for place in places],
        )
        places = [place for place in places if tokens[place] not in stop_ids]
        if not places or count == max_new_tokens:
            return
        running = {batch[place] for place in places}
        if 2 * len(places) <= len(batch):
            kept_B = torch.tensor(places, device=device)
            cache.keep(kept_B)
            tokens_B = tokens_B[kept_B]
            batch = [batch[place] for place in places]
        if cache.length == cache.capacity:
            cache.grow(min(cache.capacity, longest + max_new_tokens - 1 - cache.capacity))
        hidden_BD = model.hidden_states(tokens_B.unsqueeze(1), cache)[:, -1]


def _choose(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token (B) per row."""
    if temperature < GREEDY_BELOW:
        return logits_BV.argmax(1)
    probabilities_BV = torch.softmax(logits_BV / temperature, 1)
    if top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(stable=True, dim=1, descending=True)
        before_BV = sorted_BV.cumsum(1) - sorted_BV
        kept_BV = before_BV < top_p
        kept_BV[:, 0] = True  # also where top_p is nothing in float32
        probabilities_BV = torch.zeros_like(probabilities_BV).scatter_(1, order_BV, sorted_BV * kept_BV)
    # One uniform number per row, by the inverse of the distribution function: torch.multinomial draws one per
    # vocabulary entry.
    cumulative_BV = probabilities_BV.cumsum(1, dtype=torch.float64)
    uniform_B1 = torch.rand(len(logits_BV), 1, generator=generator, device=logits_BV.device)
    return torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True).squeeze(1)


def _check(
    model: BailingMoeV2ForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise UserError(f"temperature: must be 0 or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p: must be above 0 and at most 1, got {top_p}")
    limit, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompts[{index}]: is empty; give at least one token")
        if len(prompt) + max_new_tokens > limit:
            raise UserError(
                f"prompts[{index}]: {len(prompt)} tokens and max_new_tokens={max_new_tokens} exceed "
                f"max_position_embeddings ({limit})"
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise UserError(f"prompts[{index}]: token ids must be from 0 to {vocabulary - 1}")
