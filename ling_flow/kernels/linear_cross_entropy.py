"""Output head and cross-entropy together, a chunk of tokens at a time: the (T, V) logits never exist as a whole.
Logits are float32.

Shapes: T tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**28}  # logits at a time; on a CPU they should stay in the cache


def linear_cross_entropy(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Σ_t -log softmax(head · hidden_t)[targets_t], a float32 scalar. Differentiable in `hidden` and `head`."""
    return _LinearCrossEntropy.apply(hidden_TD, head_VD, targets_T)


def linear_logprobs(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """log softmax(head · hidden_t)[targets_t] for each token, float32 (T). Differentiable in `hidden` and `head`."""
    return _LinearLogprobs.apply(hidden_TD, head_VD, targets_T)


def _chunks(hidden_TD: Tensor, head_VD: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS[hidden_TD.device.type] // head_VD.shape[0])
    for start in range(0, hidden_TD.shape[0], size):
        yield slice(start, start + size)


def _logits(hidden_CD: Tensor, head_VD: Tensor) -> Tensor:
    return (hidden_CD @ head_VD.T).to(_wide(hidden_CD))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _backward(
    probabilities_CV: Tensor,
    targets_C1: Tensor,
    scale_C1: Tensor | None,
    hidden_CD: Tensor,
    head_VD: Tensor,
    grad_head_VD: Tensor,
) -> Tensor:
    """Gradient of Σ scale · -logprob in `hidden`; adds that in `head` to `grad_head_VD`. Overwrites the
    probabilities."""
    probabilities_CV.scatter_add_(1, targets_C1, probabilities_CV.new_full((1, 1), -1.0).expand_as(targets_C1))
    grad_CV = probabilities_CV.to(hidden_CD.dtype)
    # Scaling the (C, D) sides is cheaper than scaling (C, V).
    scaled_CD = hidden_CD if scale_C1 is None else hidden_CD * scale_C1.to(hidden_CD.dtype)
    grad_head_VD += grad_CV.T @ scaled_CD
    grad_CD = grad_CV @ head_VD
    return grad_CD if scale_C1 is None else grad_CD * scale_C1.to(grad_CD.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    # The loss is a scalar: its gradient is known up to a factor while the logits are still there.
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
        loss = hidden_TD.new_zeros((), dtype=_wide(hidden_TD))
        needs_grad = any(ctx.needs_input_grad[:2])
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_grad else hidden_TD
        grad_head_VD = torch.zeros_like(head_VD, dtype=loss.dtype) if needs_grad else head_VD
        for chunk in _chunks(hidden_TD, head_VD):
            hidden_CD, targets_C1 = hidden_TD[chunk], targets_T[chunk].unsqueeze(1)
            logits_CV = _logits(hidden_CD, head_VD)
            logprobs_C1 = logits_CV.gather(1, targets_C1)
            if needs_grad:
                # One pass with exponentials: the largest probability is exp(largest logit - lse), which gives lse.
                probabilities_CV = logits_CV.softmax(1)
                logprobs_C1 -= logits_CV.amax(1, keepdim=True) - probabilities_CV.amax(1, keepdim=True).log_()
                grad_hidden_TD[chunk] = _backward(probabilities_CV, targets_C1, None, hidden_CD, head_VD, grad_head_VD)
            else:
                logprobs_C1 -= logits_CV.logsumexp(1, keepdim=True)
            loss -= logprobs_C1.sum()
        if needs_grad:
            ctx.save_for_backward(grad_hidden_TD, grad_head_VD.to(head_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden_TD, grad_head_VD = ctx.saved_tensors
        return grad_hidden_TD * grad.to(grad_hidden_TD.dtype), grad_head_VD * grad.to(grad_head_VD.dtype), None


class _LinearLogprobs(torch.autograd.Function):
    # Each token has its own upstream gradient, so the backward pass computes the logits again.
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
        lse_T1 = hidden_TD.new_empty((hidden_TD.shape[0], 1), dtype=_wide(hidden_TD))
        logprobs_T1 = torch.empty_like(lse_T1)
        for chunk in _chunks(hidden_TD, head_VD):
            logits_CV = _logits(hidden_TD[chunk], head_VD)
            lse_T1[chunk] = logits_CV.logsumexp(1, keepdim=True)
            logprobs_T1[chunk] = logits_CV.gather(1, targets_T[chunk].unsqueeze(1)) - lse_T1[chunk]
        ctx.save_for_backward(hidden_TD, head_VD, targets_T, lse_T1)
        return logprobs_T1.squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_TD, head_VD, targets_T, lse_T1 = ctx.saved_tensors
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_head_VD = torch.zeros_like(head_VD, dtype=lse_T1.dtype)
        for chunk in _chunks(hidden_TD, head_VD):
            probabilities_CV = _logits(hidden_TD[chunk], head_VD).sub_(lse_T1[chunk]).exp_()
            scale_C1, targets_C1 = -grad_T[chunk].unsqueeze(1), targets_T[chunk].unsqueeze(1)
            grad_hidden_TD[chunk] = _backward(
                probabilities_CV, targets_C1, scale_C1, hidden_TD[chunk], head_VD, grad_head_VD
            )
        return grad_hidden_TD, grad_head_VD.to(head_VD.dtype), None
