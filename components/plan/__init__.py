"""Plan: preset and overrides become one validated config per phase, before anything is spent."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any

from pydantic import Field

from components.capability_pass import CapabilityPassConfig
from components.deploy import DeployConfig
from components.evaluate import EvaluateConfig
from components.fit_scaling_laws import FitScalingLawsConfig
from components.merge_checkpoints import MergeCheckpointsConfig
from components.plan.checks import (
    check_checkpoints,
    check_context,
    check_decontamination,
    check_gates,
    check_sweep,
    check_vocabulary,
)
from components.plan.mixtures import check_filled, check_mixtures, without_absent_sources
from components.plan.target import check_target, with_the_target
from components.preference_pass import PreferencePassConfig
from components.prepare_data import PrepareDataConfig
from components.pretrain import PretrainConfig
from components.register import RegisterConfig
from components.wind_tunnel import WindTunnelConfig
from ling_flow.config import StrictModel, canonical_json, identity_of, merge, parse
from ling_flow.errors import UserError
from ling_flow.flow.component import Resources, component

warnings.filterwarnings("ignore", message='Field name "register" in "LifecycleConfig" shadows')  # ABCMeta.register


class LifecycleConfig(StrictModel):
    """One config per node of `dags/lifecycle.py`, by the node's name."""

    prepare_data: PrepareDataConfig = Field(description="config of prepare_data")
    wind_tunnel: WindTunnelConfig = Field(description="config of wind_tunnel")
    fit_scaling_laws: FitScalingLawsConfig = Field(description="config of fit_scaling_laws")
    pretrain_short: PretrainConfig = Field(description="config of the first stage: short context, mixed data")
    pretrain_mid: PretrainConfig = Field(description="config of mid-training: longer context, chains of thought")
    pretrain_long: PretrainConfig = Field(description="config of the last stage: longest context")
    merge_checkpoints: MergeCheckpointsConfig = Field(description="config of merge_checkpoints")
    capability_pass: CapabilityPassConfig = Field(description="config of capability_pass")
    preference_pass: PreferencePassConfig = Field(description="config of preference_pass")
    evaluate: EvaluateConfig = Field(description="config of evaluate")
    register: RegisterConfig = Field(description="config of register")
    deploy: DeployConfig = Field(description="config of deploy")


class PlanConfig(StrictModel):
    """What a user chooses."""

    preset: str = Field("tiny", description="named sizes of everything: tiny (laptop, minutes) or small")
    overrides: str = Field("{}", description='JSON object by phase, for example {"pretrain_short": {"tokens": 200000}}')
    seed: int = Field(0, ge=0, lt=2**31, description="seed of every phase")
    resolved: str = Field(
        "", description="digest of the resolved configs; filled in, so that a changed preset is a new plan"
    )


def resolve_lifecycle(config: PlanConfig) -> LifecycleConfig:
    """The preset with the overrides laid over it, validated whole. Sources in `overrides` replace the preset's, and
    with them the weights of those that are gone. What the law is fitted for is what the stages train.

    Raises:
        UserError: an unknown preset, or an override that does not fit; the line names phase and field. Phases that do
            not fit each other (`mixtures`, `target`, `checks`). A given tokenizer that cannot be read.
    """
    from components.plan.presets import PRESETS

    if config.preset not in PRESETS:
        raise UserError(f"preset: must be one of {', '.join(PRESETS)}, got {config.preset!r}")
    try:
        overrides: Any = json.loads(config.overrides)
    except ValueError as error:
        raise UserError(f"overrides: not valid JSON ({error})") from None
    if not isinstance(overrides, dict):
        raise UserError(f"overrides: must be a JSON object by phase, got {config.overrides[:60]!r}")
    base = PRESETS[config.preset](config.seed).model_dump(mode="json")
    merged = merge(without_absent_sources(base, overrides), overrides)
    check_filled(merged)
    merged = with_the_target(merged, overrides)
    resolved = parse(LifecycleConfig, merged, "")
    for check in (
        check_mixtures,
        check_decontamination,
        check_vocabulary,
        check_target,
        check_sweep,
        check_checkpoints,
        check_context,
        check_gates,
    ):
        check(resolved)
    return resolved


def _resolved(config: PlanConfig) -> PlanConfig:
    identity = canonical_json(identity_of(resolve_lifecycle(config)))
    return config.model_copy(update={"resolved": hashlib.sha256(identity.encode()).hexdigest()[:16]})


@component(version=1, resources=Resources(), planner=True, resolve=_resolved)
def plan(config: PlanConfig) -> LifecycleConfig:
    """Resolve preset and overrides into one validated config per phase."""
    return resolve_lifecycle(config)
