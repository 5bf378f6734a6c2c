"""Products of rows grouped by expert, in bfloat16 and blockwise FP8, and the index map they go by."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ling_flow.kernels.fp8 import STORED, Quantized
from ling_flow.kernels.grouped_gemm import grouped_dgrad_triton, grouped_forward_triton, grouped_wgrad_triton
from ling_flow.kernels.grouped_gemm_fp8 import grouped_forward_fp8_triton, grouped_wgrad_fp8_triton
from ling_flow.kernels.row_map import row_map_triton
from ling_flow.kernels.shapes import PUBLISHED, MoEShape, normal, route
from tests.kernels.aot_cases import Case, meta_map

# Its rows of experts have 2^31 elements: offsets of 64 bits.
LARGE = MoEShape("1T at 128k tokens", 131072, 8192, 2048, 256, 8)


def cases() -> Iterator[Case]:
    for shape in PUBLISHED:
        if shape.load == "balanced":
            routing = route(shape, "meta")
            yield Case(f"row map, {shape.name}", lambda routing=routing: row_map_triton(routing[0], routing[2]))
            yield from _bfloat16(shape)
            yield from _fp8(shape)
    yield _large_fp8()


def _bfloat16(shape: MoEShape) -> Iterator[Case]:
    def empty(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return normal(sizes, dtype, "meta")

    row_map = meta_map(shape)
    tokens, hidden, rows, wide = shape.tokens, shape.hidden, row_map.rows, 2 * shape.width
    x_TD, x_RD = empty(tokens, hidden), empty(rows, hidden)
    z_T2F, z_R2F, h_RF = empty(tokens, wide), empty(rows, wide), empty(rows, shape.width)
    gate_up, down = empty(shape.experts, wide, hidden), empty(shape.experts, hidden, shape.width)
    main_grad = empty(shape.experts, wide, hidden, dtype=torch.float32)

    def case(name: str, launch: Callable[[], object]) -> Case:
        return Case(f"grouped {name}, {shape.name}", launch, wgmma=True)

    yield case("gate_up forward", lambda: grouped_forward_triton(x_TD, gate_up, row_map, True))
    yield case("down forward", lambda: grouped_forward_triton(h_RF, down, row_map, False))
    yield case("down dgrad", lambda: grouped_dgrad_triton(x_TD, down, row_map, True))
    yield case("gate_up dgrad", lambda: grouped_dgrad_triton(z_R2F, gate_up, row_map, False))
    yield case("gate_up wgrad", lambda: grouped_wgrad_triton(z_R2F, x_TD, row_map, False, True))
    yield case("gate_up wgrad, nothing looked up", lambda: grouped_wgrad_triton(z_R2F, x_RD, row_map, False, False))
    yield case("gate_up wgrad, both looked up", lambda: grouped_wgrad_triton(z_T2F, x_TD, row_map, True, True))
    yield case("down wgrad", lambda: grouped_wgrad_triton(x_TD, h_RF, row_map, True, False))
    yield case(
        "gate_up wgrad, added",
        lambda: grouped_wgrad_triton(z_R2F, x_TD, row_map, False, True, main_grad, add=True),
    )
    yield Case(
        f"grouped float32 forward, {shape.name}",
        lambda: grouped_forward_triton(x_RD.float(), gate_up.float(), row_map, False),
    )


def _fp8(shape: MoEShape) -> Iterator[Case]:
    row_map = meta_map(shape)
    tokens, hidden, rows, wide = shape.tokens, shape.hidden, row_map.rows, 2 * shape.width
    tiles = len(row_map.tile_rows_M)

    def stored(values: tuple[int, ...], scales: tuple[int, ...]) -> Quantized:
        return Quantized(normal(values, STORED, "meta"), normal(scales, torch.float32, "meta"))

    x_TD = stored((tokens, hidden), (hidden // 128, tokens))
    h_RF = stored((rows, shape.width), (shape.width // 128, rows))
    gate_up = stored((shape.experts, wide, hidden), (shape.experts, wide // 128, hidden // 128))
    down = stored((shape.experts, hidden, shape.width), (shape.experts, hidden // 128, shape.width // 128))
    grad_2FR = stored((wide, tiles * 128), (tiles, wide))
    x_DR = stored((hidden, tiles * 128), (tiles, hidden))
    main_grad = normal((shape.experts, wide, hidden), torch.float32, "meta")

    def case(name: str, launch: Callable[[], object]) -> Case:
        return Case(f"grouped fp8 {name}, {shape.name}", launch, wgmma=True)

    yield case("gate_up forward", lambda: grouped_forward_fp8_triton(x_TD, gate_up, row_map, True))
    yield case("down forward", lambda: grouped_forward_fp8_triton(h_RF, down, row_map, False))
    yield case("gate_up wgrad", lambda: grouped_wgrad_fp8_triton(grad_2FR, x_DR, row_map))
    yield case(
        "gate_up wgrad, added",
        lambda: grouped_wgrad_fp8_triton(grad_2FR, x_DR, row_map, out=main_grad, add=True),
    )


def _large_fp8() -> Case:
    row_map = meta_map(LARGE)
    experts, rows, hidden, width = LARGE.experts, row_map.rows, LARGE.hidden, LARGE.width
    assert rows * width >= 2**31
    h_RF = Quantized(normal((rows, width), STORED, "meta"), normal((width // 128, rows), torch.float32, "meta"))
    down = Quantized(
        normal((experts, hidden, width), STORED, "meta"),
        normal((experts, hidden // 128, width // 128), torch.float32, "meta"),
    )
    name = f"grouped fp8 down forward, {LARGE.name}"
    return Case(name, lambda: grouped_forward_fp8_triton(h_RF, down, row_map, False), wgmma=True)
