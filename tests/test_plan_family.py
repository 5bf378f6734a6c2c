"""`lingflow plan --preset mini|flash|one_t`: the family beside what is published."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.conftest import Called

Call = Callable[..., Called]

PUBLISHED = {
    "mini": (16_255_638_528, 1_432_968_192, 789_142_528, 827_861_248, 14_813),
    "flash": (102_889_697_280, 6_152_269_824, 4_864_618_496, 3_306_180_864, 24_161),
    "one_t": (999_705_309_184, 51_054_407_680, 48_479_105_024, 13_222_584_576, 59_243),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_figures_are_the_published_ones(call: Call, preset: str) -> None:
    done = call("plan", "--preset", preset, "--json")
    assert done.code == 0, done.err
    figures = done.json
    parameters, published = figures["parameters"], figures["published"]
    names = ("total", "active", "active_non_embedding", "mtp", "tensors")
    assert tuple(parameters[name] for name in names) == PUBLISHED[preset]
    for name in ("total", "active", "active_non_embedding"):
        if published[name] is not None:
            assert parameters[name] == pytest.approx(published[name], rel=0.025)
    cost = figures["training_cost"]
    assert cost["law_flops"] == pytest.approx(published["law_flops"], rel=0.01)

    flops = figures["flops_per_token"]
    parts = ("attention", "dense", "router", "experts", "head", "mtp")
    assert sum(flops[part] for part in parts) == flops["total"] == 3 * flops["forward"]
    assert flops["attention_projections"] + flops["attention_scores"] == flops["attention"]
    assert cost["flops"] == pytest.approx(flops["total"] * 20e12)

    memory = figures["training_memory"]
    parts = ("weights", "gradients", "optimizer", "gathered", "activations_recompute", "logits")
    assert sum(memory[part] for part in parts) == memory["total"] < 80e9 * 1.05  # the GPUs of the published runs
    assert memory["ranks"] == {"mini": 8, "flash": 64, "one_t": 2016}[preset]
    assert figures["dense_equivalent"]["leverage_at_1e22"] > 7


def test_table_shows_the_family_side_by_side_and_marks_the_one_asked_for(call: Call) -> None:
    out = call("plan", "--preset", "flash").out
    header = out.splitlines()[0]
    assert header.split("  ")[-1].strip() == "Ling-1T"
    assert "▸ Ling-flash-2.0" in header
    assert "▸ Ling-mini-2.0" not in header
    for preset, (total, active, non_embedding, mtp, tensors) in PUBLISHED.items():
        for number in (total, active, non_embedding, mtp, tensors):
            assert f"{number:,}" in out, (preset, number)
    lines = {re.split(r" {2,}", line.strip())[0]: line.split() for line in out.splitlines()}
    assert lines["FLOPs by the laws (M·D)"][-3:] == ["1.35e+23", "7.13e+23", "6.46e+24"]
    assert lines["leverage at M·D"][-3:] == ["9.3", "11.0", "13.7"]


def test_options_reach_the_figures(call: Call) -> None:
    base = call("plan", "--preset", "mini", "--json").json
    options = ["--context", "32768", "--scores", "causal", "--tokens", "1e12", "--mfu", "0.5", "--watts", "1000"]
    layout = [item for change in ("data=16", "sharding=fsdp", "recompute=false") for item in ("--layout", change)]
    other = call("plan", "--preset", "mini", "--json", *options, "--peak-tflops", "500", *layout).json
    causal_scores = base["flops_per_token"]["attention_scores"] * 8 / 2
    assert other["flops_per_token"]["attention_scores"] == pytest.approx(causal_scores, rel=1e-4)
    cost = other["training_cost"]
    assert cost["gpu_hours"] == pytest.approx(cost["flops"] / (500e12 * 0.5 * 3600))
    assert cost["energy_kwh"] == pytest.approx(cost["gpu_hours"])
    assert cost["flops"] == pytest.approx(other["flops_per_token"]["total"] * 1e12)
    memory = other["training_memory"]
    assert memory["ranks"] == 16
    assert memory["gathered"] > 0
    assert memory["total"] - memory["activations"] == sum(
        memory[part] for part in ("weights", "gradients", "optimizer", "gathered", "logits")
    )
    h20 = call("plan", "--preset", "mini", "--json", "--gpu", "h20").json["training_cost"]
    assert h20["gpu_hours"] == pytest.approx(base["training_cost"]["gpu_hours"] * 989.5 / 148)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "mini", "--mfu", "1.5"], "mfu: input should be less than or equal to 1"),
        (["--preset", "mini", "--mfu", "1e-320"], "mfu: input should be greater than or equal to 0.000001"),
        (
            ["--preset", "mini", "--tokens", "1e300"],
            "tokens: input should be less than or equal to 1000000000000000000",
        ),
        (["--preset", "mini", "--context", "many"], "context: input should be a valid integer"),
        (["--preset", "mini", "--tokens", "nan"], "tokens: input should be a finite number"),
        (["--preset", "mini", "--gpu", "b300"], "gpu: input should be 'a100', 'h20', 'h100', 'h800' or 'h200'"),
        (["--preset", "mini", "--layout", "dta=4"], "layout.dta: unknown field; did you mean 'data'?"),
        (["--preset", "mini", "--layout", "data"], "--layout data: expected FIELD=VALUE"),
        (["--preset", "mini", "--layout", "expert=3"], "layout.expert: must divide data (8), got 3"),
        (["--preset", "one_t", "--layout", "pipeline=82"], "layout.pipeline: must be at most 81"),
        (["--preset", "mini", "--seed", "0"], "--seed: has no meaning with --preset mini"),
        (["--preset", "mini", "--set", "a.b=1"], "--set: has no meaning with --preset mini"),
        (["--peak-tflops", "100"], "--peak-tflops: needs one of --preset mini, flash, one_t"),
        (["--preset", "tiny", "--layout", "data=4"], "--layout: needs one of --preset mini, flash, one_t"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(call: Call, arguments: list[str], said: str) -> None:
    done = call("plan", *arguments)
    assert done.code == 2
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_a_dag_keeps_its_own_plan(call: Call) -> None:
    assert "nodes" in call("plan", "--preset", "small", "--json").json
    assert "preset: must be one of tiny, small" in call("run", "--preset", "mini").err


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; sys.argv = ['lingflow', 'plan', '--preset', 'one_t']\n"
        "from ling_flow.cli import main; main()\n"
        "heavy = {'torch', 'ray', 'mlflow', 'kfp', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
