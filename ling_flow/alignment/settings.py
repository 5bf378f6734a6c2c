"""Settings of the two post-training passes. No torch here."""

from __future__ import annotations

from pydantic import Field

from ling_flow.alignment.rewards import RewardSettings
from ling_flow.config import StrictModel


class LpoSettings(StrictModel):
    """How the preference pass samples and learns."""

    rollouts: int = Field(28, ge=1, description="times that answers are sampled from the current policy")
    questions_per_rollout: int = Field(64, ge=2, description="questions per rollout, with thinking and without in turn")
    group_size: int = Field(8, ge=2, description="answers sampled to each question")
    groups_per_minibatch: int = Field(
        8, ge=1, description="groups per optimizer step; fewer than a rollout's move the ratios from 1"
    )
    clip: float = Field(0.03, gt=0, lt=1, description="ε, how far a sentence's importance ratio may leave 1")
    learning_rate: float = Field(
        7e-5,
        gt=0,
        description="peak of AdamW's learning rate; rises over the first tenth of the rollouts, then falls to 0",
    )
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    kl_coefficient: float = Field(
        0.0, ge=0, description="β, weight of the KL divergence from the model before the pass"
    )
    max_new_tokens: int = Field(96, ge=1, description="longest response, tokens")
    sequences_per_batch: int = Field(512, ge=1, description="responses sampled at once")
    rewards: RewardSettings = Field(RewardSettings(), description="weights of the reward")
