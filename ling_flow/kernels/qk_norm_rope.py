"""From the packed projection to what attention reads, in one pass: queries and keys normed per head (RMSNorm), partly
rotated (half-split pairs), and all three parts with the heads before the positions (Ling 2.0 §2.1).

The definition is the composition of `rms_norm` and `rotate_`: float32 norm, rounded to the type of x, times the weight,
and turned in that type. The kernel stays in float32 and rounds once, so it is the nearer of the two to exact
arithmetic. It keeps the packed projection and one number per head and position for the backward pass; the gradients of
the weights are sums over programs in a fixed order.

A tile is a few positions of a few heads, a row each, in three strips: the two halves of the pairs and what is not
rotated. The halves lie in the same lanes, so that threads exchange nothing but a sum per row, and all loads of a tile
come before its stores: they wait for the memory once.

Limits of the kernels: float32, bfloat16 or float16 (float64 is left to torch); head width up to 1024, fast where its
rotated and its other part are multiples of 16 elements; a row of the projection shorter than 2^31 elements / 16.

Shapes: B batch, S sequence, H query heads, K key-value heads, X = H + 2K heads of the projection, C head width,
R rotated elements.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor

from ling_flow.kernels._triton import ceil_div, jit, narrow, next_power_of_2, tl
from ling_flow.kernels.rms_norm import rms_norm, sum_rows
from ling_flow.kernels.rotary import rotate_

# (positions and heads of a tile, warps), the first of which is taken.
FORWARD_TILES = ((8, 4, 4), (16, 4, 4), (8, 4, 2))
# The same, and tiles on the way.
BACKWARD_TILES = ((8, 4, 4, 1), (8, 4, 4, 2), (4, 4, 4, 1), (4, 4, 4, 3), (16, 2, 4, 1))
PROGRAMS = 1056  # of the backward pass, at most: 8 on each of 132 multiprocessors


def qk_norm_rope(
    qkv_BSX: Tensor,
    query_weight_C: Tensor,
    key_weight_C: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    eps: float,
    positions_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, S, C), keys and values (B, K, S, C). Differentiable in the projection and both weights.

    Args:
        qkv_BSX: (B, S, X·C): the query heads, the key heads, the value heads.
        cos, sin: float32 (S, 1, R/2) or (B, S, 1, R/2).
        positions_first: in memory the results are (B, S, heads, C). In torch they always are.
    """
    if qkv_BSX.is_cuda and qkv_BSX.dtype != torch.float64:
        return qk_norm_rope_triton(
            qkv_BSX, query_weight_C, key_weight_C, cos, sin, heads, kv_heads, eps, positions_first
        )
    return qk_norm_rope_reference(qkv_BSX, query_weight_C, key_weight_C, cos, sin, heads, kv_heads, eps)


def qk_norm_rope_reference(
    qkv_BSX: Tensor,
    query_weight_C: Tensor,
    key_weight_C: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition."""
    qkv_BSXC = qkv_BSX.unflatten(-1, (-1, len(query_weight_C)))
    query_BSHC, key_BSKC, value_BSKC = qkv_BSXC.split([heads, kv_heads, kv_heads], dim=2)
    query_BSHC = rotate_(rms_norm(query_BSHC, query_weight_C.to(qkv_BSX.dtype), eps), cos, sin)
    key_BSKC = rotate_(rms_norm(key_BSKC, key_weight_C.to(qkv_BSX.dtype), eps), cos, sin)
    return query_BSHC.transpose(1, 2), key_BSKC.transpose(1, 2), value_BSKC.transpose(1, 2)


def qk_norm_rope_triton(
    qkv_BSX: Tensor,
    query_weight_C: Tensor,
    key_weight_C: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    eps: float,
    positions_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return _QKNormRope.apply(
        qkv_BSX, query_weight_C, key_weight_C, cos, sin, heads, kv_heads, float(eps), positions_first
    )


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_BSX: Tensor,
        query_weight_C: Tensor,
        key_weight_C: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        kv_heads: int,
        eps: float,
        positions_first: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv_BSX = qkv_BSX.contiguous()
        batch, length, _ = qkv_BSX.shape
        width, half = len(query_weight_C), cos.shape[-1]

        def empty(count: int) -> Tensor:
            if positions_first:
                return qkv_BSX.new_empty((batch, length, count, width)).transpose(1, 2)
            return qkv_BSX.new_empty((batch, count, length, width))

        query_BHSC, key_BKSC, value_BKSC = empty(heads), empty(kv_heads), empty(kv_heads)
        rstd_BXS = torch.empty((batch, heads + kv_heads, length), dtype=torch.float32, device=qkv_BSX.device)
        cos_BSR, sin_BSR = (_table(table, batch, length) for table in (cos, sin))
        block, group, warps = FORWARD_TILES[0]
        constants = _constants(block, group, heads, kv_heads, width, half)
        if qkv_BSX.numel():
            grid = (ceil_div(length, block), (heads + 2 * kv_heads) // constants["GROUP"], batch)
            _forward_kernel[grid](
                qkv_BSX, query_weight_C, key_weight_C, cos_BSR, sin_BSR, query_BHSC, key_BKSC, value_BKSC, rstd_BXS,
                length, *cos_BSR.stride()[:2], *query_BHSC.stride()[1:3], *key_BKSC.stride()[1:3], eps,
                **constants, num_warps=warps,
            )  # fmt: skip
        ctx.heads, ctx.kv_heads = heads, kv_heads
        ctx.save_for_backward(qkv_BSX, query_weight_C, key_weight_C, cos, sin, rstd_BXS)
        return query_BHSC, key_BKSC, value_BKSC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv_BSX, query_weight_C, key_weight_C, cos, sin, rstd_BXS = ctx.saved_tensors
        batch, length, _ = qkv_BSX.shape
        heads, kv_heads, width, half = ctx.heads, ctx.kv_heads, len(query_weight_C), cos.shape[-1]
        grad_BHSC, grad_key_BKSC, grad_value_BKSC = (x if x.stride(-1) == 1 else x.contiguous() for x in grads)
        grad_qkv_BSX = torch.empty_like(qkv_BSX)
        if not qkv_BSX.numel():
            return grad_qkv_BSX, torch.zeros_like(query_weight_C), torch.zeros_like(key_weight_C), *(None,) * 6
        cos_BSR, sin_BSR = (_table(table, batch, length) for table in (cos, sin))
        block, group, warps, stages = BACKWARD_TILES[0]
        constants = _constants(block, group, heads, kv_heads, width, half)
        groups = (heads + 2 * kv_heads) // constants["GROUP"]
        span = ceil_div(ceil_div(length, block) * groups * batch, PROGRAMS) * block
        grid = (ceil_div(length, span), groups, batch)
        # One row per program, the queries' before the keys', summed at the end.
        of_query, of_key = (count // constants["GROUP"] * grid[0] * batch for count in (heads, kv_heads))
        partial_NC = torch.empty((of_query + of_key, width), dtype=torch.float32, device=qkv_BSX.device)
        _backward_kernel[grid](
            grad_BHSC, grad_key_BKSC, grad_value_BKSC, qkv_BSX, query_weight_C, key_weight_C, cos_BSR, sin_BSR,
            rstd_BXS, grad_qkv_BSX, partial_NC, length, span, *cos_BSR.stride()[:2], *grad_BHSC.stride()[:3],
            *grad_key_BKSC.stride()[:3], *grad_value_BKSC.stride()[:3], STAGES=stages, **constants, num_warps=warps,
        )  # fmt: skip
        grad_query_weight_C, grad_key_weight_C = sum_rows(partial_NC, of_query, query_weight_C.dtype)
        return grad_qkv_BSX, grad_query_weight_C, grad_key_weight_C.to(key_weight_C.dtype), *(None,) * 6


def _table(table: Tensor, batch: int, length: int) -> Tensor:
    """(B, S, R/2), of no memory of its own where the rows are alike."""
    return table.squeeze(-2).contiguous().expand(batch, length, -1)


def _constants(block: int, group: int, heads: int, kv_heads: int, width: int, half: int) -> dict[str, int]:
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "GROUP": gcd(heads, kv_heads, group),
        "WIDTH": width,
        "HALF": half,
        "BLOCK_S": block,
        "BLOCK_C": next_power_of_2(width),
        "BLOCK_H": next_power_of_2(half),
        "BLOCK_R": next_power_of_2(width - 2 * half),  # at least 1, masked where nothing is left
    }


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    qkv, query_weight, key_weight, cos, sin, query, key, value, rstd, length, table_batch, table_position,
    query_head, query_position, key_head, key_position, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ROW: tl.constexpr = (HEADS + 2 * KV_HEADS) * WIDTH
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BLOCK_S
    head = tl.program_id(1) * GROUP
    row = tl.arange(0, BLOCK_S * GROUP)
    position, within = row // GROUP, (row % GROUP).to(tl.int64)
    real = (position < length - first)[:, None]
    source = qkv + (batch * length + first) * ROW + head * WIDTH + (position * ROW + row % GROUP * WIDTH)[:, None]
    if head >= HEADS + KV_HEADS:
        to = value + batch * KV_HEADS * length * WIDTH + first.to(tl.int64) * key_position
        to += (head - HEADS - KV_HEADS).to(tl.int64) * key_head
        to += (within * key_head + position * key_position)[:, None]
        column = tl.arange(0, BLOCK_C)[None, :]
        inside = real & (column < WIDTH)
        tl.store(to + column, tl.load(source + column, mask=inside), mask=inside)
        return
    if head < HEADS:
        weight = query_weight
        to = query + batch * HEADS * length * WIDTH + first.to(tl.int64) * query_position
        to += head.to(tl.int64) * query_head + (within * query_head + position * query_position)[:, None]
    else:
        weight = key_weight
        to = key + batch * KV_HEADS * length * WIDTH + first.to(tl.int64) * key_position
        to += (head - HEADS).to(tl.int64) * key_head + (within * key_head + position * key_position)[:, None]
    low, other = tl.arange(0, BLOCK_H)[None, :], 2 * HALF + tl.arange(0, BLOCK_R)[None, :]
    is_low, is_other = low < HALF, other < WIDTH
    x_1 = tl.load(source + low, mask=real & is_low, other=0.0).to(tl.float32)
    x_2 = tl.load(source + HALF + low, mask=real & is_low, other=0.0).to(tl.float32)
    x_3 = tl.load(source + other, mask=real & is_other, other=0.0).to(tl.float32)
    table = batch * table_batch + first.to(tl.int64) * table_position + (position * table_position)[:, None]
    cosine = tl.load(cos + table + low, mask=real & is_low, other=0.0)
    sine = tl.load(sin + table + low, mask=real & is_low, other=0.0)
    squares = tl.sum(x_1 * x_1 + x_2 * x_2, 1) + tl.sum(x_3 * x_3, 1)
    scale = tl.rsqrt(squares * (1.0 / WIDTH) + eps)
    rstd += (batch * (HEADS + KV_HEADS) + head + within) * length + first
    tl.store(rstd + position, scale, mask=position < length - first)
    x_1 *= scale[:, None] * tl.load(weight + low, mask=is_low, other=0.0).to(tl.float32)
    x_2 *= scale[:, None] * tl.load(weight + HALF + low, mask=is_low, other=0.0).to(tl.float32)
    x_3 *= scale[:, None] * tl.load(weight + other, mask=is_other, other=0.0).to(tl.float32)
    tl.store(to + low, narrow(x_1 * cosine - x_2 * sine, query.dtype.element_ty), mask=real & is_low)
    tl.store(to + HALF + low, narrow(x_2 * cosine + x_1 * sine, query.dtype.element_ty), mask=real & is_low)
    tl.store(to + other, narrow(x_3, query.dtype.element_ty), mask=real & is_other)


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad_query, grad_key, grad_value, qkv, query_weight, key_weight, cos, sin, rstd, grad_qkv, partial,
    length, span, table_batch, table_position, query_batch, query_head, query_position, key_batch, key_head,
    key_position, value_batch, value_head, value_position, STAGES: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ROW: tl.constexpr = (HEADS + 2 * KV_HEADS) * WIDTH
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * span
    last = min(first + span, length)
    head = tl.program_id(1) * GROUP
    row = tl.arange(0, BLOCK_S * GROUP)
    within = (row % GROUP).to(tl.int64)
    here = batch * length * ROW + head * WIDTH + within[:, None] * WIDTH
    if head >= HEADS + KV_HEADS:
        grad = grad_value + batch * value_batch + ((head - HEADS - KV_HEADS + within) * value_head)[:, None]
        column = tl.arange(0, BLOCK_C)[None, :]
        for start in tl.range(first, last, BLOCK_S, num_stages=STAGES):
            position = (start + row // GROUP).to(tl.int64)[:, None]
            inside = (position < last) & (column < WIDTH)
            x = tl.load(grad + position * value_position + column, mask=inside)
            tl.store(grad_qkv + here + position * ROW + column, x, mask=inside)
        return
    if head < HEADS:
        weight, step = query_weight, query_position
        grad = grad_query + batch * query_batch + ((head + within) * query_head)[:, None]
    else:
        weight, step = key_weight, key_position
        grad = grad_key + batch * key_batch + ((head - HEADS + within) * key_head)[:, None]
    low, other = tl.arange(0, BLOCK_H)[None, :], 2 * HALF + tl.arange(0, BLOCK_R)[None, :]
    is_low, is_other = low < HALF, other < WIDTH
    weight_1 = tl.load(weight + low, mask=is_low, other=0.0).to(tl.float32)
    weight_2 = tl.load(weight + HALF + low, mask=is_low, other=0.0).to(tl.float32)
    weight_3 = tl.load(weight + other, mask=is_other, other=0.0).to(tl.float32)
    rstd += (batch * (HEADS + KV_HEADS) + head + within) * length
    cos += batch * table_batch
    sin += batch * table_batch
    sum_1 = tl.zeros((BLOCK_S * GROUP, BLOCK_H), tl.float32)
    sum_2 = tl.zeros((BLOCK_S * GROUP, BLOCK_H), tl.float32)
    sum_3 = tl.zeros((BLOCK_S * GROUP, BLOCK_R), tl.float32)
    for start in tl.range(first, last, BLOCK_S, num_stages=STAGES):
        position = (start + row // GROUP).to(tl.int64)
        scale = tl.load(rstd + position, mask=position < last, other=0.0)[:, None]
        position = position[:, None]
        in_low, in_other = (position < last) & is_low, (position < last) & is_other
        source, slope = qkv + here + position * ROW, grad + position * step
        x_1 = tl.load(source + low, mask=in_low, other=0.0).to(tl.float32) * scale
        x_2 = tl.load(source + HALF + low, mask=in_low, other=0.0).to(tl.float32) * scale
        x_3 = tl.load(source + other, mask=in_other, other=0.0).to(tl.float32) * scale
        turned_1 = tl.load(slope + low, mask=in_low, other=0.0).to(tl.float32)
        turned_2 = tl.load(slope + HALF + low, mask=in_low, other=0.0).to(tl.float32)
        grad_3 = tl.load(slope + other, mask=in_other, other=0.0).to(tl.float32)
        cosine = tl.load(cos + position * table_position + low, mask=in_low, other=0.0)
        sine = tl.load(sin + position * table_position + low, mask=in_low, other=0.0)
        grad_1 = turned_1 * cosine + turned_2 * sine
        grad_2 = turned_2 * cosine - turned_1 * sine
        sum_1 += grad_1 * x_1
        sum_2 += grad_2 * x_2
        sum_3 += grad_3 * x_3
        grad_1 *= weight_1
        grad_2 *= weight_2
        grad_3 *= weight_3
        mean = tl.sum(grad_1 * x_1 + grad_2 * x_2, 1) + tl.sum(grad_3 * x_3, 1)
        mean = mean[:, None] * (1.0 / WIDTH)
        to = grad_qkv + here + position * ROW
        tl.store(to + low, narrow((grad_1 - x_1 * mean) * scale, to.dtype.element_ty), mask=in_low)
        tl.store(to + HALF + low, narrow((grad_2 - x_2 * mean) * scale, to.dtype.element_ty), mask=in_low)
        tl.store(to + other, narrow((grad_3 - x_3 * mean) * scale, to.dtype.element_ty), mask=in_other)
    # Groups of heads, then batches, then spans: the queries' rows are one block.
    program = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)) * tl.num_programs(0) + tl.program_id(0)
    partial += program * WIDTH
    low, other = tl.arange(0, BLOCK_H), 2 * HALF + tl.arange(0, BLOCK_R)
    tl.store(partial + low, tl.sum(sum_1, 0), mask=low < HALF)
    tl.store(partial + HALF + low, tl.sum(sum_2, 0), mask=low < HALF)
    tl.store(partial + other, tl.sum(sum_3, 0), mask=other < WIDTH)
