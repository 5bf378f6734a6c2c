"""Output head and cross-entropy together, a chunk of tokens at a time: the (T, V) logits never exist as a whole.

On a CPU a chunk's logits are widened to float32. On CUDA they stay in the type of the product (bfloat16), every sum
over them is float32, and a kernel turns them in place into their gradient: read twice, written once. It works on one
row per multiprocessor at a time and keeps a third of the row in registers, so that the second reading finds the rest
in the level-2 cache. Each lane has its own running maximum and sum, one step per 16 bytes: the threads wait for
each other once a row, and one exponential in nine is spent on rescaling.

Limits of the kernel: logits of float32, bfloat16 or float16 (float64 is left to torch), contiguous; finite (a row with
NaN or +inf gives NaN); targets in the vocabulary; a row of fewer than 2^31 elements.

Shapes: T tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ling_flow.kernels._triton import jit, narrow, next_power_of_2, tl
from ling_flow.kernels.products import matmul

CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**28}  # logits at a time; on a CPU they should stay in the cache
SCALED_ELEMENTS = 2**24  # of a gradient at a time
VECTOR = 16  # bytes that a thread reads at a time
# Of the kernel: (elements of a row at a time, warps, loads on the way), the first of which is taken; with the gradient
# also blocks that are kept in registers between the two readings.
STATISTICS_TILES = ((2048, 4, 1), (4096, 4, 3))
GRADIENT_TILES = ((16384, 32, 1, 2), (8192, 16, 4, 6))
LOWEST = tl.constexpr(-(2.0**127))  # where a maximum begins: no logit is below
LOG2_E = tl.constexpr(1.4426950408889634)


def linear_cross_entropy(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, z: float = 0.0, losses_T: Tensor | None = None
) -> Tensor:
    """Σ_t -log softmax(head · hidden_t)[targets_t], a float32 scalar. Differentiable in `hidden` and `head`.

    Args:
        z: adds Σ_t z·logsumexp(head · hidden_t)² (PaLM §5), which keeps the logits from drifting.
        losses_T: filled with the loss of each token, without z and without a gradient.
    """
    # Within the function there is no gradient mode, and what an input needs does not depend on it.
    return _LinearCrossEntropy.apply(hidden_TD, head_VD, targets_T, z, losses_T, torch.is_grad_enabled())


def linear_logprobs(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """log softmax(head · hidden_t)[targets_t] for each token, float32 (T). Differentiable in `hidden` and `head`."""
    return _LinearLogprobs.apply(hidden_TD, head_VD, targets_T)


def _chunks(hidden_TD: Tensor, head_VD: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS[hidden_TD.device.type] // head_VD.shape[0])
    for start in range(0, hidden_TD.shape[0], size):
        yield slice(start, start + size)


def _in_kernel(hidden_ND: Tensor) -> bool:
    return hidden_ND.is_cuda and hidden_ND.dtype != torch.float64


def _logits(hidden_CD: Tensor, head_VD: Tensor) -> Tensor:
    return matmul(hidden_CD, head_VD.T).to(_wide(hidden_CD))


def _add_product(sum_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """sum += gradᵀ · hidden."""
    if not sum_VD.is_cuda:  # addmm_ is up to 4 times as fast where (V, D) is large, and changes bits where it is small
        sum_VD += matmul(grad_CV.T, hidden_CD)
    elif sum_VD.dtype == hidden_CD.dtype:
        sum_VD.addmm_(grad_CV.T, hidden_CD)
    else:
        torch.addmm(sum_VD, grad_CV.T, hidden_CD, out_dtype=sum_VD.dtype, out=sum_VD)


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
    _add_product(grad_head_VD, grad_CV, scaled_CD)
    grad_CD = matmul(grad_CV, head_VD)
    return grad_CD if scale_C1 is None else grad_CD * scale_C1.to(grad_CD.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    # The loss is a scalar: its gradient is known up to a factor while the logits are still there.
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_VD: Tensor,
        targets_T: Tensor,
        z: float,
        losses_T: Tensor | None,
        grad_mode: bool,
    ) -> Tensor:
        loss = hidden_TD.new_zeros((), dtype=_wide(hidden_TD))
        differentiable = any(ctx.needs_input_grad[:2])
        needs_grad = differentiable and grad_mode
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_grad else hidden_TD
        grad_head_VD = torch.zeros_like(head_VD, dtype=loss.dtype) if needs_grad else head_VD
        for chunk in _chunks(hidden_TD, head_VD):
            hidden_CD, targets_C1 = hidden_TD[chunk], targets_T[chunk].unsqueeze(1)
            if _in_kernel(hidden_CD):
                logits_CV = hidden_CD @ head_VD.T
                logprobs_C, lse_C = cross_entropy_triton_(logits_CV, targets_T[chunk], z, gradient=needs_grad)
                if needs_grad:
                    _add_product(grad_head_VD, logits_CV, hidden_CD)
                    torch.mm(logits_CV, head_VD, out=grad_hidden_TD[chunk])
                loss -= (logprobs_C - z * lse_C.square()).sum()
                if losses_T is not None:
                    losses_T[chunk] = -logprobs_C
                continue
            logits_CV = _logits(hidden_CD, head_VD)
            logprobs_C1 = logits_CV.gather(1, targets_C1)
            if differentiable:
                # One pass with exponentials: the largest probability is exp(largest logit - lse), which gives lse.
                # Without gradient mode too: a loss in training and in evaluation is the same bits.
                probabilities_CV = logits_CV.softmax(1)
                lse_C1 = logits_CV.amax(1, keepdim=True) - probabilities_CV.amax(1, keepdim=True).log_()
            else:
                lse_C1 = logits_CV.logsumexp(1, keepdim=True)
            if needs_grad:
                if z:
                    probabilities_CV.mul_(1 + 2 * z * lse_C1)
                grad_hidden_TD[chunk] = _backward(probabilities_CV, targets_C1, None, hidden_CD, head_VD, grad_head_VD)
            logprobs_C1 -= lse_C1
            loss -= logprobs_C1.sum()
            if losses_T is not None:
                losses_T[chunk] = -logprobs_C1.squeeze(1)
            if z:
                loss += z * lse_C1.square().sum()
        if needs_grad:
            ctx.save_for_backward(grad_hidden_TD, grad_head_VD.to(head_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden_TD, grad_head_VD = (_scaled(saved, grad) for saved in ctx.saved_tensors)
        return grad_hidden_TD, grad_head_VD, None, None, None, None


def _scaled(saved_ND: Tensor, factor: Tensor) -> Tensor:
    """In the factor's own type: as bfloat16 a factor of 1/700 would be 0.15 % off, and each loss by another share. Some
    rows at a time: all of (V, D) in float32 would be as much memory as everything else of the head."""
    if saved_ND.dtype == factor.dtype:
        return saved_ND * factor
    out_ND = torch.empty_like(saved_ND)
    rows = max(1, SCALED_ELEMENTS // saved_ND.shape[1])
    for part_ND, into_ND in zip(saved_ND.split(rows), out_ND.split(rows), strict=True):
        into_ND.copy_(part_ND.to(factor.dtype) * factor)
    return out_ND


class _LinearLogprobs(torch.autograd.Function):
    # Each token has its own upstream gradient, so the backward pass computes the logits again.
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
        lse_T1 = hidden_TD.new_empty((hidden_TD.shape[0], 1), dtype=_wide(hidden_TD))
        logprobs_T1 = torch.empty_like(lse_T1)
        for chunk in _chunks(hidden_TD, head_VD):
            if _in_kernel(hidden_TD):
                logprobs_C, lse_C = cross_entropy_triton_(hidden_TD[chunk] @ head_VD.T, targets_T[chunk])
                logprobs_T1[chunk], lse_T1[chunk] = logprobs_C.unsqueeze(1), lse_C.unsqueeze(1)
                continue
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
            if _in_kernel(hidden_TD):
                grad_CV = hidden_TD[chunk] @ head_VD.T
                cross_entropy_gradient_triton_(grad_CV, targets_T[chunk], lse_T1[chunk].squeeze(1), -grad_T[chunk])
                _add_product(grad_head_VD, grad_CV, hidden_TD[chunk])
                torch.mm(grad_CV, head_VD, out=grad_hidden_TD[chunk])
                continue
            probabilities_CV = _logits(hidden_TD[chunk], head_VD).sub_(lse_T1[chunk]).exp_()
            scale_C1, targets_C1 = -grad_T[chunk].unsqueeze(1), targets_T[chunk].unsqueeze(1)
            grad_hidden_TD[chunk] = _backward(
                probabilities_CV, targets_C1, scale_C1, hidden_TD[chunk], head_VD, grad_head_VD
            )
        return grad_hidden_TD, grad_head_VD.to(head_VD.dtype), None


# What happens to a chunk of logits on CUDA


def cross_entropy_reference(
    logits_CV: Tensor, targets_C: Tensor, z: float = 0.0, scale_C: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of both: (log-probabilities of the targets, logsumexp, the gradient in the logits of
    Σ scale·(-logprob + z·logsumexp²)), float32 or wider; `scale` 1 where there is none."""
    wide_CV = logits_CV.to(_wide(logits_CV))
    lse_C = wide_CV.logsumexp(1)
    grad_CV = (wide_CV - lse_C.unsqueeze(1)).exp() * (1 + 2 * z * lse_C).unsqueeze(1)
    grad_CV.scatter_add_(1, targets_C.unsqueeze(1), grad_CV.new_full((len(targets_C), 1), -1.0))
    if scale_C is not None:
        grad_CV = grad_CV * scale_C.unsqueeze(1)
    return wide_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1) - lse_C, lse_C, grad_CV


def cross_entropy_triton_(
    logits_CV: Tensor, targets_C: Tensor, z: float = 0.0, gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, logsumexp), float32; with `gradient` the logits become the gradient."""
    logprobs_C = torch.empty(len(targets_C), dtype=torch.float32, device=logits_CV.device)
    lse_C = torch.empty_like(logprobs_C)
    tile = GRADIENT_TILES[0] if gradient else (*STATISTICS_TILES[0], 0)
    _launch(logits_CV, targets_C, logprobs_C, lse_C, None, z, tile, True, gradient)
    return logprobs_C, lse_C


def cross_entropy_gradient_triton_(logits_CV: Tensor, targets_C: Tensor, lse_C: Tensor, scale_C: Tensor) -> None:
    """The logits become the gradient, from the logsumexp that was kept."""
    _launch(logits_CV, targets_C, lse_C, lse_C, scale_C, 0.0, (*STATISTICS_TILES[0], 0), False, True)


def _launch(
    logits_CV: Tensor,
    targets_C: Tensor,
    logprobs_C: Tensor,
    lse_C: Tensor,
    scale_C: Tensor | None,
    z: float,
    tile: tuple[int, int, int, int],
    statistics: bool,
    gradient: bool,
) -> None:
    rows, columns = logits_CV.shape
    if not logits_CV.is_contiguous():
        raise ValueError("the logits must be contiguous")
    if rows:
        most, warps, stages, kept = tile
        vector = VECTOR // logits_CV.element_size()
        block = max(min(most, next_power_of_2(columns)), vector)
        in_pairs = logits_CV.dtype == torch.bfloat16 and columns % 2 == 0  # what is kept is read as 32-bit integers
        _cross_entropy_kernel[(rows,)](
            logits_CV, targets_C.contiguous(), logprobs_C, lse_C.contiguous(),
            lse_C if scale_C is None else scale_C.contiguous(), columns, float(z),
            STATISTICS=statistics, GRADIENT=gradient, SCALE=scale_C is not None, BLOCK=block, VECTOR=vector,
            KEPT=min(kept, columns // block) if in_pairs else 0, STAGES=stages,
            num_warps=max(warps * block // most, 1),
        )  # fmt: skip


@jit
def _exp(x):  # type: ignore[no-untyped-def]
    """Of tl.exp, what costs one multiplication and not three and a comparison: below 2^-126 it is zero."""
    return tl.exp2(x * LOG2_E)


@jit
def _unpacked(pairs, BLOCK: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two bfloat16 of each integer, as float32. A register holds two only if the compiler is given no choice."""
    even = (pairs << 16).to(tl.float32, bitcast=True)
    odd = (pairs & -0x10000).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(even, odd), (BLOCK // VECTOR, VECTOR))


@jit
def _and(largest, sums, x):  # type: ignore[no-untyped-def]
    """Each lane's largest and sum of exponentials, with one more vector."""
    larger = tl.maximum(largest, tl.max(x, 1))
    return larger, sums * _exp(largest - larger) + tl.sum(_exp(x - larger[:, None]), 1)


@jit
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits, targets, logprobs, lse, scale, columns, z,
    STATISTICS: tl.constexpr, GRADIENT: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    KEPT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(targets + row)
    chosen = tl.load(logits + target).to(tl.float32)
    # The row is some blocks that are kept, whole blocks, and a part of one. A lane has a vector of each.
    lane = tl.arange(0, BLOCK // VECTOR)[:, None]
    within = lane * VECTOR + tl.arange(0, VECTOR)[None, :]
    end = columns // BLOCK * BLOCK
    inside = end + within < columns
    kept = ()
    if STATISTICS:
        largest = tl.full((BLOCK // VECTOR,), LOWEST, tl.float32)
        sums = tl.zeros((BLOCK // VECTOR,), tl.float32)
        if KEPT:
            pairs = logits.to(tl.pointer_type(tl.int32)) + lane * (VECTOR // 2) + tl.arange(0, VECTOR // 2)[None, :]
            for block in tl.static_range(KEPT):
                kept += (tl.load(pairs + block * (BLOCK // 2), eviction_policy="evict_first"),)  # type: ignore[assignment]
                largest, sums = _and(largest, sums, _unpacked(kept[block], BLOCK, VECTOR))
        for start in tl.range(KEPT * BLOCK, end, BLOCK, num_stages=STAGES):
            largest, sums = _and(largest, sums, tl.load(logits + start + within).to(tl.float32))
        x = tl.load(logits + end + within, mask=inside, other=0.0).to(tl.float32)
        largest, sums = _and(largest, sums, tl.where(inside, x, float("-inf")))
        peak = tl.max(largest, 0)
        normaliser = peak + tl.log(tl.sum(sums * _exp(largest - peak), 0))
        tl.store(logprobs + row, chosen - normaliser)
        tl.store(lse + row, normaliser)
    else:
        normaliser = tl.load(lse + row)
        tl.debug_barrier()  # all have read the target's logit, which one is about to overwrite
    if GRADIENT:
        upstream = tl.load(scale + row) if SCALE else 1.0
        factor = (1.0 + 2.0 * z * normaliser) * upstream
        for start in tl.range(KEPT * BLOCK, end, BLOCK, num_stages=STAGES):
            x = tl.load(logits + start + within, eviction_policy="evict_first").to(tl.float32)
            grad = narrow(_exp(x - normaliser) * factor, logits.dtype.element_ty)
            tl.store(logits + start + within, grad, eviction_policy="evict_first")
        x = tl.load(logits + end + within, mask=inside, other=0.0).to(tl.float32)
        tl.store(logits + end + within, narrow(_exp(x - normaliser) * factor, logits.dtype.element_ty), mask=inside)
        # Zero, which the compiler cannot know: it would carry what it unpacked above, in twice as many registers.
        zero = tl.program_id(1)
        for block in tl.static_range(KEPT):
            x = _unpacked(kept[block] ^ zero, BLOCK, VECTOR)
            grad = narrow(_exp(x - normaliser) * factor, logits.dtype.element_ty)
            tl.store(logits + block * BLOCK + within, grad, eviction_policy="evict_first")
        tl.debug_barrier()  # another thread has just written the target's element
        tl.store(logits + target, narrow(_exp(chosen - normaliser) * factor - upstream, logits.dtype.element_ty))
