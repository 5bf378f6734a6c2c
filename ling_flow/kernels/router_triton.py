"""The router on CUDA; its definition is `router.route_reference` with ties by `choose_experts_reference`.

Logits need more than bfloat16 and TF32 give: a choice between experts hangs on them. With x in bfloat16, the float32
weight is split into three bfloat16 numbers whose sum it is exactly (8 + 8 + 8 bits), and one matrix product adds up
the three; what is left is the rounding of float32 sums, at half the cost of TF32 in three passes. In the backward
pass gradient and weight are split in two, which is right to 2^-18 of each (TF32: 2^-11). Other types of x go through
torch's float32 products.

Choice, weights and counts are one kernel over the logits; nothing is added in an order that varies.

Limits of the kernels: contiguous; at most 1024 experts (padded to powers of two per group), groups of at least two
experts, top_k at most 32 and at most the experts of the kept groups. Of equal scores the lowest index wins, NaN before
all.

Shapes: T tokens, D hidden, E experts, K chosen, G groups, M experts of a group, P parts; a product is (M, N) over K.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ling_flow.kernels._triton import ceil_div, dot, jit, narrow, next_power_of_2, tl


class _Tile(NamedTuple):
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Three stages of four 16 KiB operands fill 192 of 227 KiB; 128×128 sums take 64 registers of each of 256 threads.
LARGE = _Tile(128, 128, 64, 8, 3)
SMALL = _Tile(64, 64, 64, 4, 4)  # few tokens: more programs than memory traffic matters
FEW = 4096  # tokens up to which there are few
PROGRAMS = 132  # multiprocessors to fill when the sum over tokens is split
FORWARD_PARTS, BACKWARD_PARTS = 3, 2
CHOICE_ELEMENTS, CHOICE_WARPS = 2048, 4  # scores of a program


def route_triton(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, top_k: int, n_group: int, topk_group: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(indices, weights, logits, counts) as in `router.Routed`."""
    return _Route.apply(x_TD, weight_ED, bias_E, top_k, n_group, topk_group, scaling)


class _Route(torch.autograd.Function):
    # Saves the logits, which are a result, and the indices.
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_ED: Tensor,
        bias_E: Tensor,
        top_k: int,
        n_group: int,
        topk_group: int,
        scaling: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits_TE = logits_triton(x_TD, weight_ED)
        indices_TK, weights_TK, counts_E = choose_triton(logits_TE, bias_E, top_k, n_group, topk_group, scaling)
        ctx.mark_non_differentiable(indices_TK, counts_E)
        ctx.set_materialize_grads(False)
        ctx.scaling = scaling
        ctx.save_for_backward(x_TD, weight_ED, logits_TE, indices_TK)
        return indices_TK, weights_TK, logits_TE, counts_E

    @staticmethod
    def backward(
        ctx: Any, _: None, grad_TK: Tensor | None, grad_TE: Tensor | None, __: None
    ) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED, logits_TE, indices_TK = ctx.saved_tensors
        nothing = (None,) * 5
        if grad_TK is None and grad_TE is None:
            return None, None, *nothing
        parts = BACKWARD_PARTS if x_TD.dtype == torch.bfloat16 else 1
        grad_PTE = logits_gradient_triton(grad_TK, grad_TE, logits_TE, indices_TK, ctx.scaling, parts)
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_x_TD = input_gradient_triton(grad_PTE, weight_ED, x_TD.dtype) if wants_x else None
        grad_ED = weight_gradient_triton(grad_PTE, x_TD).to(weight_ED.dtype) if wants_weight else None
        return grad_x_TD, grad_ED, *nothing


# The three products


def split_triton(x: Tensor, parts: int) -> Tensor:
    """(parts, ...) bfloat16, which sum to x: the first is x rounded, the next what is missing, and so on."""
    if x.dtype == torch.bfloat16:
        return x.contiguous().unsqueeze(0)
    out = torch.empty((parts, *x.shape), dtype=torch.bfloat16, device=x.device)
    if x.numel():
        _split_kernel[(ceil_div(x.numel(), 1024),)](x.contiguous(), out, x.numel(), PARTS=parts, BLOCK=1024)
    return out


def logits_triton(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x · weightᵀ, float32 (T, E)."""
    if x_TD.dtype != torch.bfloat16:
        return x_TD.float() @ weight_ED.float().T
    x_TD = x_TD.contiguous()
    logits_TE = torch.empty((len(x_TD), len(weight_ED)), dtype=torch.float32, device=x_TD.device)
    weight_PED = split_triton(weight_ED, FORWARD_PARTS)
    _product(x_TD.unsqueeze(0), weight_PED.mT, logits_TE.unsqueeze(0))
    return logits_TE


def input_gradient_triton(grad_PTE: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> Tensor:
    """grad · weight in `dtype` (T, D)."""
    if dtype != torch.bfloat16:
        return (grad_PTE[0] @ weight_ED.float()).to(dtype)
    grad_TD = torch.empty((grad_PTE.shape[1], weight_ED.shape[1]), dtype=dtype, device=weight_ED.device)
    _product(grad_PTE, split_triton(weight_ED, BACKWARD_PARTS), grad_TD.unsqueeze(0))
    return grad_TD


def weight_gradient_triton(grad_PTE: Tensor, x_TD: Tensor) -> Tensor:
    """gradᵀ · x, float32 (E, D)."""
    if x_TD.dtype != torch.bfloat16:
        return grad_PTE[0].T @ x_TD.float()
    _, tokens, experts = grad_PTE.shape
    tile = SMALL if tokens <= FEW else LARGE
    programs = ceil_div(experts, tile.rows) * ceil_div(x_TD.shape[1], tile.columns)
    splits = max(1, min(PROGRAMS // programs, ceil_div(tokens, 512)))
    sums_SED = torch.empty((splits, experts, x_TD.shape[1]), dtype=torch.float32, device=x_TD.device)
    _product(grad_PTE.mT, x_TD.contiguous().unsqueeze(0), sums_SED, tile)
    return sums_SED[0] if splits == 1 else sums_SED.sum(0)


def _product(a_PMK: Tensor, b_PKN: Tensor, out_SMN: Tensor, tile: _Tile | None = None) -> None:
    """out = Σ a_i · b_j over the parts with i = 0 or j = 0; with several outs, each over its share of K."""
    splits, rows, columns = out_SMN.shape
    depth = a_PMK.shape[2]
    tile = tile or (SMALL if rows <= FEW else LARGE)
    if out_SMN.numel():
        share = ceil_div(ceil_div(depth, tile.depth), splits) * tile.depth
        grid = (ceil_div(columns, tile.columns), ceil_div(rows, tile.rows), splits)
        _product_kernel[grid](
            a_PMK, b_PKN, out_SMN, rows, columns, depth, share, *a_PMK.stride(), *b_PKN.stride(),
            A_PARTS=len(a_PMK), B_PARTS=len(b_PKN), BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


@jit
def _split_kernel(x, out, elements, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(x + at, mask=at < elements, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        piece = narrow(rest, out.dtype.element_ty)
        tl.store(out + tl.full((), part, tl.int64) * elements + at, piece, mask=at < elements)
        rest -= piece.to(tl.float32)


@jit
def _product_kernel(  # type: ignore[no-untyped-def]
    a, b, out, rows, columns, depth, share, a_part, a_row, a_depth, b_part, b_depth, b_column,
    A_PARTS: tl.constexpr, B_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = tl.arange(0, BLOCK_K)
    first = tl.program_id(2) * share
    a += row.to(tl.int64)[:, None] * a_row + (first.to(tl.int64) * a_depth + within[None, :] * a_depth)
    b += column.to(tl.int64)[None, :] * b_column + (first.to(tl.int64) * b_depth + within[:, None] * b_depth)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, tl.minimum(first + share, depth), BLOCK_K):
        left = within < depth - start
        a_mask = (row < rows)[:, None] & left[None, :]
        b_mask = (column < columns)[None, :] & left[:, None]
        a_0 = tl.load(a, mask=a_mask, other=0.0)
        b_0 = tl.load(b, mask=b_mask, other=0.0)
        sums = dot(a_0, b_0, sums)
        if A_PARTS > 1:
            sums = dot(tl.load(a + a_part, mask=a_mask, other=0.0), b_0, sums)
        if B_PARTS > 1:
            sums = dot(a_0, tl.load(b + b_part, mask=b_mask, other=0.0), sums)
        if B_PARTS > 2:
            sums = dot(a_0, tl.load(b + 2 * b_part, mask=b_mask, other=0.0), sums)
        a += BLOCK_K * a_depth
        b += BLOCK_K * b_depth
    out += (tl.program_id(2).to(tl.int64) * rows + tl.program_id(1) * BLOCK_M) * columns + tl.program_id(0) * BLOCK_N
    to = tl.arange(0, BLOCK_M)[:, None] * columns + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out + to, narrow(sums, out.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


# The choice


def choose_triton(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, n_group: int, topk_group: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(indices int64, weights float32, counts int64) from float32 logits."""
    tokens, experts = logits_TE.shape
    members, device = experts // n_group, logits_TE.device
    groups = next_power_of_2(n_group)
    padded = groups * next_power_of_2(members)
    if padded > 1024 or top_k > min(topk_group * members, 32) or (topk_group < n_group and members < 2):
        raise ValueError(f"no kernel for {top_k} of {experts} experts in {topk_group} of {n_group} groups")
    block = min(CHOICE_ELEMENTS // padded, 64)
    programs = ceil_div(tokens, block)
    indices_TK = torch.empty((tokens, top_k), dtype=torch.int64, device=device)
    weights_TK = torch.empty((tokens, top_k), dtype=torch.float32, device=device)
    counts_NE = torch.empty((programs, experts), dtype=torch.int32, device=device)
    if tokens:
        _choose_kernel[(programs,)](
            logits_TE, bias_E, indices_TK, weights_TK, counts_NE, tokens, float(scaling), EXPERTS=experts,
            MEMBERS=members, GROUPS=n_group, KEPT=topk_group, TOP_K=top_k, BLOCK_T=block, BLOCK_G=groups,
            BLOCK_M=padded // groups, BLOCK_K=next_power_of_2(top_k), num_warps=CHOICE_WARPS,
        )  # fmt: skip
    return indices_TK, weights_TK, counts_NE.sum(0)


def logits_gradient_triton(
    grad_TK: Tensor | None,
    grad_TE: Tensor | None,
    logits_TE: Tensor,
    indices_TK: Tensor,
    scaling: float,
    parts: int,
) -> Tensor:
    """Gradient in the logits, of the weights and of the logits themselves: (parts, T, E) bfloat16 that sum to it, or
    with one part float32."""
    (tokens, experts), top_k = logits_TE.shape, indices_TK.shape[1]
    dtype = torch.float32 if parts == 1 else torch.bfloat16
    grad_PTE = torch.empty((parts, tokens, experts), dtype=dtype, device=logits_TE.device)
    padded = next_power_of_2(experts)
    block = min(CHOICE_ELEMENTS // padded, 64)
    if tokens:
        _choose_gradient_kernel[(ceil_div(tokens, block),)](
            logits_TE if grad_TK is None else grad_TK.contiguous(),
            logits_TE if grad_TE is None else grad_TE.contiguous(), logits_TE, indices_TK, grad_PTE, tokens,
            float(scaling), OF_WEIGHTS=grad_TK is not None, OF_LOGITS=grad_TE is not None, PARTS=parts,
            EXPERTS=experts, TOP_K=top_k, BLOCK_T=block, BLOCK_E=padded, BLOCK_K=next_power_of_2(top_k),
            num_warps=CHOICE_WARPS,
        )  # fmt: skip
    return grad_PTE


@jit
def _ordered(x):  # type: ignore[no-untyped-def]
    """int32 in the order of the float32 numbers, above the two least of its range; NaN is the largest."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)


@jit
def _choose_kernel(  # type: ignore[no-untyped-def]
    logits, bias, indices, weights, counts, tokens, scaling,
    EXPERTS: tl.constexpr, MEMBERS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    BLOCK_E: tl.constexpr = BLOCK_G * BLOCK_M
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    row = tl.arange(0, BLOCK_T)
    real = row < tokens - first
    logits += first * EXPERTS
    group = tl.arange(0, BLOCK_G)[None, :, None]
    member = tl.arange(0, BLOCK_M)[None, None, :]
    expert = group * MEMBERS + member
    there = (group < GROUPS) & (member < MEMBERS)
    score = tl.load(logits + row[:, None, None] * EXPERTS + expert, mask=real[:, None, None] & there, other=0.0)
    biased = tl.sigmoid(score.to(tl.float32)) + tl.load(bias + expert, mask=there, other=0.0)
    key = tl.where(there, _ordered(biased), -0x80000000)
    if KEPT < GROUPS:
        # The two best of each group, and how many groups come before it (in floats: of integers LLVM makes a stack).
        hidden = tl.where(there, biased, float("-inf"))
        hidden = tl.where(hidden == hidden, hidden, float("inf"))
        best = tl.max(hidden, 2)
        is_best = hidden == best[:, :, None]
        place = tl.min(tl.where(is_best, member, BLOCK_M), 2)
        second = tl.max(tl.where(member == place[:, :, None], float("-inf"), hidden), 2)
        worth = _ordered(best + second)
        number = tl.arange(0, BLOCK_G)
        mine, theirs = worth[:, :, None], worth[:, None, :]
        before = (theirs > mine) | ((theirs == mine) & (number[None, None, :] < number[None, :, None]))
        rank = tl.sum(tl.where(before & (number < GROUPS)[None, None, :], 1.0, 0.0), 2)
        key = tl.where((rank[:, :, None] < KEPT) | (key == -0x80000000), key, -0x7FFFFFFF)
    column = tl.arange(0, BLOCK_E)
    key = tl.reshape(key, (BLOCK_T, BLOCK_E))
    choice = tl.arange(0, BLOCK_K)
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for k in tl.static_range(TOP_K):
        top = tl.max(key, 1)
        place = tl.min(tl.where(key == top[:, None], column[None, :], BLOCK_E), 1)
        chosen = tl.where(choice[None, :] == k, ((place // BLOCK_M) * MEMBERS + place % BLOCK_M)[:, None], chosen)
        key = tl.where(column[None, :] == place[:, None], -0x80000000, key)
    known = real[:, None] & (choice < TOP_K)[None, :]
    value = tl.sigmoid(tl.load(logits + row[:, None] * EXPERTS + chosen, mask=known, other=0.0).to(tl.float32))
    if TOP_K == 1:
        weight = value * scaling
    else:
        weight = value * (scaling / (tl.sum(tl.where(known, value, 0.0), 1) + 1e-20))[:, None]
    to = first * TOP_K + row[:, None] * TOP_K + choice[None, :]
    tl.store(indices + to, chosen.to(tl.int64), mask=known)
    tl.store(weights + to, weight, mask=known)
    count = tl.sum(tl.where(real[:, None] & (key == -0x80000000), 1.0, 0.0), 0).to(tl.int32)
    of = (column // BLOCK_M) * MEMBERS + column % BLOCK_M
    inside = (column // BLOCK_M < GROUPS) & (column % BLOCK_M < MEMBERS)  # the others were so from the start
    tl.store(counts + tl.program_id(0).to(tl.int64) * EXPERTS + of, count, mask=inside)


@jit
def _choose_gradient_kernel(  # type: ignore[no-untyped-def]
    grad_weights, grad_logits, logits, indices, out, tokens, scaling,
    OF_WEIGHTS: tl.constexpr, OF_LOGITS: tl.constexpr, PARTS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    row = tl.arange(0, BLOCK_T)
    real = row < tokens - first
    column = tl.arange(0, BLOCK_E)
    at = first * EXPERTS + row[:, None] * EXPERTS + column[None, :]
    inside = real[:, None] & (column < EXPERTS)[None, :]
    grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if OF_LOGITS:
        grad = tl.load(grad_logits + at, mask=inside, other=0.0)
    if OF_WEIGHTS:
        choice = tl.arange(0, BLOCK_K)
        known = real[:, None] & (choice < TOP_K)[None, :]
        from_ = first * TOP_K + row[:, None] * TOP_K + choice[None, :]
        chosen = tl.load(indices + from_, mask=known, other=0).to(tl.int32)
        upstream = tl.load(grad_weights + from_, mask=known, other=0.0)
        value = tl.sigmoid(
            tl.load(logits + first * EXPERTS + row[:, None] * EXPERTS + chosen, mask=known, other=0.0).to(tl.float32)
        )
        if TOP_K > 1:
            total = tl.sum(tl.where(known, value, 0.0), 1) + 1e-20
            upstream = (upstream - (tl.sum(upstream * value, 1) / total)[:, None]) / total[:, None]
        change = upstream * scaling * value * (1.0 - value)
        for k in tl.static_range(TOP_K):
            here = choice[None, :] == k
            expert = tl.sum(tl.where(here, chosen, 0), 1)
            grad += tl.where(column[None, :] == expert[:, None], tl.sum(tl.where(here, change, 0.0), 1)[:, None], 0.0)
    for part in tl.static_range(PARTS):
        piece = narrow(grad, out.dtype.element_ty)
        tl.store(out + tl.full((), part, tl.int64) * tokens * EXPERTS + at, piece, mask=inside)
        grad -= piece.to(tl.float32)
