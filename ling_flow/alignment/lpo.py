"""Linguistic-unit policy optimisation (LPO, Ling 2.0 §4): importance ratios and clipping by the sentence.

    J = mean over groups of  1/Σ_i|y_i| · Σ_i Σ_k |s_ik| · min( r_ik·Â_i, clip(r_ik, 1−ε, 1+ε)·Â_i )
    r_ik = exp( mean over the tokens of sentence s_ik of  log π_θ − log π_old ),   Â_i = (R_i − mean R) / (std R +
    1e-6),   ε = 0.03

Unpublished, and ours: what ends a sentence (`sentence_of_token`), and that groups whose rewards are all the same are
dropped.

Shapes: B responses, S tokens of prompt and response after the first, K sentences of the longest response.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MINIMUM_SENTENCE_TOKENS = 4
_PROTECTED = re.compile(r"```.*?(?:```|\Z)|\$\$.*?\$\$|\$[^$\n]+\$|\\\[.*?\\\]|\\\(.*?\\\)", re.DOTALL)
# A full stop inside a number or a name is no pause.
_PAUSE = re.compile(r"[.!?](?=\s|\Z)|[;。！？；…\n]")


def token_pieces(decode: Callable[[list[int]], str], tokens: Sequence[int]) -> list[str]:
    """The text that each token adds. A character cut over several tokens is given to the last of them."""
    pieces: list[str] = []
    start = 0
    for end in range(1, len(tokens) + 1):
        text = decode(list(tokens[start:end]))
        # An incomplete UTF-8 sequence decodes to U+FFFD; no character needs more than four tokens.
        if text.endswith("\ufffd") and end - start < 4:
            pieces.append("")
        else:
            pieces.append(text)
            start = end
    return pieces


def sentence_of_token(pieces: Sequence[str], minimum_tokens: int = MINIMUM_SENTENCE_TOKENS) -> list[int]:
    """Index of the sentence that each token belongs to, rising from 0.

    A sentence ends after . ! ? (followed by space or the end), ; 。！？； … or a newline, but not inside code fences
    and LaTeX. The token that holds the mark belongs to the sentence it ends. A sentence shorter than `minimum_tokens`
    runs on into the next; a short last one joins the one before it.
    """
    text = "".join(pieces)
    protected = [match.span() for match in _PROTECTED.finditer(text)]
    ends = {
        match.start()
        for match in _PAUSE.finditer(text)
        if not any(low <= match.start() < high for low, high in protected)
    }
    sentences: list[int] = []
    current, length, offset = 0, 0, 0
    for piece in pieces:
        sentences.append(current)
        length += 1
        if length >= minimum_tokens and any(offset + place in ends for place in range(len(piece))):
            current, length = current + 1, 0
        offset += len(piece)
    if 0 < length < minimum_tokens and current > 0:
        sentences[-length:] = [current - 1] * length
    return sentences


def group_advantages(rewards: Sequence[float]) -> list[float] | None:
    """(R − mean)/(std + 1e-6), population std; None where all rewards are the same and teach nothing."""
    mean = sum(rewards) / len(rewards)
    std = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    if std < 1e-6:
        return None
    return [(reward - mean) / (std + 1e-6) for reward in rewards]


@dataclass(frozen=True)
class LpoResponse:
    """One sampled response, ready to learn from."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]  # of `tokens`, under the policy that sampled them, nats
    sentences: list[int]  # of `tokens`
    advantage: float
    weight: float  # 1 / (tokens of its group · groups of the minibatch)


@dataclass(frozen=True)
class LpoBatch:
    """Responses padded on the right."""

    tokens_BS1: Tensor  # int64: prompt, response, padding
    response_BS: Tensor  # bool: the predicted tokens that belong to the response
    old_logprob_BS: Tensor  # float32, 0 outside the response
    sentence_BS: Tensor  # int64, 0 outside the response
    advantage_B: Tensor
    weight_B: Tensor


def collate(responses: Sequence[LpoResponse], device: torch.device | str = "cpu") -> LpoBatch:
    """Pad to the longest. Padding is token 0 and counts nowhere."""
    batch, longest = len(responses), max(len(item.prompt) + len(item.tokens) for item in responses)
    tokens_BS1 = torch.zeros(batch, longest, dtype=torch.int64)
    response_BS = torch.zeros(batch, longest - 1, dtype=torch.bool)
    old_logprob_BS = torch.zeros(batch, longest - 1)
    sentence_BS = torch.zeros(batch, longest - 1, dtype=torch.int64)
    for row, item in enumerate(responses):
        first, length = len(item.prompt) - 1, len(item.tokens)
        tokens_BS1[row, : first + 1 + length] = torch.tensor(item.prompt + item.tokens)
        response_BS[row, first : first + length] = True
        old_logprob_BS[row, first : first + length] = torch.tensor(item.logprobs)
        sentence_BS[row, first : first + length] = torch.tensor(item.sentences)
    return LpoBatch(
        tokens_BS1=tokens_BS1.to(device),
        response_BS=response_BS.to(device),
        old_logprob_BS=old_logprob_BS.to(device),
        sentence_BS=sentence_BS.to(device),
        advantage_B=torch.tensor([item.advantage for item in responses], device=device),
        weight_B=torch.tensor([item.weight for item in responses], device=device),
    )


@dataclass(frozen=True)
class LpoLoss:
    """The loss to minimise, and what to watch."""

    loss: Tensor  # scalar, −J
    clipped: float  # share of response tokens in sentences where the clip stops the gradient
    drift: float  # mean |r − 1| over response tokens


def lpo_loss(logprob_BS: Tensor, batch: LpoBatch, clip: float) -> LpoLoss:
    """−J of a minibatch of whole groups.

    Args:
        logprob_BS: log-probabilities of `batch.tokens_BS1[:, 1:]` under the policy that learns, float32.
        batch: the responses.
        clip: ε.
    """
    response_BS = batch.response_BS
    sentences = int(batch.sentence_BS.max()) + 1
    zeros_BK = logprob_BS.new_zeros(logprob_BS.shape[0], sentences)
    change_BS = torch.where(response_BS, logprob_BS - batch.old_logprob_BS, 0.0)
    tokens_BK = zeros_BK.scatter_add(1, batch.sentence_BS, response_BS.to(zeros_BK.dtype))
    change_BK = zeros_BK.scatter_add(1, batch.sentence_BS, change_BS) / tokens_BK.clamp(min=1)
    ratio_BK = change_BK.exp()
    advantage_B1 = batch.advantage_B[:, None]
    free_BK, clipped_BK = ratio_BK * advantage_B1, ratio_BK.clamp(1 - clip, 1 + clip) * advantage_B1
    objective_B = (tokens_BK * torch.minimum(free_BK, clipped_BK)).sum(1)
    with torch.no_grad():
        total = tokens_BK.sum()
        clipped = float((tokens_BK * (clipped_BK < free_BK)).sum() / total)
        drift = float((tokens_BK * (ratio_BK - 1).abs()).sum() / total)
    return LpoLoss(loss=-(batch.weight_B * objective_B).sum(), clipped=clipped, drift=drift)


def kl_to_reference(logprob_BS: Tensor, reference_BS: Tensor, batch: LpoBatch) -> Tensor:
    """KL(π_θ ‖ π_ref) in nats per token, weighted as the objective is.

    The estimator r − 1 − log r with r = π_ref/π_θ, which is never negative.
    """
    difference_BS = torch.where(batch.response_BS, reference_BS - logprob_BS, 0.0)
    return (batch.weight_B[:, None] * (difference_BS.exp() - 1 - difference_BS)).sum()
