"""Group-limited choice of experts (Ling 2.0 §2.2): the best groups by the sum of their two best scores, then the best
experts in them.

Shapes: T tokens, E experts, K chosen, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor


def choose_experts(scores_TE: Tensor, bias_E: Tensor, top_k: int, n_group: int, topk_group: int) -> Tensor:
    """Indices (T, K) of the chosen experts, best first. The bias takes part in the choice only, never in the
    weights."""
    biased_TE = scores_TE.detach() + bias_E
    if topk_group < n_group:
        grouped_TGM = biased_TE.unflatten(-1, (n_group, -1))
        group_scores_TG = grouped_TGM.topk(2, dim=-1, sorted=False).values.sum(-1)
        kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
        kept_TG.scatter_(-1, group_scores_TG.topk(topk_group, dim=-1, sorted=False).indices, True)
        biased_TE = grouped_TGM.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).flatten(-2)
    return biased_TE.topk(top_k, dim=-1).indices


def expert_weights(scores_TE: Tensor, indices_TK: Tensor, scaling: float) -> Tensor:
    """Weights (T, K) of the chosen experts: unbiased scores, normalised to sum 1, times `scaling`."""
    chosen_TK = scores_TE.gather(-1, indices_TK)
    return chosen_TK * (scaling / (chosen_TK.sum(-1, keepdim=True) + 1e-20))
