"""SwiGLU: `silu(gate) · up` on a fused projection [gate | up].

On CUDA all of it is float32, narrowed once. The same kernels serve the rows of experts (`swiglu_quantise`), where a
row is also multiplied by its token's weight, and rows of padding are zero.

Limits of the kernels: float32, bfloat16 or float16 (float64 is left to torch); any shape, fast where F is a multiple
of 16.

Shapes: N rows (any leading dimensions), F width, T tokens, K chosen, R rows of a `RowMap`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ling_flow.kernels._triton import INTERPRETED, ceil_div, jit, narrow, next_power_of_2, tl
from ling_flow.kernels.row_map import RowMap

# Elements of a program, its most columns, and warps, the first of which is taken: 2 reads of 16 bytes a thread from
# each operand, backward 1.
TILES = ((2048, 1024, 4), (1024, 1024, 4), (4096, 1024, 8), (4096, 1024, 4))
BACKWARD_TILES = ((1024, 512, 4), (2048, 512, 4), (2048, 1024, 8), (512, 512, 2))


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """(…, 2F) → (…, F)."""
    return _SwiGLU.apply(gate_up_N2F)


def swiglu_forward(gate_up_N2F: Tensor) -> Tensor:
    """`swiglu` without a record for the backward pass."""
    if gate_up_N2F.is_cuda and gate_up_N2F.dtype != torch.float64:
        return swiglu_triton(gate_up_N2F.flatten(0, -2)).unflatten(0, gate_up_N2F.shape[:-1])
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    return functional.silu(gate_NF).mul_(up_NF)


def swiglu_backward(gate_up_N2F: Tensor, grad_NF: Tensor) -> Tensor:
    """Gradient of `swiglu` with respect to its input."""
    if gate_up_N2F.is_cuda and gate_up_N2F.dtype != torch.float64:
        return swiglu_backward_triton(gate_up_N2F.flatten(0, -2), grad_NF.flatten(0, -2))[0].view_as(gate_up_N2F)
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    grad_N2F = torch.empty_like(gate_up_N2F)
    grad_gate_NF, grad_up_NF = grad_N2F.chunk(2, dim=-1)
    torch.mul(grad_NF, functional.silu(gate_NF), out=grad_up_NF)
    torch.ops.aten.silu_backward.grad_input(grad_NF * up_NF, gate_NF, grad_input=grad_gate_NF)
    return grad_N2F


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_N2F: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_N2F)
        return swiglu_forward(gate_up_N2F)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> Tensor:
        return swiglu_backward(ctx.saved_tensors[0], grad_NF)


# Triton


def swiglu_triton(
    z_R2F: Tensor,
    weights_TK: Tensor | None = None,
    row_map: RowMap | None = None,
    tile: tuple[int, int, int] = TILES[0],
) -> Tensor:
    """(R, F). With a map, rows of padding are zero; with weights, a row is multiplied by that of its pair."""
    rows, width = len(z_R2F) if row_map is None else row_map.rows, z_R2F.shape[1] // 2
    z_R2F = z_R2F.contiguous()
    h_RF = torch.empty((rows, width), dtype=z_R2F.dtype, device=z_R2F.device)
    if h_RF.numel():
        weights, pair_R = _weights_and_pairs(weights_TK, row_map, z_R2F)
        block_r, block_f, warps = _tile(tile, width)
        grid = ceil_div(width, block_f) * ceil_div(rows, block_r)  # one dimension: others are limited
        _swiglu_kernel[(grid,)](
            z_R2F, weights, pair_R, h_RF, rows, width, WEIGHTED=weights_TK is not None, MAPPED=row_map is not None,
            BLOCK_R=block_r, BLOCK_F=block_f, num_warps=warps,
        )  # fmt: skip
    return h_RF


def swiglu_backward_triton(
    z_R2F: Tensor,
    grad_h_RF: Tensor,
    weights_TK: Tensor | None = None,
    row_map: RowMap | None = None,
    tile: tuple[int, int, int] = BACKWARD_TILES[0],
) -> tuple[Tensor, Tensor | None]:
    """Gradients of z (R, 2F), zero in padding, and of the weights, float32: None without weights."""
    rows, width = len(z_R2F) if row_map is None else row_map.rows, z_R2F.shape[1] // 2
    z_R2F, grad_h_RF = z_R2F.contiguous(), grad_h_RF.contiguous()
    grad_z_R2F = torch.empty((rows, 2 * width), dtype=z_R2F.dtype, device=z_R2F.device)
    grad_weights_TK = None if weights_TK is None else torch.zeros_like(weights_TK, dtype=torch.float32)
    if grad_z_R2F.numel():
        weights, pair_R = _weights_and_pairs(weights_TK, row_map, z_R2F)
        grad_weights = z_R2F if grad_weights_TK is None else grad_weights_TK
        block_r, block_f, warps = _tile(tile, width)
        _swiglu_backward_kernel[(ceil_div(rows, block_r),)](
            z_R2F, grad_h_RF, weights, pair_R, grad_z_R2F, grad_weights, rows, width,
            WEIGHTED=weights_TK is not None, MAPPED=row_map is not None, BLOCK_R=block_r, BLOCK_F=block_f,
            num_warps=warps,
        )  # fmt: skip
    return grad_z_R2F, grad_weights_TK


def _weights_and_pairs(weights_TK: Tensor | None, row_map: RowMap | None, other: Tensor) -> tuple[Tensor, Tensor]:
    """Stands `other` in for what is missing, which the kernels do not touch."""
    return (
        other if weights_TK is None else weights_TK.contiguous(),
        other if row_map is None else row_map.pair_R,
    )


def _tile(tile: tuple[int, int, int], width: int) -> tuple[int, int, int]:
    """As many elements, in fewer columns and more rows where the rows are narrow."""
    elements, columns, warps = tile
    columns = max(min(columns, next_power_of_2(width)), 16)
    return elements // columns, columns, warps


@jit
def silu(gate):  # type: ignore[no-untyped-def]
    """sigmoid(gate) and gate · sigmoid(gate)."""
    if INTERPRETED:
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    else:
        # The same in 4 instructions: tl.exp and a quotient take 12, for the sake of numbers below 2^-126.
        sigmoid = tl.inline_asm_elementwise(
            "mul.f32 $0, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, $0; add.f32 $0, $0, 0f3F800000;"
            "rcp.approx.ftz.f32 $0, $0;",  # 2^(-gate · log2(e)), + 1, inverse
            "=f,f", [gate], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return sigmoid, gate * sigmoid


@jit
def swiglu_gradients(gate, up, grad, weight):  # type: ignore[no-untyped-def]
    """Gradients of gate, of up, and (to be summed) of the weight, from that of silu(gate) · up · weight."""
    sigmoid, activated = silu(gate)
    weighted = grad * weight
    grad_gate = weighted * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    return grad_gate, weighted * activated, grad * (activated * up)


@jit
def pairs_and_weights(pair_R, weights, row, inside, WEIGHTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of rows: their pair, -1 in padding and where not `inside`, and their weight."""
    pair = tl.load(pair_R + row, mask=inside, other=-1)
    if WEIGHTED:
        weight = tl.load(weights + pair, mask=pair >= 0, other=0.0).to(tl.float32)
    else:
        weight = (pair >= 0).to(tl.float32)
    return pair, weight


@jit
def _swiglu_kernel(  # type: ignore[no-untyped-def]
    z, weights, pair_R, h, rows, width,
    WEIGHTED: tl.constexpr, MAPPED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(width, BLOCK_F)
    row = tl.program_id(0) // parts * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(0) % parts * BLOCK_F + tl.arange(0, BLOCK_F)
    there = (column < width)[None, :]
    read = row < rows
    if MAPPED:
        pair, weight = pairs_and_weights(pair_R, weights, row, read, WEIGHTED)
        read = pair >= 0
    source = z + row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
    gate = tl.load(source, mask=read[:, None] & there, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=read[:, None] & there, other=0.0).to(tl.float32)
    _, activated = silu(gate)
    product = activated * up
    if WEIGHTED:
        product = product * weight[:, None]
    to = h + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(to, narrow(product, h.dtype.element_ty), mask=(row < rows)[:, None] & there)


@jit
def _swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    z, grad_h, weights, pair_R, grad_z, grad_weights, rows, width,
    WEIGHTED: tl.constexpr, MAPPED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    read = row < rows
    weight = tl.full((BLOCK_R,), 1.0, tl.float32)
    if MAPPED:
        pair, weight = pairs_and_weights(pair_R, weights, row, read, WEIGHTED)
        read = pair >= 0
    wide_row = row.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for first in range(0, width, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)[None, :]
        inside = read[:, None] & (column < width)
        source = z + wide_row * (2 * width) + column
        gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_h + wide_row * width + column, mask=inside, other=0.0).to(tl.float32)
        grad_gate, grad_up, grad_weight = swiglu_gradients(gate, up, grad, weight[:, None])
        to, written = grad_z + wide_row * (2 * width) + column, (row < rows)[:, None] & (column < width)
        tl.store(to, narrow(grad_gate, grad_z.dtype.element_ty), mask=written)
        tl.store(to + width, narrow(grad_up, grad_z.dtype.element_ty), mask=written)
        total += grad_weight
    if WEIGHTED:
        tl.store(grad_weights + pair, tl.sum(total, 1), mask=read)
