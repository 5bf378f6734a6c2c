"""Group-limited choice of experts (Ling 2.0 §2.2): the best groups by the sum of their two best scores, then the best
experts in them. And the optional losses on the scores.

`route` is the whole router: logits, choice, weights, counts; float32 throughout. On CUDA it is `router_triton`, whose
ties go to the lowest index; here they go as `torch.topk` has it.

Shapes: B sequences, S tokens of one, T tokens, D hidden, E experts, K chosen, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ling_flow.kernels.router_triton import route_triton


class Routed(NamedTuple):
    """What the router decided; `weights` and `logits` carry gradients."""

    indices_TK: Tensor  # int64: chosen experts, best first
    weights_TK: Tensor  # float32
    logits_TE: Tensor  # float32
    counts_E: Tensor  # int64: tokens that chose each expert


def route(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, top_k: int, n_group: int, topk_group: int, scaling: float
) -> Routed:
    """Logits `x · weightᵀ`, the experts with the best biased scores, and their weights.

    Args:
        weight_ED: float32, or the type of x.
        bias_E: float32, takes part in the choice alone.
    """
    if x_TD.is_cuda:
        return Routed(*route_triton(x_TD, weight_ED, bias_E, top_k, n_group, topk_group, scaling))
    return route_reference(x_TD, weight_ED, bias_E, top_k, n_group, topk_group, scaling)


def route_reference(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, top_k: int, n_group: int, topk_group: int, scaling: float
) -> Routed:
    """The definition."""
    logits_TE = functional.linear(x_TD.float(), weight_ED.float())
    scores_TE = logits_TE.sigmoid()
    indices_TK = choose_experts(scores_TE, bias_E, top_k, n_group, topk_group)
    counts_E = torch.bincount(indices_TK.flatten(), minlength=len(weight_ED))
    return Routed(indices_TK, expert_weights(scores_TE, indices_TK, scaling), logits_TE, counts_E)


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


def choose_experts_reference(scores_TE: Tensor, bias_E: Tensor, top_k: int, n_group: int, topk_group: int) -> Tensor:
    """`choose_experts` with ties in a fixed order: of equals, groups as well as experts, the lowest index first. What
    the Triton kernel gives."""
    biased_TE = scores_TE.detach() + bias_E
    if topk_group < n_group:
        grouped_TGM = biased_TE.unflatten(-1, (n_group, -1))
        group_scores_TG = grouped_TGM.sort(dim=-1, descending=True).values[..., :2].sum(-1)
        order_TG = group_scores_TG.sort(dim=-1, descending=True, stable=True).indices
        kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter_(-1, order_TG[..., :topk_group], True)
        biased_TE = grouped_TGM.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).flatten(-2)
    return biased_TE.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


def expert_weights(scores_TE: Tensor, indices_TK: Tensor, scaling: float) -> Tensor:
    """Weights (T, K) of the chosen experts: unbiased scores, normalised to sum 1 where there are several, times
    `scaling`. (Normalising a single one would leave the router without a gradient; the published code does not.)"""
    chosen_TK = scores_TE.gather(-1, indices_TK)
    if indices_TK.shape[-1] == 1:
        return chosen_TK * scaling
    return chosen_TK * (scaling / (chosen_TK.sum(-1, keepdim=True) + 1e-20))


def balance_loss(
    scores_BSE: Tensor, indices_BSK: Tensor, counted_BS: Tensor, of_sequences: int | None = None
) -> Tensor:
    """Mean over sequences of Σ_e f_e·P_e (DeepSeek-V3 eq. 17-20); 1 where the load is even.

    f_e: E/K · share of the sequence's tokens that chose e; P_e: mean of the scores, normalised to sum 1 per token.
    Tokens where `counted_BS` is false do not count; nor does a sequence of such tokens alone. The sum is divided by
    `of_sequences` where these are a part of so many.
    """
    experts, top_k = scores_BSE.shape[-1], indices_BSK.shape[-1]
    counted_BS1 = counted_BS.unsqueeze(-1).to(scores_BSE.dtype)
    tokens_B1 = counted_BS1.sum(1)
    chosen_BSE = torch.zeros_like(scores_BSE).scatter_(-1, indices_BSK, 1.0)  # a token's K experts are distinct
    frequency_BE = (chosen_BSE * counted_BS1).sum(1) * (experts / top_k) / tokens_B1.clamp(min=1)
    share_BE = (scores_BSE / scores_BSE.sum(-1, keepdim=True) * counted_BS1).sum(1) / tokens_B1.clamp(min=1)
    return (frequency_BE * share_BE).sum() / (of_sequences or (tokens_B1 > 0).sum().clamp(min=1))


def z_loss(logits_BSE: Tensor, counted_BS: Tensor, of_tokens: int | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)² (ST-MoE §2.2): keeps the router's logits small. The sum is divided by
    `of_tokens` where these are a part of so many."""
    squared_BS = logits_BSE.logsumexp(-1).square()
    return (squared_BS * counted_BS).sum() / (of_tokens or counted_BS.sum().clamp(min=1))
