"""From the packed projection to what attention reads, in one pass: queries and keys normed per head (RMSNorm), partly
rotated (half-split pairs), and all three parts with the heads before the positions (Ling 2.0 §2.1).

The definition is the composition of `rms_norm` and `rotate_`: float32 norm, rounded to the type of x, times the weight,
and turned in that type. The kernel stays in float32 and rounds once, so it is the nearer of the two to exact
arithmetic. It keeps the packed projection and one number per head and position for the backward pass; the gradients of
the weights are sums over programs in a fixed order.

Limits of the kernels: float32, bfloat16 or float16; head width up to 1024, fast where its rotated and its other part
are multiples of 16 elements; a row of the projection shorter than 2^31 elements / 16.

Shapes: B batch, S sequence, H query heads, K key-value heads, X = H + 2K heads of the projection, C head width,
R rotated elements.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ling_flow.kernels._triton import ceil_div, jit, narrow, next_power_of_2, tl
from ling_flow.kernels.rms_norm import rms_norm
from ling_flow.kernels.rotary import rotate_

POSITIONS, GROUP, WARPS = 16, 4, 4  # of a program: positions, heads that share cos and sin, warps


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
        positions_first: in memory the results are (B, S, heads, C). On a CPU they always are.
    """
    if qkv_BSX.is_cuda:
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
        grid, block, constants = _launch(batch, length, heads, kv_heads, width, half)
        if qkv_BSX.numel():
            _forward_kernel[grid](
                qkv_BSX, query_weight_C, key_weight_C, cos_BSR, sin_BSR, query_BHSC, key_BKSC, value_BKSC, rstd_BXS,
                length, *cos_BSR.stride()[:2], *query_BHSC.stride()[1:3], *key_BKSC.stride()[1:3], eps,
                BLOCK_S=block, **constants, num_warps=WARPS,
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
        cos_BSR, sin_BSR = (_table(table, batch, length) for table in (cos, sin))
        grid, block, constants = _launch(batch, length, heads, kv_heads, width, half)
        groups = (heads + kv_heads) // constants["GROUP"]
        # One row per program, summed at the end.
        partial_NGC = torch.empty((grid[2] * grid[0], groups, width), dtype=torch.float32, device=qkv_BSX.device)
        if qkv_BSX.numel():
            _backward_kernel[grid](
                grad_BHSC, grad_key_BKSC, grad_value_BKSC, qkv_BSX, query_weight_C, key_weight_C, cos_BSR, sin_BSR,
                rstd_BXS, grad_qkv_BSX, partial_NGC, length, *cos_BSR.stride()[:2], *grad_BHSC.stride()[:3],
                *grad_key_BKSC.stride()[:3], *grad_value_BKSC.stride()[:3],
                BLOCK_S=block, **constants, num_warps=WARPS,
            )  # fmt: skip
        of_query, of_key = partial_NGC.split([heads // constants["GROUP"], kv_heads // constants["GROUP"]], 1)
        grad_query_weight_C = of_query.sum((0, 1)).to(query_weight_C.dtype)
        return grad_qkv_BSX, grad_query_weight_C, of_key.sum((0, 1)).to(key_weight_C.dtype), *(None,) * 6


def _table(table: Tensor, batch: int, length: int) -> Tensor:
    """(B, S, R/2), of no memory of its own where the rows are alike."""
    return table.squeeze(-2).contiguous().expand(batch, length, -1)


def _launch(
    batch: int, length: int, heads: int, kv_heads: int, width: int, half: int
) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """(grid, positions of a program, constants)."""
    group = math.gcd(heads, kv_heads, GROUP)
    block = min(POSITIONS, next_power_of_2(length))
    constants = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "WIDTH": width,
        "HALF": half,
        "BLOCK_H": next_power_of_2(half),
        "BLOCK_R": next_power_of_2(width - 2 * half),  # at least 1, masked where nothing is left
    }
    return (ceil_div(length, block), (heads + 2 * kv_heads) // group, batch), block, constants


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    qkv, query_weight, key_weight, cos, sin, query, key, value, rstd, length, table_batch, table_position,
    query_head, query_position, key_head, key_position, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ROW: tl.constexpr = (HEADS + 2 * KV_HEADS) * WIDTH
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BLOCK_S
    head = tl.program_id(1) * GROUP
    position = tl.arange(0, BLOCK_S)
    real = position < length - first
    # Each head in three parts: the two halves of the pairs, and what is not rotated.
    low, other = tl.arange(0, BLOCK_H), 2 * HALF + tl.arange(0, BLOCK_R)
    in_low, in_other = real[:, None] & (low < HALF)[None, :], real[:, None] & (other < WIDTH)[None, :]
    source = qkv + (batch * length + first) * ROW + head * WIDTH + position[:, None] * ROW
    if head >= HEADS + KV_HEADS:
        to = value + batch * KV_HEADS * length * WIDTH + first.to(tl.int64) * key_position
        to += (head - HEADS - KV_HEADS).to(tl.int64) * key_head + position[:, None] * key_position
        for _ in tl.static_range(GROUP):
            tl.store(to + low[None, :], tl.load(source + low[None, :], mask=in_low), mask=in_low)
            tl.store(to + HALF + low[None, :], tl.load(source + HALF + low[None, :], mask=in_low), mask=in_low)
            tl.store(to + other[None, :], tl.load(source + other[None, :], mask=in_other), mask=in_other)
            source += WIDTH
            to += key_head
        return
    if head < HEADS:
        weight, step = query_weight, query_head
        to = query + batch * HEADS * length * WIDTH + first.to(tl.int64) * query_position
        to += head.to(tl.int64) * query_head + position[:, None] * query_position
    else:
        weight, step = key_weight, key_head
        to = key + batch * KV_HEADS * length * WIDTH + first.to(tl.int64) * key_position
        to += (head - HEADS).to(tl.int64) * key_head + position[:, None] * key_position
    weight_1 = tl.load(weight + low, mask=low < HALF, other=0.0).to(tl.float32)[None, :]
    weight_2 = tl.load(weight + HALF + low, mask=low < HALF, other=0.0).to(tl.float32)[None, :]
    weight_3 = tl.load(weight + other, mask=other < WIDTH, other=0.0).to(tl.float32)[None, :]
    table = batch * table_batch + first.to(tl.int64) * table_position + position[:, None] * table_position
    cosine = tl.load(cos + table + low[None, :], mask=in_low, other=0.0)
    sine = tl.load(sin + table + low[None, :], mask=in_low, other=0.0)
    rstd += (batch * (HEADS + KV_HEADS) + head) * length + first
    for _ in tl.static_range(GROUP):
        x_1 = tl.load(source + low[None, :], mask=in_low, other=0.0).to(tl.float32)
        x_2 = tl.load(source + HALF + low[None, :], mask=in_low, other=0.0).to(tl.float32)
        x_3 = tl.load(source + other[None, :], mask=in_other, other=0.0).to(tl.float32)
        squares = tl.sum(x_1 * x_1 + x_2 * x_2, 1) + tl.sum(x_3 * x_3, 1)
        scale = 1.0 / tl.sqrt_rn(squares / WIDTH + eps)
        tl.store(rstd + position, scale, mask=real)
        x_1 = x_1 * scale[:, None] * weight_1
        x_2 = x_2 * scale[:, None] * weight_2
        x_3 = x_3 * scale[:, None] * weight_3
        tl.store(to + low[None, :], narrow(x_1 * cosine - x_2 * sine, query.dtype.element_ty), mask=in_low)
        tl.store(to + HALF + low[None, :], narrow(x_2 * cosine + x_1 * sine, query.dtype.element_ty), mask=in_low)
        tl.store(to + other[None, :], narrow(x_3, query.dtype.element_ty), mask=in_other)
        source += WIDTH
        to += step
        rstd += length


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad_query, grad_key, grad_value, qkv, query_weight, key_weight, cos, sin, rstd, grad_qkv, partial,
    length, table_batch, table_position, query_batch, query_head, query_position, key_batch, key_head, key_position,
    value_batch, value_head, value_position,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ROW: tl.constexpr = (HEADS + 2 * KV_HEADS) * WIDTH
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BLOCK_S
    head = tl.program_id(1) * GROUP
    position = tl.arange(0, BLOCK_S)
    real = position < length - first
    low, other = tl.arange(0, BLOCK_H), 2 * HALF + tl.arange(0, BLOCK_R)
    in_low, in_other = real[:, None] & (low < HALF)[None, :], real[:, None] & (other < WIDTH)[None, :]
    here = (batch * length + first) * ROW + head * WIDTH + position[:, None] * ROW
    source, to = qkv + here, grad_qkv + here
    if head >= HEADS + KV_HEADS:
        grad = grad_value + batch * value_batch + first.to(tl.int64) * value_position
        grad += (head - HEADS - KV_HEADS).to(tl.int64) * value_head + position[:, None] * value_position
        for _ in tl.static_range(GROUP):
            tl.store(to + low[None, :], tl.load(grad + low[None, :], mask=in_low), mask=in_low)
            tl.store(to + HALF + low[None, :], tl.load(grad + HALF + low[None, :], mask=in_low), mask=in_low)
            tl.store(to + other[None, :], tl.load(grad + other[None, :], mask=in_other), mask=in_other)
            grad += value_head
            to += WIDTH
        return
    if head < HEADS:
        weight, step = query_weight, query_head
        grad = grad_query + batch * query_batch + first.to(tl.int64) * query_position
        grad += head.to(tl.int64) * query_head + position[:, None] * query_position
    else:
        weight, step = key_weight, key_head
        grad = grad_key + batch * key_batch + first.to(tl.int64) * key_position
        grad += (head - HEADS).to(tl.int64) * key_head + position[:, None] * key_position
    weight_1 = tl.load(weight + low, mask=low < HALF, other=0.0).to(tl.float32)[None, :]
    weight_2 = tl.load(weight + HALF + low, mask=low < HALF, other=0.0).to(tl.float32)[None, :]
    weight_3 = tl.load(weight + other, mask=other < WIDTH, other=0.0).to(tl.float32)[None, :]
    table = batch * table_batch + first.to(tl.int64) * table_position + position[:, None] * table_position
    cosine = tl.load(cos + table + low[None, :], mask=in_low, other=0.0)
    sine = tl.load(sin + table + low[None, :], mask=in_low, other=0.0)
    rstd += (batch * (HEADS + KV_HEADS) + head) * length + first
    sum_1 = tl.zeros((BLOCK_S, BLOCK_H), tl.float32)
    sum_2 = tl.zeros((BLOCK_S, BLOCK_H), tl.float32)
    sum_3 = tl.zeros((BLOCK_S, BLOCK_R), tl.float32)
    for _ in tl.static_range(GROUP):
        scale = tl.load(rstd + position, mask=real, other=0.0)[:, None]
        x_1 = tl.load(source + low[None, :], mask=in_low, other=0.0).to(tl.float32) * scale
        x_2 = tl.load(source + HALF + low[None, :], mask=in_low, other=0.0).to(tl.float32) * scale
        x_3 = tl.load(source + other[None, :], mask=in_other, other=0.0).to(tl.float32) * scale
        turned_1 = tl.load(grad + low[None, :], mask=in_low, other=0.0).to(tl.float32)
        turned_2 = tl.load(grad + HALF + low[None, :], mask=in_low, other=0.0).to(tl.float32)
        grad_3 = tl.load(grad + other[None, :], mask=in_other, other=0.0).to(tl.float32)
        grad_1 = turned_1 * cosine + turned_2 * sine
        grad_2 = turned_2 * cosine - turned_1 * sine
        sum_1 += grad_1 * x_1
        sum_2 += grad_2 * x_2
        sum_3 += grad_3 * x_3
        grad_1 *= weight_1
        grad_2 *= weight_2
        grad_3 *= weight_3
        mean = ((tl.sum(grad_1 * x_1 + grad_2 * x_2, 1) + tl.sum(grad_3 * x_3, 1)) / WIDTH)[:, None]
        tl.store(to + low[None, :], narrow((grad_1 - x_1 * mean) * scale, to.dtype.element_ty), mask=in_low)
        tl.store(to + HALF + low[None, :], narrow((grad_2 - x_2 * mean) * scale, to.dtype.element_ty), mask=in_low)
        tl.store(to + other[None, :], narrow((grad_3 - x_3 * mean) * scale, to.dtype.element_ty), mask=in_other)
        source += WIDTH
        to += WIDTH
        grad += step
        rstd += length
    GROUPS: tl.constexpr = (HEADS + KV_HEADS) // GROUP
    program = batch * tl.num_programs(0) + tl.program_id(0)
    partial += (program * GROUPS + tl.program_id(1)) * WIDTH
    tl.store(partial + low, tl.sum(sum_1, 0), mask=low < HALF)
    tl.store(partial + HALF + low, tl.sum(sum_2, 0), mask=low < HALF)
    tl.store(partial + other, tl.sum(sum_3, 0), mask=other < WIDTH)
