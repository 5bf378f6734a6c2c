"""Products of rows grouped by expert, in bfloat16 and blockwise FP8; the index map they go by; a dense FP8 product.

Operands are made on the device: quantisation is not in the times. Bytes count the rows of the products, looked up or
not, as in the published floors; padding aside. Peer "torch grouped_mm" does what ours does, with the copies that it
needs: rows looked up, zeros in padding and for experts without rows. "grouped_mm, operands ready" is the product alone:
operands are made outside the time, and experts without rows get what they get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case, Prepared, relative_error
from ling_flow.kernels import fp8, grouped_gemm, grouped_gemm_fp8
from ling_flow.kernels.fp8 import Quantized
from ling_flow.kernels.grouped_gemm import Tiles
from ling_flow.kernels.row_map import RowMap, dense_map, row_map, row_map_reference
from ling_flow.kernels.shapes import PUBLISHED, MoEShape, route

# gate_up of the shape at which torchao publishes: 32,768 rows, 8 experts, 2,048 × 7,168.
TORCHAO = MoEShape("8 experts 7168", 32768, 7168, 1024, 8, 1)
READY = "grouped_mm, operands ready"
DENSE = (32768, 4096, 4096)  # tokens, inputs, outputs


def cases() -> Iterator[Case]:
    for shape in PUBLISHED:
        yield _map(shape)
    for shape in (TORCHAO, *PUBLISHED):
        yield _forward(shape, "gate_up")
        yield _fp8_forward(shape, "gate_up")
        if shape is not TORCHAO:
            yield _forward(shape, "down")
            yield _fp8_forward(shape, "down")
            yield _dgrad(shape, "down")
        yield _dgrad(shape, "gate_up")
        for add in (False, True):
            yield _wgrad(shape, add)
            yield _fp8_wgrad(shape, add)
    yield _dense()


def _random(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.bfloat16, device="cuda")


def _mapped(shape: MoEShape) -> RowMap:
    routing = route(shape, "cuda")
    return row_map(routing.indices_TK, routing.counts_E)


def _sides(shape: MoEShape, which: str) -> tuple[int, int]:
    """Outputs and inputs of an expert's product."""
    return (2 * shape.width, shape.hidden) if which == "gate_up" else (shape.hidden, shape.width)


def _flops(shape: MoEShape, which: str = "gate_up") -> int:
    outputs, inputs = _sides(shape, which)
    return 2 * shape.pairs * outputs * inputs


def _swept(candidates: tuple[Tiles, ...], prepare: Callable[[Tiles], Prepared]) -> Mapping[str, Prepared]:
    return {f"{tiles}": prepare(tiles) for tiles in candidates}


def _map(shape: MoEShape) -> Case:
    def with_(function: Callable[[Tensor, Tensor], RowMap]) -> Prepared:
        def prepare() -> Callable[[], object]:
            routing = route(shape, "cuda")
            return lambda: function(routing.indices_TK, routing.counts_E)

        return prepare

    moved = shape.pairs * (2 * 8 + 4 + 4)  # both passes read the indices; places and pairs are written
    return Case(
        "index map", shape.name, with_(row_map), moved=moved, gate=("ratio", 1.0), against="torch, by a sort",
        peers={"torch, by a sort": with_(row_map_reference)},
    )  # fmt: skip


# bfloat16


def _ready(x: Tensor, where: RowMap, gather: bool) -> Tensor:
    rows = grouped_gemm.looked_up(x, where) if gather else x
    return rows.masked_fill_((where.pair_R < 0).unsqueeze(1), 0)


def _forward(shape: MoEShape, which: str) -> Case:
    outputs, inputs = _sides(shape, which)
    gather = which == "gate_up"

    def operands() -> tuple[Tensor, Tensor, RowMap]:
        where = _mapped(shape)
        return _random(shape.tokens if gather else where.rows, inputs), _random(shape.experts, outputs, inputs), where

    def with_(tiles: Tiles | None = None) -> Prepared:
        def prepare() -> Callable[[], object]:
            x, w_EAB, where = operands()
            return lambda: grouped_gemm.grouped_forward_triton(x, w_EAB, where, gather, tiles)

        return prepare

    def torchs() -> Callable[[], object]:
        x, w_EAB, where = operands()
        return lambda: grouped_gemm.grouped_forward(x, w_EAB, where, gather, "torch")

    def ready() -> Callable[[], object]:
        x, w_EAB, where = operands()
        x_RB = _ready(x, where, gather)
        return lambda: grouped_gemm.grouped_mm(x_RB, w_EAB.mT, where)

    def check() -> float:
        x, w_EAB, where = operands()
        found = grouped_gemm.grouped_forward(x, w_EAB, where, gather)
        expert, rows = where.filled()[0]
        exact = x[where.tokens(rows) if gather else rows].double() @ w_EAB[expert].double().T
        return relative_error(found[rows], exact)

    moved = 2 * (shape.pairs * (inputs + outputs) + shape.experts * outputs * inputs)
    return Case(
        f"grouped {which} forward", shape.name, with_(), moved=moved, flops=_flops(shape, which), gate=("ratio", 1.0),
        against="torch grouped_mm", check=check, variants=_swept(grouped_gemm.ROWS_TILES[2], with_),
        peers={"torch grouped_mm": torchs} | ({READY: ready} if gather else {}),
    )  # fmt: skip


def _dgrad(shape: MoEShape, which: str) -> Case:
    outputs, inputs = _sides(shape, which)
    gather = which == "down"  # gradients by token

    def operands() -> tuple[Tensor, Tensor, RowMap]:
        where = _mapped(shape)
        return _random(shape.tokens if gather else where.rows, outputs), _random(shape.experts, outputs, inputs), where

    def with_(tiles: Tiles | None = None) -> Prepared:
        def prepare() -> Callable[[], object]:
            grad, w_EAB, where = operands()
            return lambda: grouped_gemm.grouped_dgrad_triton(grad, w_EAB, where, gather, tiles)

        return prepare

    def torchs() -> Callable[[], object]:
        grad, w_EAB, where = operands()
        return lambda: grouped_gemm.grouped_dgrad(grad, w_EAB, where, gather, "torch")

    def ready() -> Callable[[], object]:
        grad, w_EAB, where = operands()
        grad_RA = _ready(grad, where, gather)
        return lambda: grouped_gemm.grouped_mm(grad_RA, w_EAB, where)

    moved = 2 * (shape.pairs * (inputs + outputs) + shape.experts * outputs * inputs)
    return Case(
        f"grouped {which} dgrad", shape.name, with_(), moved=moved, flops=_flops(shape, which), gate=("ratio", 1.0),
        against="torch grouped_mm", variants=_swept(grouped_gemm.ROWS_TILES[2], with_),
        peers={"torch grouped_mm": torchs} | ({READY: ready} if gather else {}),
    )  # fmt: skip


def _wgrad(shape: MoEShape, add: bool) -> Case:
    outputs, inputs = _sides(shape, "gate_up")

    def operands() -> tuple[Tensor, Tensor, RowMap, Tensor | None]:
        where = _mapped(shape)
        grad, x = _random(where.rows, outputs), _random(shape.tokens, inputs)
        return grad, x, where, torch.zeros(shape.experts, outputs, inputs, device="cuda") if add else None

    def with_(tiles: Tiles | None = None) -> Prepared:
        def prepare() -> Callable[[], object]:
            grad, x, where, out = operands()
            return lambda: grouped_gemm.grouped_wgrad_triton(grad, x, where, False, True, out, add, tiles)

        return prepare

    def torchs() -> Callable[[], object]:
        grad, x, where, out = operands()
        return lambda: grouped_gemm.grouped_wgrad(grad, x, where, False, True, out, add, "torch")

    def ready() -> Callable[[], object]:
        grad, x, where, out = operands()
        grad_RA, x_RB = _ready(grad, where, False), _ready(x, where, True)
        if out is None:
            return lambda: grouped_gemm.grouped_mm(grad_RA.T, x_RB, where)
        return lambda: out.add_(grouped_gemm.grouped_mm(grad_RA.T, x_RB, where))

    def check() -> float:
        grad, x, where, out = operands()
        found = grouped_gemm.grouped_wgrad(grad, x, where, False, True, out, add)
        expert, rows = where.filled()[0]
        return relative_error(found[expert], grad[rows].double().T @ x[where.tokens(rows)].double())

    moved = 2 * shape.pairs * (inputs + outputs) + shape.experts * outputs * inputs * (8 if add else 2)
    few = grouped_gemm.FEW_ROWS_TILES[2] + grouped_gemm.WEIGHTS_TILES[2]
    return Case(
        "grouped gate_up wgrad" + (", added" if add else ""), shape.name, with_(), moved=moved, flops=_flops(shape),
        gate=("ratio", 1.0), against="torch grouped_mm", check=check,
        peers={"torch grouped_mm": torchs, READY: ready},
        variants=_swept(grouped_gemm.ADDED_TILES[2] if add else few, with_),
    )  # fmt: skip


# FP8


def _fp8_forward(shape: MoEShape, which: str) -> Case:
    outputs, inputs = _sides(shape, which)
    gather = which == "gate_up"

    def operands() -> tuple[Quantized, Quantized, RowMap]:
        where = _mapped(shape)
        x = fp8.quantize_rows(_random(shape.tokens if gather else where.rows, inputs))
        return x, fp8.quantize_blocks(_random(shape.experts, outputs, inputs)), where

    def ours() -> Callable[[], object]:
        x, w_EAB, where = operands()
        return lambda: grouped_gemm_fp8.grouped_forward_fp8(x, w_EAB, where, gather)

    def deep_gemm() -> Callable[[], object]:
        import deep_gemm

        w_EAB = fp8.quantize_blocks(_random(shape.experts, outputs, inputs))
        x = fp8.quantize_rows(_random(shape.pairs, inputs))
        expert_N = torch.arange(shape.experts, dtype=torch.int32, device="cuda").repeat_interleave(
            shape.pairs // shape.experts
        )
        y = torch.empty(shape.pairs, outputs, dtype=torch.bfloat16, device="cuda")
        return lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            (x.values, x.scales.T), (w_EAB.values, w_EAB.scales), y, expert_N
        )

    def check() -> float:
        x, w_EAB, where = operands()
        found = grouped_gemm_fp8.grouped_forward_fp8(x, w_EAB, where, gather)
        expert, rows = where.filled()[0]
        one = Quantized(w_EAB.values[expert : expert + 1], w_EAB.scales[expert : expert + 1])
        wide = fp8.dequantize_rows(x)[where.tokens(rows) if gather else rows]
        return relative_error(found[rows], wide.double() @ fp8.dequantize_blocks(one)[0].double().T)

    scales = shape.pairs * inputs // 32
    moved = shape.pairs * (inputs + 2 * outputs) + shape.experts * outputs * inputs + scales
    whole = shape.load == "balanced" and shape.pairs % (128 * shape.experts) == 0  # what DeepGEMM takes unpadded
    gate = {TORCHAO.name: ("tflops", 700.0), "mini 8k": ("share", 0.6)}.get(shape.name)
    return Case(
        f"grouped fp8 {which} forward", shape.name, ours, moved=moved, flops=_flops(shape, which), kind="fp8",
        gate=gate, check=check, peers={"deep_gemm": deep_gemm} if whole else {},
    )  # fmt: skip


def _fp8_wgrad(shape: MoEShape, add: bool) -> Case:
    outputs, inputs = _sides(shape, "gate_up")

    def operands() -> tuple[Quantized, Quantized, RowMap, Tensor | None]:
        where = _mapped(shape)
        grad_AR = fp8.quantize_columns(_random(where.rows, outputs), where)
        x_BR = fp8.quantize_columns(_random(shape.tokens, inputs), where, gather=True)
        return grad_AR, x_BR, where, torch.zeros(shape.experts, outputs, inputs, device="cuda") if add else None

    def ours() -> Callable[[], object]:
        grad_AR, x_BR, where, out = operands()
        return lambda: grouped_gemm_fp8.grouped_wgrad_fp8(grad_AR, x_BR, where, out=out, add=add)

    def check() -> float:
        grad_AR, x_BR, where, out = operands()
        found = grouped_gemm_fp8.grouped_wgrad_fp8(grad_AR, x_BR, where, out=out, add=add)
        expert, rows = where.filled()[0]
        wide = [fp8.dequantize_columns(part, where)[rows].double() for part in (grad_AR, x_BR)]
        return relative_error(found[expert], wide[0].T @ wide[1])

    moved = shape.pairs * (inputs + outputs) + shape.experts * outputs * inputs * (8 if add else 2)
    return Case(
        "grouped fp8 gate_up wgrad" + (", added" if add else ""), shape.name, ours, moved=moved,
        flops=_flops(shape), kind="fp8", gate=("tflops", 457.0) if shape is TORCHAO and not add else None, check=check,
    )  # fmt: skip


def _dense() -> Case:
    tokens, inputs, outputs = DENSE

    def operands() -> tuple[Quantized, Quantized]:
        return fp8.quantize_rows(_random(tokens, inputs)), fp8.quantize_blocks(_random(1, outputs, inputs))

    def ours() -> Callable[[], object]:
        (x, w_1AB), where = operands(), dense_map(tokens, "cuda")
        return lambda: grouped_gemm_fp8.grouped_forward_fp8(x, w_1AB, where)

    def torchs() -> Callable[[], object]:
        from torch.nn.functional import ScalingType, scaled_mm

        x, w_1AB = operands()
        return lambda: scaled_mm(
            x.values, w_1AB.values[0].T, x.scales.T, ScalingType.BlockWise1x128, w_1AB.scales[0].T,
            ScalingType.BlockWise128x128, output_dtype=torch.bfloat16,
        )  # fmt: skip

    def deep_gemm() -> Callable[[], object]:
        import deep_gemm

        x, w_1AB = operands()
        y = torch.empty(tokens, outputs, dtype=torch.bfloat16, device="cuda")
        return lambda: deep_gemm.fp8_gemm_nt((x.values, x.scales.T), (w_1AB.values[0], w_1AB.scales[0]), y)

    return Case(
        "dense fp8 forward", f"{tokens}x{inputs}x{outputs}", ours, kind="fp8", flops=2 * tokens * inputs * outputs,
        moved=tokens * (inputs + 2 * outputs) + outputs * inputs, gate=("tflops", 700.0),
        peers={"torch scaled_mm": torchs, "deep_gemm": deep_gemm},
    )  # fmt: skip
