"""The law is fitted for the run that is trained: its target is what the stages say, its trials are of their family."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from components.pretrain import PretrainConfig
from ling_flow.config import merge, parse
from ling_flow.errors import UserError
from ling_flow.model.config import ModelConfig
from ling_flow.scaling.design import SCALED_FIELDS

if TYPE_CHECKING:
    from components.plan import LifecycleConfig

STAGES = ("pretrain_short", "pretrain_mid", "pretrain_long")
OF_THE_STAGE = frozenset({"max_position_embeddings", "rope_theta", "rope_scaling", "eos_token_id", "pad_token_id"})
"""What each stage gives its model anew; the compute of a token does not depend on it."""
MTP_FIELDS = ("num_nextn_predict_layers", "mtp_loss_scaling_factor")


def with_the_target(merged: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`merged`, the configs by phase as JSON data, with the target of fit_scaling_laws taken from the stages where
    `overrides` says nothing of it.

    Raises:
        UserError: a stage's config is wrong.
    """
    first, *others = (parse(PretrainConfig, merged[stage], stage) for stage in STAGES)
    target = {
        "model": first.model.model_dump(mode="json"),
        "tokens": first.tokens + sum(stage.tokens for stage in others),
        "sequence_length": first.sequence_length,
    }
    given = overrides.get("fit_scaling_laws", {})
    if not isinstance(given, Mapping):
        return dict(merged)
    return {**merged, "fit_scaling_laws": merge({**merged["fit_scaling_laws"], **target}, given)}


def check_target(config: LifecycleConfig) -> None:
    """
    Raises:
        UserError: the stages are not of one model; the law's target is not what they train; the wind tunnel is of
            another family.
    """
    first, fit, tunnel = config.pretrain_short, config.fit_scaling_laws, config.wind_tunnel
    for stage in STAGES[1:]:
        _check_same(f"{stage}.model", getattr(config, stage).model, first.model, OF_THE_STAGE)
    _check_same("fit_scaling_laws.model", fit.model, first.model, OF_THE_STAGE)
    stages = [getattr(config, stage) for stage in STAGES]
    tokens, lengths = sum(stage.tokens for stage in stages), sorted({stage.sequence_length for stage in stages})
    if fit.tokens != tokens:
        summed = " + ".join(f"{stage}.tokens" for stage in STAGES)
        raise UserError(f"fit_scaling_laws.tokens: must be {summed} ({tokens:,}), got {fit.tokens:,}; leave it out")
    if fit.sequence_length not in lengths:
        raise UserError(
            f"fit_scaling_laws.sequence_length: must be that of a stage, as pretrain_short.sequence_length "
            f"({first.sequence_length}), got {fit.sequence_length}; leave it out"
        )
    # Of the same width it is the same model, of another the ladder says how it differs.
    free = () if tunnel.model.hidden_size == first.model.hidden_size else SCALED_FIELDS
    _check_same("wind_tunnel.model", tunnel.model, first.model, {*OF_THE_STAGE, *MTP_FIELDS, *free})


def _check_same(field: str, model: ModelConfig, trained: ModelConfig, but: Collection[str]) -> None:
    for name in ModelConfig.model_fields:
        found, wanted = getattr(model, name), getattr(trained, name)
        if found != wanted and name not in but:
            raise UserError(f"{field}.{name}: must be pretrain_short.model.{name} ({wanted}), got {found}")
