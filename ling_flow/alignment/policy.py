"""The preference pass: sample groups, reward them (Evo-CoT), improve the policy by sentences (LPO), again and again.

Reinforcement settings follow Ring-1T where Ling 2.0 is silent: AdamW 0.9/0.999, weight decay 0.01, no KL term,
groups of 8, temperature 1, and the router's expert bias frozen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor

from ling_flow.alignment.dft import require_finite
from ling_flow.alignment.lpo import LpoBatch, collate, kl_to_reference, lpo_loss
from ling_flow.alignment.rollouts import Group, minibatches, sample_groups
from ling_flow.alignment.settings import LpoSettings
from ling_flow.data.reasoning import Problem
from ling_flow.data.tokenizer import Tokenizer
from ling_flow.evaluation.tasks import Question, exact_match, switch_obeyed
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.optimizer import build_optimizer
from ling_flow.training.settings import OptimizerSettings


def align(
    model: BailingMoeV2ForCausalLM,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    settings: LpoSettings,
    seed: int,
    on_rollout: Callable[[int, dict[str, float]], None],
) -> None:
    """Improve `model` in place.

    Args:
        problems: at least `settings.rollouts · settings.questions_per_rollout`; they are asked with thinking and
            without in turn.
        seed: of the sampling.
        on_rollout: called after each rollout's updates with (rollout, what happened).

    Raises:
        UserError: a loss is not finite.
    """
    optimizer = build_optimizer(
        model,
        OptimizerSettings(
            learning_rate=settings.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=0.01,
            gradient_clip=settings.gradient_clip,
        ),
    )
    reference = copy.deepcopy(model).eval() if settings.kl_coefficient > 0 else None
    model.eval()  # sampling and learning see the same network, and the router keeps no counts
    for rollout in range(settings.rollouts):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate_factor(rollout, settings.rollouts)
        first = rollout * settings.questions_per_rollout
        asked = problems[first : first + settings.questions_per_rollout]
        groups = sample_groups(
            model,
            tokenizer,
            [Question(problem, thinking=index % 2 == 0) for index, problem in enumerate(asked)],
            settings.group_size,
            settings.rewards,
            max_new_tokens=settings.max_new_tokens,
            seed=seed + first * settings.group_size,
            sequences_per_batch=settings.sequences_per_batch,
        )
        clipped, drift, kl = [], [], []
        for minibatch in minibatches(groups, tokenizer, settings.groups_per_minibatch):
            batch = collate(minibatch, next(model.parameters()).device)
            logprob_BR = response_logprobs(model, batch)
            objective = lpo_loss(logprob_BR, batch, settings.clip)
            loss = objective.loss
            if reference is not None:
                with torch.no_grad():
                    reference_BR = response_logprobs(reference, batch)
                divergence = kl_to_reference(logprob_BR, reference_BR, batch)
                loss = loss + settings.kl_coefficient * divergence
                kl.append(float(divergence.detach()))
            require_finite(float(loss.detach()), settings.learning_rate, f"rollout {rollout + 1}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
            optimizer.step()
            clipped.append(objective.clipped)
            drift.append(objective.drift)
        numbers = {"clipped_share": clipped, "ratio_drift": drift, "kl": kl}
        on_rollout(rollout, _summary(groups) | {name: fmean(values) for name, values in numbers.items() if values})


def response_logprobs(model: BailingMoeV2ForCausalLM, batch: LpoBatch) -> Tensor:
    """Log-probabilities (B, R) of the responses' tokens under `model`; differentiable."""
    return batch.spread(model.token_logprobs(batch.tokens_1S1, batch.mask_1S, batch.documents_1S1))


def _rate_factor(rollout: int, rollouts: int) -> float:
    """Up to 1 over the first tenth of the rollouts, for AdamW's first steps are its noisiest; then down, to settle."""
    rising = -(-rollouts // 10)
    return min((rollout + 1) / rising, (rollouts - rollout) / (rollouts - rising or 1), 1.0)


def _summary(groups: Sequence[Group]) -> dict[str, float]:
    answers = [answer for group in groups for answer in group.answers]
    return {
        "reward": fmean(reward.total for group in groups for reward in group.rewards),
        "exact_match": exact_match(answers),
        "switch_obeyed": switch_obeyed(answers),
        "response_tokens": fmean(len(answer.tokens) for answer in answers),
    }
