"""Linguistic-unit policy optimisation (LPO, Ling 2.0 §4): importance ratios and clipping by the sentence.

    J = mean over groups of  1/Σ_i|y_i| · Σ_i Σ_k |s_ik| · min( r_ik·Â_i, clip(r_ik, 1−ε, 1+ε)·Â_i )
    r_ik = exp( mean over the tokens of sentence s_ik of  log π_θ − log π_old ),   Â_i = (R_i − mean R) / (std R +
    1e-6),   ε = 0.03

Unpublished, and ours: what ends a sentence (`sentence_of_token`), and that groups whose rewards are all the same are
dropped.

Shapes: B responses, R tokens of the longest response, K sentences of the one with most, S1 tokens of all prompts and
responses, S = S1 - 1.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ling_flow.model.packing import in_one_row

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
    """What the network reads, packed into one row, and what is known of its responses, padded on the right."""

    tokens_1S1: Tensor  # int64: prompt, response, prompt, response, …
    documents_1S1: Tensor  # int64: number of the response
    mask_1S: Tensor  # bool: true where the next token is of a response
    response_BR: Tensor  # bool: false in padding
    old_logprob_BR: Tensor  # float32, 0 in padding
    sentence_BR: Tensor  # int64, 0 in padding
    advantage_B: Tensor
    weight_B: Tensor

    def spread(self, logprob_1S: Tensor) -> Tensor:
        """Log-probabilities of the packed row's next tokens → those of the responses (B, R), 0 in padding."""
        zeros_BR = logprob_1S.new_zeros(self.response_BR.shape)
        return zeros_BR.masked_scatter(self.response_BR, logprob_1S[self.mask_1S])


def collate(responses: Sequence[LpoResponse], device: torch.device | str = "cpu") -> LpoBatch:
    """Put the responses together."""
    tokens_1S1, documents_1S1 = in_one_row([item.prompt + item.tokens for item in responses])
    is_response = [[False] * len(item.prompt) + [True] * len(item.tokens) for item in responses]
    shape = len(responses), max(len(item.tokens) for item in responses)
    response_BR = torch.zeros(shape, dtype=torch.bool)
    old_logprob_BR = torch.zeros(shape)
    sentence_BR = torch.zeros(shape, dtype=torch.int64)
    for row, item in enumerate(responses):
        response_BR[row, : len(item.tokens)] = True
        old_logprob_BR[row, : len(item.tokens)] = torch.tensor(item.logprobs)
        sentence_BR[row, : len(item.tokens)] = torch.tensor(item.sentences)
    return LpoBatch(
        tokens_1S1=tokens_1S1.to(device),
        documents_1S1=documents_1S1.to(device),
        mask_1S=torch.tensor([list(itertools.chain.from_iterable(is_response))[1:]], device=device),
        response_BR=response_BR.to(device),
        old_logprob_BR=old_logprob_BR.to(device),
        sentence_BR=sentence_BR.to(device),
        advantage_B=torch.tensor([item.advantage for item in responses], device=device),
        weight_B=torch.tensor([item.weight for item in responses], device=device),
    )


@dataclass(frozen=True)
class LpoLoss:
    """The loss to minimise, and what to watch."""

    loss: Tensor  # scalar, −J
    clipped: float  # share of response tokens in sentences where the clip stops the gradient
    drift: float  # mean |r − 1| over response tokens


def lpo_loss(logprob_BR: Tensor, batch: LpoBatch, clip: float) -> LpoLoss:
    """−J of a minibatch of whole groups.

    Args:
        logprob_BR: log-probabilities of the responses under the policy that learns, float32.
        batch: the responses.
        clip: ε.
    """
    response_BR = batch.response_BR
    sentences = int(batch.sentence_BR.max()) + 1
    zeros_BK = logprob_BR.new_zeros(logprob_BR.shape[0], sentences)
    change_BR = torch.where(response_BR, logprob_BR - batch.old_logprob_BR, 0.0)
    tokens_BK = zeros_BK.scatter_add(1, batch.sentence_BR, response_BR.to(zeros_BK.dtype))
    change_BK = zeros_BK.scatter_add(1, batch.sentence_BR, change_BR) / tokens_BK.clamp(min=1)
    ratio_BK = change_BK.exp()
    advantage_B1 = batch.advantage_B[:, None]
    free_BK, clipped_BK = ratio_BK * advantage_B1, ratio_BK.clamp(1 - clip, 1 + clip) * advantage_B1
    objective_B = (tokens_BK * torch.minimum(free_BK, clipped_BK)).sum(1)
    with torch.no_grad():
        total = tokens_BK.sum()
        clipped = float((tokens_BK * (clipped_BK < free_BK)).sum() / total)
        drift = float((tokens_BK * (ratio_BK - 1).abs()).sum() / total)
    return LpoLoss(loss=-(batch.weight_B * objective_B).sum(), clipped=clipped, drift=drift)


def kl_to_reference(logprob_BR: Tensor, reference_BR: Tensor, batch: LpoBatch) -> Tensor:
    """KL(π_θ ‖ π_ref) in nats per token, weighted as the objective is.

    The estimator r − 1 − log r with r = π_ref/π_θ, which is never negative.
    """
    difference_BR = torch.where(batch.response_BR, reference_BR - logprob_BR, 0.0)
    return (batch.weight_B[:, None] * (difference_BR.exp() - 1 - difference_BR)).sum()
