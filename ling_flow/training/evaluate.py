"""Validation loss on fixed windows of each source, and how the model would go on from them.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from ling_flow.data.corpus import Corpus
from ling_flow.errors import UserError
from ling_flow.generation.engine import generate
from ling_flow.model.transformer import BailingMoeV2ForCausalLM

_TOKENS_PER_FORWARD = 16384


def validation_loss(
    model: BailingMoeV2ForCausalLM,
    corpus: Corpus,
    sequence_length: int,
    max_tokens: int,
    sources: Iterable[str] | None = None,
) -> dict[str, float]:
    """Next-token cross-entropy (nats per token) by source, over windows that depend on nothing but the arguments.

    Args:
        max_tokens: predicted tokens per source, rounded down to whole windows (at least one).
        sources: default all of the corpus.

    Raises:
        UserError: a source's validation split is too short for one prediction.
    """
    was_training = model.training
    model.eval()
    try:
        names = corpus.sources if sources is None else sources
        return {name: _source_loss(model, corpus, name, sequence_length, max_tokens) for name in names}
    finally:
        model.train(was_training)


def samples(
    model: BailingMoeV2ForCausalLM, corpus: Corpus, sources: Iterable[str], prompt_tokens: int = 16, tokens: int = 32
) -> dict[str, str]:
    """The most likely continuation of the first validation document of each source: prompt and answer as text."""
    names = list(sources)
    prompts = [corpus.tokens(name, "validation")[:prompt_tokens].tolist() for name in names]
    room = model.config.max_position_embeddings
    was_training = model.training
    model.eval()
    try:
        answers = generate(
            model, [prompt[: room // 2] for prompt in prompts], min(tokens, room // 2), 0.0, set(), seed=0
        )
    finally:
        model.train(was_training)
    return {
        name: corpus.tokenizer.decode([*prompt, *answer.tokens])
        for name, prompt, answer in zip(names, prompts, answers, strict=True)
    }


def mixture_loss(losses: Mapping[str, float], mixture: Mapping[str, float]) -> float:
    """Mean of the sources' losses, weighted by the mixture."""
    total = sum(mixture.values())
    return sum(weight * losses[name] for name, weight in mixture.items() if weight) / total


@torch.no_grad()
def _source_loss(
    model: BailingMoeV2ForCausalLM, corpus: Corpus, source: str, sequence_length: int, max_tokens: int
) -> float:
    device = next(model.parameters()).device
    windows_BS1 = _windows(corpus.tokens(source, "validation"), sequence_length, max_tokens, source)
    rows = max(1, _TOKENS_PER_FORWARD // sequence_length)
    total = sum(
        model.token_logprobs(part.to(device)).double().sum().item()
        for part in torch.from_numpy(windows_BS1).split(rows)
    )
    return -total / (windows_BS1.shape[0] * (windows_BS1.shape[1] - 1))


def _windows(tokens: np.ndarray, sequence_length: int, max_tokens: int, source: str) -> np.ndarray:
    """Windows of S+1 tokens spread evenly over the split, int64 (B, S+1); S is cut to what a short split holds."""
    length = min(sequence_length, len(tokens) - 1)
    if length < 1:
        raise UserError(f"corpus: validation split of '{source}' has {len(tokens)} tokens; at least 2 are needed")
    available = (len(tokens) - 1) // length
    count = min(available, max(1, max_tokens // length))
    starts = [index * available // count * length for index in range(count)]
    return np.stack([np.asarray(tokens[start : start + length + 1], dtype=np.int64) for start in starts])
