"""Preset and overrides: sources of one's own and the mixtures that name them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from components.plan import LifecycleConfig, PlanConfig, resolve_lifecycle
from ling_flow.errors import UserError

STAGES = ("pretrain_short", "pretrain_mid", "pretrain_long")
OWN = [
    {"kind": "files", "name": "web", "paths": ["web/*.jsonl"]},
    {"kind": "files", "name": "notes", "paths": ["notes/*.md"]},
]


def resolved(overrides: dict[str, Any]) -> LifecycleConfig:
    return resolve_lifecycle(PlanConfig(overrides=json.dumps(overrides)))


def mixtures(mixture: dict[str, float]) -> dict[str, Any]:
    return {phase: {"mixture": mixture} for phase in ("wind_tunnel", *STAGES)}


def test_sources_of_ones_own_with_names_of_ones_own() -> None:
    config = resolved({"prepare_data": {"sources": OWN}, **mixtures({"web": 3, "notes": 1})})
    assert config.wind_tunnel.mixture == {"web": 3, "notes": 1}
    assert all(getattr(config, stage).mixture == {"web": 3, "notes": 1} for stage in STAGES)


def test_weights_of_the_sources_that_stay_stay() -> None:
    prose = {"kind": "files", "name": "python_prose", "paths": ["notes/*.md"]}
    config = resolved({"prepare_data": {"sources": [prose, OWN[0]]}, **mixtures({"web": 0.3})})
    assert config.pretrain_short.mixture == {"python_prose": 0.2, "web": 0.3}
    assert config.pretrain_long.mixture == {"python_prose": 0.08, "web": 0.3}


def test_one_weight_of_the_presets_is_changed_by_itself() -> None:
    config = resolved({"pretrain_mid": {"mixture": {"python_code": 0.5}}})
    assert config.pretrain_mid.mixture["python_code"] == 0.5
    assert len(config.pretrain_mid.mixture) == 5


TASKS = [{"name": "chain_sum"}, {"name": "gcd"}]


def decontaminated(evaluate: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "prepare_data": {"filters": {"decontamination": {"tasks": TASKS, **fields}}},
        "evaluate": {"tasks": TASKS, **(evaluate or {})},
    }


def test_decontamination_from_the_problems_that_are_asked() -> None:
    assert resolved(decontaminated()).prepare_data.filters.decontamination is not None
    resolved(decontaminated({"seed": 6, "problems": 2000}, seed=6, problems=2000))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (decontaminated({"tasks": TASKS[:1]}), r"decontamination\.tasks: must be those of evaluate\.tasks"),
        (decontaminated({"seed": 6}), r"decontamination\.seed: must be evaluate\.seed \(6\), got 1$"),
        (
            decontaminated({"problems": 2000}),
            r"decontamination\.problems: must be at least evaluate\.problems \(2000\)",
        ),
        (
            {"prepare_data": {"sources": OWN}},
            r"^wind_tunnel\.mixture, pretrain_short\.mixture, .*: missing; .* give the weight of each of yours$",
        ),
        (
            {"prepare_data": {"sources": OWN}, **mixtures({"web": 1, "note": 1})},
            r"^wind_tunnel\.mixture\.note: is none of prepare_data\.sources; did you mean 'notes'\?$",
        ),
        (
            {"pretrain_mid": {"mixture": {"books": 1}}},
            r"^pretrain_mid\.mixture\.books: is none of prepare_data\.sources; they are python_code, python_prose, ",
        ),
        (
            {"prepare_data": {"sources": OWN}, **mixtures({"web": 1})},
            r"^prepare_data\.sources: 'notes' is in no mixture; give it a weight \(or 0\) in wind_tunnel\.mixture, ",
        ),
        ({"prepare_data": {"sources": "web/*"}}, r"^prepare_data\.sources: input should be a valid list"),
        ({"prepare_data": {"sources": ["web"]}, **mixtures({"web": 1})}, r"^prepare_data\.sources\.0"),
        ({"prepare_data": 3}, r"^prepare_data: "),
        ({"pretrain_short": {"mixture": None}}, r"^pretrain_short\.mixture: input should be a valid dictionary"),
    ],
)
def test_what_does_not_fit_is_named(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolved(overrides)
