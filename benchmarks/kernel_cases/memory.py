"""What only moves memory: rows of the experts, SwiGLU with and without FP8, RMSNorm, the embedding's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_cases import Case, Prepared, relative_error
from ling_flow.kernels import embedding, fp8, rms_norm, swiglu, swiglu_quantise, unpermute
from ling_flow.kernels.row_map import RowMap, row_map
from ling_flow.kernels.shapes import PUBLISHED, MoEShape, normal, route

EPS = 1e-6


def cases() -> Iterator[Case]:
    for shape in PUBLISHED:
        yield from _unpermute(shape)
        yield from _swiglu(shape)
        yield from _swiglu_quantise(shape)
    for rows, width in ((32768, 2048), (32768, 4096), (524288, 128)):
        yield from _rms_norm(rows, width)
    yield _embedding(32768, 157184, 2048)


def _map(shape: MoEShape) -> tuple[RowMap, Tensor]:
    routing = route(shape, "cuda")
    return row_map(routing.indices_TK, routing.counts_E), routing.weights_TK


def _rows(found: RowMap, width: int, seed: int = 0) -> Tensor:
    return normal((1024, width), torch.bfloat16, "cuda", seed).repeat(-(-found.rows // 1024), 1)[: found.rows]


def _unpermute(shape: MoEShape) -> Iterator[Case]:
    tokens, pairs, hidden = shape.tokens, shape.pairs, shape.hidden
    moved = (tokens + pairs) * hidden * 2

    def gather(tile: tuple[int, int, int]) -> Prepared:
        def prepare() -> Callable[[], object]:
            found, x_TD = _map(shape)[0], normal((tokens, hidden), torch.bfloat16, "cuda")
            return lambda: unpermute.gather_rows_triton(x_TD, found, tile)

        return prepare

    def gather_torch() -> Callable[[], object]:
        found, x_TD = _map(shape)[0], normal((tokens, hidden), torch.bfloat16, "cuda")
        token_R = found.pair_R.clamp(min=0) // shape.top_k
        return lambda: x_TD.index_select(0, token_R)

    def summed(tile: tuple[int, int, int], weighted: bool) -> Prepared:
        def prepare() -> Callable[[], object]:
            found, weights_TK = _map(shape)
            y_RD = _rows(found, hidden)
            return lambda: unpermute.sum_rows_triton(y_RD, found, weights_TK if weighted else None, tile)

        return prepare

    def sum_torch() -> Callable[[], object]:
        found = _map(shape)[0]
        y_RD, place_N = _rows(found, hidden), found.place_TK.flatten()
        return lambda: y_RD.index_select(0, place_N).view(tokens, shape.top_k, hidden).sum(1)

    def sum_linghe() -> Callable[[], object]:
        from linghe.utils.gather import triton_make_row_id_map
        from linghe.utils.scatter import triton_unpermute_with_mask_map

        routing = route(shape, "cuda")
        chosen_TE = torch.zeros(tokens, shape.experts, dtype=torch.int32, device="cuda")
        chosen_TE.scatter_(1, routing.indices_TK, 1)
        row_TE = triton_make_row_id_map(chosen_TE, multiple_of=16)
        found, _ = _map(shape)
        y_RD, probabilities_R = _rows(found, hidden), torch.rand(found.rows, device="cuda")
        return lambda: triton_unpermute_with_mask_map(y_RD, row_TE, probabilities_R)

    def backward(tile: tuple[int, int, int]) -> Prepared:
        def prepare() -> Callable[[], object]:
            found, weights_TK = _map(shape)
            y_RD, grad_TD = _rows(found, hidden), normal((tokens, hidden), torch.bfloat16, "cuda", 1)
            return lambda: unpermute.weighted_sum_rows_backward_triton(grad_TD, y_RD, weights_TK, found, tile)

        return prepare

    def check() -> float:
        found, weights_TK = _map(shape)
        y_RD, exact_TD = _rows(found, hidden), torch.zeros(tokens, hidden, dtype=torch.float64, device="cuda")
        for k in range(shape.top_k):
            exact_TD += y_RD[found.place_TK[:, k]].double() * weights_TK[:, k, None]
        return relative_error(unpermute.weighted_sum_rows(y_RD, weights_TK, found), exact_TD)

    yield Case(
        "gather rows", shape.name, gather(unpermute.GATHER_TILES[0]), moved=moved, gate=("share", 0.75),
        peers={"torch": gather_torch},
        variants={str(tile): gather(tile) for tile in unpermute.GATHER_TILES},
    )  # fmt: skip
    yield Case(
        "sum rows", shape.name, summed(unpermute.SUM_TILES[0], False), moved=moved, gate=("share", 0.75),
        peers={"torch": sum_torch, "linghe": sum_linghe},
        variants={str(tile): summed(tile, False) for tile in unpermute.SUM_TILES},
    )  # fmt: skip
    yield Case(
        "weighted sum rows", shape.name, summed(unpermute.SUM_TILES[0], True), moved=moved, gate=("share", 0.75),
        check=check,
    )  # fmt: skip
    yield Case(
        "weighted sum rows backward", shape.name, backward(unpermute.BACKWARD_TILES[0]),
        moved=moved + pairs * hidden * 2, gate=("share", 0.75),
        variants={str(tile): backward(tile) for tile in unpermute.BACKWARD_TILES},
    )  # fmt: skip


def _swiglu(shape: MoEShape) -> Iterator[Case]:
    values = shape.pairs * shape.width

    def forward(tile: tuple[int, int, int], weighted: bool = True) -> Prepared:
        def prepare() -> Callable[[], object]:
            found, weights_TK = _map(shape)
            z_R2F = _rows(found, 2 * shape.width)
            if not weighted:
                return lambda: swiglu.swiglu_triton(z_R2F, tile=tile)
            return lambda: swiglu.swiglu_triton(z_R2F, weights_TK, found, tile)

        return prepare

    def backward(tile: tuple[int, int, int]) -> Prepared:
        def prepare() -> Callable[[], object]:
            found, weights_TK = _map(shape)
            z_R2F, grad_RF = _rows(found, 2 * shape.width), _rows(found, shape.width, 1)
            return lambda: swiglu.swiglu_backward_triton(z_R2F, grad_RF, weights_TK, found, tile)

        return prepare

    def plain_torch() -> Callable[[], object]:
        gate_RF, up_RF = _rows(_map(shape)[0], 2 * shape.width).chunk(2, 1)
        return lambda: functional.silu(gate_RF) * up_RF

    def plain_liger() -> Callable[[], object]:
        from liger_kernel.transformers.functional import liger_swiglu

        gate_RF, up_RF = (half.contiguous() for half in _rows(_map(shape)[0], 2 * shape.width).chunk(2, 1))
        return lambda: liger_swiglu(gate_RF, up_RF)

    def check() -> float:
        found, weights_TK = _map(shape)
        z_R2F = _rows(found, 2 * shape.width)
        exact_RF = swiglu_quantise.swiglu_weighted_reference(z_R2F.double(), weights_TK, found)
        return relative_error(swiglu_quantise.swiglu_weighted_forward(z_R2F, weights_TK, found), exact_RF)

    yield Case(
        "swiglu", shape.name, forward(swiglu.TILES[0], weighted=False), moved=values * 6, gate=("share", 0.85),
        peers={"torch": plain_torch, "liger": plain_liger},
    )  # fmt: skip
    yield Case(
        "swiglu weighted", shape.name, forward(swiglu.TILES[0]), moved=values * 6, gate=("share", 0.85), check=check,
        variants={str(tile): forward(tile) for tile in swiglu.TILES},
    )  # fmt: skip
    yield Case(
        "swiglu weighted backward", shape.name, backward(swiglu.BACKWARD_TILES[0]), moved=values * 10,
        gate=("share", 0.85), variants={str(tile): backward(tile) for tile in swiglu.BACKWARD_TILES},
    )  # fmt: skip


def _swiglu_quantise(shape: MoEShape) -> Iterator[Case]:
    values = shape.pairs * shape.width

    def forward(by_columns: bool, tile: tuple[int, ...] | None = None) -> Prepared:
        def prepare() -> Callable[[], object]:
            found, weights_TK = _map(shape)
            z_R2F = _rows(found, 2 * shape.width)
            return lambda: swiglu_quantise.swiglu_quantize_triton(z_R2F, weights_TK, found, by_columns, tile)

        return prepare

    def backward(tile: tuple[int, int, int, int]) -> Prepared:
        def prepare() -> Callable[[], object]:
            found, weights_TK = _map(shape)
            z_R2F, grad_RF = _rows(found, 2 * shape.width), _rows(found, shape.width, 1)
            return lambda: swiglu_quantise.swiglu_quantize_backward_triton(z_R2F, grad_RF, weights_TK, found, tile)

        return prepare

    def unfused() -> Callable[[], object]:
        found, weights_TK = _map(shape)
        z_R2F, grad_RF = _rows(found, 2 * shape.width), _rows(found, shape.width, 1)

        def run() -> object:
            grad_z_R2F, grad_weights_TK = swiglu.swiglu_backward_triton(z_R2F, grad_RF, weights_TK, found)
            return fp8.quantize_both_triton(grad_z_R2F, found), grad_weights_TK

        return run

    def linghe_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
        # Where every expert has the same number of rows: what it pads and how need not be ours.
        counts_E = route(shape, "cuda").counts_E
        z_R2F = normal((shape.pairs, 2 * shape.width), torch.bfloat16, "cuda")
        grad_RF = normal((shape.pairs, shape.width), torch.bfloat16, "cuda", 1)
        return z_R2F, grad_RF, torch.rand(shape.pairs, 1, device="cuda"), counts_E, counts_E.tolist()

    def linghe(mode: int) -> Prepared:
        def prepare() -> Callable[[], object]:
            from linghe.utils.silu import triton_batch_weighted_silu_and_block_quant_forward as quantize

            z_R2F, _, weights_R1, counts_E, splits = linghe_inputs()
            return lambda: quantize(z_R2F, weights_R1, counts_E, splits=splits, output_mode=mode)

        return prepare

    def linghe_backward() -> Callable[[], object]:
        from linghe.utils.silu import triton_batch_weighted_silu_and_block_quant_backward as quantize

        z_R2F, grad_RF, weights_R1, counts_E, splits = linghe_inputs()
        return lambda: quantize(grad_RF, z_R2F, weights_R1, counts_E, splits=splits)

    even = shape.load == "balanced"
    for by_columns, tiles in enumerate((swiglu_quantise.ROWS_TILES, swiglu_quantise.COLUMNS_TILES)):
        yield Case(
            f"swiglu + quantise {'128x1' if by_columns else '1x128'}", shape.name, forward(bool(by_columns)),
            moved=values * 5 + values // 32, gate=("share", 0.85), peers={"linghe": linghe(by_columns)} if even else {},
            variants={str(tile): forward(bool(by_columns), tile) for tile in tiles},
        )  # fmt: skip
    yield Case(
        "swiglu backward + quantise both", shape.name, backward(swiglu_quantise.BACKWARD_TILES[0]),
        moved=values * 10 + values // 8,
        gate=("share", 0.85), peers={"linghe": linghe_backward} if even else {}, 
        variants={"two kernels": unfused} | {str(tile): backward(tile) for tile in swiglu_quantise.BACKWARD_TILES},
    )  # fmt: skip


def _rms_norm(rows: int, width: int) -> Iterator[Case]:
    name = f"{rows}x{width}"

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        return (
            normal((rows, width), torch.bfloat16, "cuda"),
            normal((width,), torch.bfloat16, "cuda", 1),
            normal((rows, width), torch.bfloat16, "cuda", 2),
        )

    def forward(tile: tuple[int, int], quantize: bool, keep: bool = True) -> Prepared:
        def prepare() -> Callable[[], object]:
            x_ND, weight_D, _ = inputs()
            return lambda: rms_norm.rms_norm_triton(x_ND, weight_D, EPS, quantize, tile, keep)

        return prepare

    def backward(tile: tuple[int, int, int, int]) -> Prepared:
        def prepare() -> Callable[[], object]:
            x_ND, weight_D, grad_ND = inputs()
            rstd_N = rms_norm.rms_norm_triton(x_ND, weight_D, EPS, False)[1]
            return lambda: rms_norm.rms_norm_backward_triton(grad_ND, x_ND, weight_D, rstd_N, tile)

        return prepare

    def torch_forward() -> Callable[[], object]:
        x_ND, weight_D, _ = inputs()
        return lambda: functional.rms_norm(x_ND, (width,), weight_D, EPS)

    def liger_forward() -> Callable[[], object]:
        from liger_kernel.transformers.functional import liger_rms_norm

        x_ND, weight_D, _ = inputs()
        return lambda: liger_rms_norm(x_ND, weight_D, EPS)

    def linghe_forward() -> Callable[[], object]:
        from linghe.utils.norm import triton_rms_norm_forward

        x_ND, weight_D, _ = inputs()
        return lambda: triton_rms_norm_forward(x_ND, weight_D, EPS)

    def linghe_quantize() -> Callable[[], object]:
        from linghe.utils.norm import triton_rms_norm_and_block_quant_forward

        x_ND, weight_D, _ = inputs()
        return lambda: triton_rms_norm_and_block_quant_forward(x_ND, weight_D, EPS, output_mode=0)

    def of_backward(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        x_ND, weight_D, grad_ND = inputs()
        x_ND.requires_grad_(), weight_D.requires_grad_()
        y_ND = function(x_ND, weight_D)
        return lambda: torch.autograd.grad(y_ND, (x_ND, weight_D), grad_ND, retain_graph=True)

    def torch_backward() -> Callable[[], object]:
        return of_backward(lambda x_ND, weight_D: functional.rms_norm(x_ND, (width,), weight_D, EPS))

    def liger_backward() -> Callable[[], object]:
        from liger_kernel.transformers.functional import liger_rms_norm

        return of_backward(lambda x_ND, weight_D: liger_rms_norm(x_ND, weight_D, EPS, in_place=False))

    def check() -> float:
        x_ND, weight_D, _ = inputs()
        exact_ND = functional.rms_norm(x_ND.double(), (width,), weight_D.double(), EPS)
        return relative_error(rms_norm.rms_norm(x_ND, weight_D, EPS), exact_ND)

    values = rows * width
    yield Case(
        "rms norm", name, forward(rms_norm.FORWARD_TILES[0], False), moved=values * 4, gate=("share", 0.85),
        check=check, peers={"torch": torch_forward, "liger": liger_forward, "linghe": linghe_forward},
        variants={str(tile): forward(tile, False) for tile in rms_norm.FORWARD_TILES},
    )  # fmt: skip
    yield Case(
        "rms norm + quantise 1x128", name, forward(rms_norm.FORWARD_TILES[0], True), moved=values * 5 + values // 32,
        gate=("share", 0.85), variants={str(tile): forward(tile, True) for tile in rms_norm.FORWARD_TILES},
    )  # fmt: skip
    yield Case(
        "rms norm + quantise 1x128, FP8 alone", name, forward(rms_norm.FP8_TILES[0], True, False),
        moved=values * 3 + values // 32, gate=("share", 0.85), peers={"linghe": linghe_quantize},
        variants={str(tile): forward(tile, True, False) for tile in rms_norm.FP8_TILES},
    )  # fmt: skip
    yield Case(
        "rms norm backward", name, backward(rms_norm.BACKWARD_TILES[0]), moved=values * 6, gate=("share", 0.85),
        peers={"torch": torch_backward, "liger": liger_backward},
        variants={str(tile): backward(tile) for tile in rms_norm.BACKWARD_TILES},
    )  # fmt: skip


def _embedding(tokens: int, vocabulary: int, hidden: int) -> Case:
    def inputs() -> tuple[Tensor, Tensor]:
        # Frequencies as in text: the most frequent is about one in twelve.
        share_V = 1.0 / torch.arange(1, vocabulary + 1)
        tokens_N = share_V.multinomial(tokens, replacement=True, generator=torch.Generator().manual_seed(0))
        return tokens_N.cuda(), normal((tokens, hidden), torch.bfloat16, "cuda")

    def ours(tile: tuple[int, int, int]) -> Prepared:
        def prepare() -> Callable[[], object]:
            tokens_N, grad_ND = inputs()
            return lambda: embedding.embedding_backward_triton(tokens_N, grad_ND, vocabulary, torch.bfloat16, tile)

        return prepare

    def by_torch() -> Callable[[], object]:
        tokens_N, grad_ND = inputs()
        return lambda: torch.ops.aten.embedding_dense_backward(grad_ND, tokens_N, vocabulary, -1, False)

    def check() -> float:
        tokens_N, grad_ND = inputs()
        found = embedding.embedding_backward_triton(tokens_N, grad_ND, vocabulary, torch.bfloat16)
        exact = embedding.embedding_backward_reference(tokens_N, grad_ND.double(), vocabulary, torch.float64)
        return relative_error(found, exact)

    return Case(
        "embedding backward", f"{tokens}x{hidden}", ours(embedding.TILES[0]), moved=(vocabulary + tokens) * hidden * 2,
        check=check, peers={"torch": by_torch}, variants={str(tile): ours(tile) for tile in embedding.TILES},
    )  # fmt: skip
