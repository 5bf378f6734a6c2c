"""Several documents in one row: putting them there, and what keeps them apart.

Shapes: B batch, S sequence, T = B·S tokens, N documents of the whole batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

PADDING = -1
"""The document number of tokens that belong to none."""


class Packing(NamedTuple):
    """The documents of a batch, row after row, in order. A run of padding stands among them."""

    lengths: list[int]  # of the N documents, tokens; they sum to T
    bounds_N1: Tensor  # int32: where each document begins, and T
    positions_BS: Tensor  # int64: place in the document, from 0; 0 in padding
    longest: int  # tokens of the longest document, padding aside


def in_one_row(documents: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(token ids, document numbers), both int64 (1, all tokens): the documents one after another, without padding."""
    numbers = torch.arange(len(documents)).repeat_interleave(torch.tensor([len(tokens) for tokens in documents]))
    return torch.tensor([list(itertools.chain.from_iterable(documents))]), numbers.unsqueeze(0)


def pack(documents_BS: Tensor) -> Packing:
    """Find the documents in `documents_BS` (int64): runs of equal numbers within a row."""
    first_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    first_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    starts_N = first_BS.flatten().nonzero().squeeze(1)
    bounds_N1 = functional.pad(starts_N, (0, 1), value=documents_BS.numel())
    lengths_N = torch.diff(bounds_N1)
    positions_T = torch.arange(documents_BS.numel(), device=documents_BS.device)
    positions_BS = (positions_T - starts_N.repeat_interleave(lengths_N)).view_as(documents_BS)
    positions_BS = positions_BS.masked_fill(documents_BS == PADDING, 0)
    return Packing(lengths_N.tolist(), bounds_N1.to(torch.int32), positions_BS, int(positions_BS.max()) + 1)
