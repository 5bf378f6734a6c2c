"""Blockwise FP8 quantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.kernel_cases import Case, Prepared
from ling_flow.kernels import fp8
from ling_flow.kernels.row_map import row_map_reference
from ling_flow.kernels.shapes import PUBLISHED, MoEShape, normal, route


def cases() -> Iterator[Case]:
    yield _rows("32768x4096", 32768, 4096)
    for shape in PUBLISHED:
        yield _rows(shape.name, shape.tokens, shape.hidden)
        yield _columns(shape)
        yield _both(shape)
        yield _blocks(shape)


def _rows(name: str, tokens: int, hidden: int) -> Case:
    def x() -> torch.Tensor:
        return normal((tokens, hidden), torch.bfloat16, "cuda")

    def ours() -> Callable[[], object]:
        x_TD = x()
        return lambda: fp8.quantize_rows(x_TD)

    def torchao() -> Callable[[], object]:
        from torchao.prototype.blockwise_fp8_training.kernels import triton_fp8_blockwise_act_quant_lhs as quantize

        x_TD = x()
        return lambda: quantize(x_TD)

    return Case(
        "quantise 1x128", name, ours, moved=tokens * hidden * 3 + tokens * hidden // 32, gate=("share", 0.85),
        peers={"torchao": torchao},
    )  # fmt: skip


def _columns(shape: MoEShape) -> Case:
    def ours(tile: tuple[int, int, int]) -> Prepared:
        def prepare() -> Callable[[], object]:
            routing = route(shape, "cuda")
            row_map = row_map_reference(routing.indices_TK, routing.counts_E)
            x_TD = normal((shape.tokens, shape.hidden), torch.bfloat16, "cuda")
            return lambda: fp8.quantize_columns_triton(x_TD, row_map, True, tile)

        return prepare

    moved = shape.tokens * shape.hidden * 2 + shape.pairs * shape.hidden
    return Case(
        "permute + quantise 128x1", shape.name, ours(fp8.COLUMNS_TILES[0]), moved=moved, gate=("share", 0.75),
        variants={str(tile): ours(tile) for tile in fp8.COLUMNS_TILES},
    )  # fmt: skip


def _both(shape: MoEShape) -> Case:
    def ours(tile: tuple[int, int, int, int]) -> Prepared:
        def prepare() -> Callable[[], object]:
            routing = route(shape, "cuda")
            row_map = row_map_reference(routing.indices_TK, routing.counts_E)
            x_RF = normal((row_map.rows, 2 * shape.width), torch.bfloat16, "cuda")
            return lambda: fp8.quantize_both_triton(x_RF, row_map, tile)

        return prepare

    moved = shape.pairs * 2 * shape.width * 4
    return Case(
        "quantise both", shape.name, ours(fp8.BOTH_TILES[0]), moved=moved, gate=("share", 0.85),
        variants={str(tile): ours(tile) for tile in fp8.BOTH_TILES},
    )  # fmt: skip


def _blocks(shape: MoEShape) -> Case:
    def ours() -> Callable[[], object]:
        w_EMN = normal((shape.experts, 2 * shape.width, shape.hidden), torch.bfloat16, "cuda")
        return lambda: fp8.quantize_blocks(w_EMN)

    moved = shape.experts * 2 * shape.width * shape.hidden * 3
    return Case("quantise 128x128", shape.name, ours, moved=moved, gate=("share", 0.85))
