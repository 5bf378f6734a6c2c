"""Preset and overrides: sources of one's own, the target of the law, and phases that must fit each other."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from components.plan import LifecycleConfig, PlanConfig, resolve_lifecycle
from components.plan.presets import PRESETS
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


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_resolved_to_itself(preset: str) -> None:
    assert resolve_lifecycle(PlanConfig(preset=preset, seed=3)) == PRESETS[preset](3)


def test_the_law_is_fitted_for_what_the_stages_train() -> None:
    wide = {"model": {"hidden_size": 192, "num_attention_heads": 4}}
    stages = {stage: wide for stage in STAGES} | {"pretrain_short": {**wide, "tokens": 500_000, "sequence_length": 64}}
    fit = resolved(stages).fit_scaling_laws
    assert (fit.model.hidden_size, fit.tokens, fit.sequence_length) == (192, 1_800_000, 64)
    given = {"model": wide["model"], "tokens": 1_800_000, "sequence_length": 256, "bootstrap_samples": 20}
    fit = resolved({**stages, "fit_scaling_laws": given}).fit_scaling_laws
    assert (fit.model.hidden_size, fit.sequence_length, fit.bootstrap_samples) == (192, 256, 20)


def test_the_wind_tunnel_may_be_another_width_of_the_family() -> None:
    tunnel = {
        "model": {"hidden_size": 48, "num_attention_heads": 1, "intermediate_size": 96, "moe_intermediate_size": 32}
    }
    assert resolved({"wind_tunnel": tunnel}).wind_tunnel.model.hidden_size == 48


def test_a_yarn_that_a_stage_inherits_gives_context() -> None:
    longest = {"model": {"max_position_embeddings": 1024}}
    yarn = {"rope_scaling": {"factor": 2, "original_max_position_embeddings": 256}}
    stages = {stage: longest for stage in STAGES} | {"pretrain_mid": {**longest, **yarn}}
    resolved({**stages, "evaluate": {"validation_sequence_length": 512}})
    with pytest.raises(UserError, match=r"^evaluate\.validation_sequence_length: must be at most the context of 512 "):
        resolved({**stages, "evaluate": {"validation_sequence_length": 513}})
    with pytest.raises(UserError, match=r"^pretrain_long\.sequence_length: must be at most 512, .*, got 1024$"):
        resolved({**stages, "pretrain_long": {**longest, "sequence_length": 1024}})


def test_gates_on_figures_of_tasks_and_sources() -> None:
    metrics = ("exact_match_on/chain_sum/2", "chance/gcd/1", "validation_loss/python_code", "problems")
    gates = [{"metric": metric, "threshold": 0} for metric in metrics]
    assert len(resolved({"register": {"gates": gates}}).register.gates) == 4


def test_planning_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'scipy', 'reasoning_gym', 'ray', 'mlflow'}"
    imports = "import sys; from components.plan import PlanConfig, resolve_lifecycle"
    code = f"{imports}; resolve_lifecycle(PlanConfig()); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


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
        (
            {"fit_scaling_laws": {"tokens": 60_000}},
            r"^fit_scaling_laws\.tokens: must be pretrain_short\.tokens \+ .*\(2,200,000\), got 60,000; leave it out$",
        ),
        (
            {"fit_scaling_laws": {"sequence_length": 100}},
            r"^fit_scaling_laws\.sequence_length: must be .*pretrain_short\.sequence_length \(128\), got 100; leave it",
        ),
        (
            {"fit_scaling_laws": {"model": {"num_hidden_layers": 8}}},
            r"^fit_scaling_laws\.model\.num_hidden_layers: must be pretrain_short\.model\..* \(4\), got 8$",
        ),
        (
            {"pretrain_long": {"model": {"num_experts": 32}}},
            r"^pretrain_long\.model\.num_experts: must be pretrain_short\.model\.num_experts \(16\), got 32$",
        ),
        (
            {"wind_tunnel": {"model": {"num_hidden_layers": 3}}},
            r"^wind_tunnel\.model\.num_hidden_layers: must be pretrain_short\.model\.num_hidden_layers \(4\), got 3$",
        ),
        (
            {stage: {"model": {"moe_intermediate_size": 128}} for stage in STAGES},
            r"^wind_tunnel\.model\.moe_intermediate_size: must be pretrain_short\.model\..* \(128\), got 64$",
        ),
        ({"pretrain_short": {"tokens": "many"}}, r"^pretrain_short\.tokens: "),
        ({"fit_scaling_laws": 3}, r"^fit_scaling_laws: "),
        (
            {"pretrain_short": {"tokens": 10**9}},
            r"^fit_scaling_laws\.allow_extrapolation_factor: the target's .* times the largest trial's .* than 100",
        ),
        (
            {"fit_scaling_laws": {"batch_multiple_tokens": 5000}},
            r"^fit_scaling_laws\.batch_multiple_tokens: no multiple of 5000 lies between 768 and 3072 tokens",
        ),
        (
            {"merge_checkpoints": {"last_k": 11}},
            r"^merge_checkpoints\.last_k: must be at most pretrain_long\.checkpoints_kept \(10\), got 11$",
        ),
        (
            {"evaluate": {"validation_sequence_length": 257}},
            r"^evaluate\.validation_sequence_length: must be at most the context of 256 tokens .*, got 257$",
        ),
        ({"evaluate": {"max_new_tokens": 256}}, r"^evaluate\.max_new_tokens: must leave room .*, got 256$"),
        ({"capability_pass": {"max_new_tokens": 256}}, r"^capability_pass\.max_new_tokens: must leave room "),
        ({"preference_pass": {"lpo": {"max_new_tokens": 256}}}, r"^preference_pass\.lpo\.max_new_tokens: must leave "),
        (
            {"deploy": {"max_tokens": 256}},
            r"^deploy\.max_tokens: must leave room for a question in the context of 256 ",
        ),
        (
            {"register": {"gates": [{"metric": "exact_match", "threshold": 0}]}},
            r"^register\.gates\.0\.metric: no metric 'exact_match'; the evaluation reports problems, exact_match_thin",
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
