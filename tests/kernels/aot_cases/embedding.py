"""Gradient of the embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ling_flow.kernels import embedding
from ling_flow.kernels.shapes import normal
from tests.kernels.aot_cases import Case


def cases() -> Iterator[Case]:
    for tokens, vocabulary, width in ((32768, 157184, 2048), (16384, 157184, 4096)):
        tokens_N = torch.empty(tokens, dtype=torch.int64, device="meta")
        grad_ND = normal((tokens, width), torch.bfloat16, "meta")
        for table in (torch.bfloat16, torch.float32):
            yield Case(
                f"embedding backward, {tokens}x{width} {str(table).removeprefix('torch.')}",
                lambda tokens_N=tokens_N, grad_ND=grad_ND, vocabulary=vocabulary, table=table: (
                    embedding.embedding_backward_triton(tokens_N, grad_ND, vocabulary, table)
                ),
            )
