"""The command line: what it imports, what it refuses, what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Called

Call = Callable[..., Called]
PRETRAINING = ("pretrain_short", "pretrain_mid", "pretrain_long")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plan", "--help"], ["serve", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['lingflow', *sys.argv[1:]]\n"
        "from ling_flow.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'kfp'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: lingflow" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--preset", "enormous"], "preset: must be one of tiny, small"),
        (["run", "no_such_dag"], "DAG 'no_such_dag': not found; known: lifecycle"),
        (["run", "nowhere/dag.py"], "nowhere/dag.py: no such file"),
        (["run", "--set", "pretrain_short.tokens=-5"], "pretrain_short.tokens: input should be greater than 0"),
        (["run", "--set", "pretrain_short.tokens=many"], "pretrain_short.tokens: input should be a valid integer"),
        (["run", "--set", "pretrain_short.tokns=5"], "pretrain_short.tokns: unknown field; did you mean 'tokens'?"),
        (["run", "--set", "pretrain_shrt.tokens=5"], "pretrain_shrt: unknown field; did you mean 'pretrain_short'?"),
        (["run", "--set", "nonsense"], "--set nonsense: expected name.path=value"),
        (
            ["run", "--set", "pretrain_short.model.num_experts_per_tok=99"],
            "num_experts_per_tok must be at most num_experts (16), got 99",
        ),
        (["run", "--set", "pretrain_long.sequence_length=100000"], "sequence_length must be at most"),
        (["run", "--config", "missing.yaml"], "missing.yaml: no such file"),
        (["run", "--rebuild", "pretrain_tiny"], "--rebuild pretrain_tiny: no such step"),
        (["run", "--seed", "x"], "'x' is not a valid integer"),
        (["compile", "lifecycle", "-o", "out.txt"], "out.txt: the file must end in .yaml"),
        (["lineage", "models:/nothing@champion"], "nothing"),
        (["serve", "no/such/model"], "no/such/model"),
        (["frobnicate"], "No such command 'frobnicate'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(call: Call, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = call(*arguments)
    assert done.code == 2, done.err
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "home" / "artifacts").exists()
    assert not (tmp_path / "home" / "runs").exists()


def test_a_files_source_that_is_not_there_is_refused_before_anything_runs(call: Call, tmp_path: Path) -> None:
    config = tmp_path / "own.yaml"
    missing = tmp_path / "nothing-*.jsonl"
    mixtures = [f"{phase}:\n  mixture: {{mine: 1}}\n" for phase in ("wind_tunnel", *PRETRAINING)]
    sources = f"prepare_data:\n  sources:\n  - {{kind: files, name: mine, paths: ['{missing}']}}\n"
    config.write_text(sources + "".join(mixtures))
    done = call("run", "--config", str(config))
    assert done.code == 2
    assert str(missing) in done.err


def test_config_file_and_command_line_together(call: Call, tmp_path: Path) -> None:
    config = tmp_path / "own.yaml"
    config.write_text("seed: 7\npretrain_short:\n  tokens: 70000\n  gradient_clip: 0.5\n")
    plain = {node["step"]: node["fingerprint"] for node in call("plan", "--json").json["nodes"]}
    changed = {
        node["step"]: node["fingerprint"] for node in call("plan", "--json", "--config", str(config)).json["nodes"]
    }
    assert all(plain[step] != changed[step] for step in plain), "the seed reaches every step"
    over = call("plan", "--json", "--config", str(config), "--set", "pretrain_short.tokens=80000").json["nodes"]
    same = [node["step"] for node in over if node["fingerprint"] == changed[node["step"]]]
    assert same == ["prepare_data", "wind_tunnel"], "the law is fitted for the tokens of the stages"


def test_plan_says_why(call: Call) -> None:
    nodes = {node["step"]: node for node in call("plan", "--json").json["nodes"]}
    assert nodes["prepare_data"]["reason"] == "no artifact yet"
    assert nodes["pretrain_mid"]["reason"].startswith("needs prepare_data, fit_scaling_laws, pretrain_short")
    assert {node["state"] for node in nodes.values()} == {"run"}


def test_compile_writes_whole_file_or_none(call: Call, tmp_path: Path) -> None:
    target = tmp_path / "nowhere" / "lifecycle.yaml"
    done = call("compile", "lifecycle", "-o", str(target))
    assert done.code == 2
    assert "cannot be written" in done.err
    assert not list(tmp_path.glob("nowhere*"))


def test_help_names_every_preset(call: Call) -> None:
    from ling_flow.model.family import FAMILY

    page = " ".join(call("plan", "--help").out.split())
    assert f"for plan also {', '.join(FAMILY)}." in page


def test_doctor_finds_what_it_needs(call: Call) -> None:
    done = call("doctor", "--json")
    checks = {check["name"]: check for check in done.json["checks"]}
    assert done.code == 0, done.err
    assert checks["packages"]["status"] == "ok"
    assert "ray 2." in checks["packages"]["found"]


def test_what_is_missing_is_installed_from_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    from ling_flow.flow import doctor

    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    assert doctor._packages().advice == "pip install -c constraints.txt -e '.[cpu]' in a checkout, or make setup"


def test_doctor_knows_what_mlflow_takes_no_more() -> None:
    from ling_flow.flow import doctor

    assert doctor._tracking("sqlite:////nowhere/mlflow.db").status == "ok"
    found = doctor._tracking("file:///nowhere/mlruns")
    assert found.status == "failed" and "MLflow keeps no runs there" in found.found


def test_doctor_fails_where_the_home_cannot_be_written(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = call("--home", str(tmp_path / "file" / "home"), "doctor", "--json")
    assert done.code == 3
    assert {check["name"] for check in done.json["checks"] if check["status"] == "failed"} == {"home"}


def test_convert_writes_fp8_and_refuses_a_full_directory(call: Call, tmp_path: Path) -> None:
    from ling_flow.model.hf import load_pretrained, save_pretrained
    from ling_flow.model.presets import tiny
    from ling_flow.model.transformer import BailingMoeV2ForCausalLM

    model = BailingMoeV2ForCausalLM(tiny())
    model.init_weights(0)
    plain, fp8 = tmp_path / "plain", tmp_path / "fp8"
    save_pretrained(model, plain)
    assert call("convert", str(plain), str(fp8), "--fp8").code == 0
    assert json.loads((fp8 / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    load_pretrained(fp8)
    again = call("convert", str(plain), str(fp8))
    assert (again.code, again.err.strip()) == (2, f"error: {fp8}: is not an empty directory; give a new one")
    file = tmp_path / "file"
    file.write_text("")
    assert (
        call("convert", str(plain), str(file)).err.strip()
        == f"error: {file}: is not an empty directory; give a new one"
    )
    below = call("convert", str(plain), str(file / "below"))
    assert (below.code, below.err.strip()) == (3, f"error: {file / 'below'}: Not a directory")
    gone = call("convert", str(tmp_path / "gone"), str(tmp_path / "new"))
    assert (gone.code, (tmp_path / "new").exists()) == (2, False)
    assert "gone" in gone.err


def test_what_looks_like_a_date_is_a_text(call: Call, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("register: {model_name: 2026-11-27}\n")
    for options in (("--set", "register.model_name=2026-11-27"), ("--config", str(config))):
        planned = call("plan", "--json", *options)
        assert planned.code == 0, planned.err
    refused = call("plan", "--set", "register.model_name=2026-13-45:")
    assert refused.code == 2 and "Traceback" not in refused.err


def test_numbers_that_are_none_are_refused_before_anything_runs(call: Call, tmp_path: Path) -> None:
    given = "pretrain_short.failures_per_day=.inf"
    refused = call("plan", "--set", given)
    assert (refused.code, refused.err.strip()) == (2, f"error: --set {given}: must be a finite number")
    given = "wind_tunnel.design.learning_rates=[1e-3, .nan]"
    refused = call("plan", "--set", given)
    assert (refused.code, refused.err.strip()) == (2, f"error: --set {given}: must be a finite number")
    config = tmp_path / "c.yaml"
    config.write_text("pretrain_short: {failures_per_day: .nan}\n")
    refused = call("plan", "--config", str(config))
    assert refused.err.strip() == f"error: {config}: holds inf or nan; all numbers must be finite"
    refused = call("--watts", "inf", "--config-json", "{}", module="components.pretrain")
    assert refused.code == 2
