"""The command line of a component: help, overrides, outcomes, and every kind of bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy.average import average
from toy.draw import draw

pytestmark = pytest.mark.usefixtures("home")


def run(component, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a component's command line."""
    with pytest.raises(SystemExit) as leave:
        component.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(leave.value.code or 0), out, err


def test_help_shows_every_field(capsys) -> None:
    code, out, _ = run(draw, capsys, "--help")
    page = " ".join(out.split())
    assert code == 0 and "Draw random numbers. One file per number, so that a killed run can go on." in page
    for text in (
        "--count int How many numbers [>= 1, <= 1000000000000000000; default: 10]",
        "--ratio float|null Share kept, 0 to 1; null keeps all [default: null]",
        '--tags YAML Free tags [list[str]; default: ["a"]]',
        "--noise.scale float Standard deviation, in units of the numbers [> 0; default: 2.0]",
        '--noise.shape normal|uniform Distribution [default: "normal"]',
        "(not part of the fingerprint: a test device)",
        "[default: LING_FLOW_ARTIFACTS, else artifacts in LING_FLOW_HOME (.lingflow)]",
    ):
        assert text in page
    page = " ".join(run(average, capsys, "--help")[1].split())
    assert "--power int Power mean's exponent [required]" in page
    assert "--numbers REF Dataset artifact: ROOT/COMPONENT/FINGERPRINT/OUTPUT of an earlier step. [required]" in page
    assert "--previous REF Model artifact: ROOT/COMPONENT/FINGERPRINT/OUTPUT of an earlier step. [optional]" in page


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path, capsys) -> None:
    file = tmp_path / "draw.yaml"
    file.write_text("count: 4\nname: from_file\nnoise: {shape: uniform}\n")
    flags = ("--name", "007", "--tags", "[x, y]", "--ratio", "1e-3", "--noise.scale", "1e-1", "--json")
    code, out, _ = run(draw, capsys, "--config", file, *flags)
    outcome = json.loads(out.splitlines()[-1])
    manifest = json.loads((Path(outcome["outputs"]["numbers"]).parent / "manifest.json").read_text())
    assert code == 0 and manifest["config"] == {
        "count": 4,
        "name": "007",
        "ratio": 0.001,
        "tags": ["x", "y"],
        "noise": {"scale": 0.1, "shape": "uniform"},
        "stop_at": -1,
        "pause": 0.0,
    }


def test_a_nested_flag_keeps_the_other_defaults_of_its_field(capsys) -> None:
    _, out, _ = run(draw, capsys, "--count", "2", "--noise.shape", "uniform", "--json")
    assert json.loads(out.splitlines()[-1])["result"]["noise"] == {"scale": 2.0, "shape": "uniform"}


def test_outcome_as_json_and_as_table(tmp_path: Path, capsys) -> None:
    code, out, _ = run(draw, capsys, "--count", "3", "--root", tmp_path / "root", "--json")
    outcome = json.loads(out.splitlines()[-1])
    assert code == 0 and list(outcome) == [
        "component",
        "label",
        "fingerprint",
        "cached",
        "seconds",
        "result",
        "outputs",
    ]
    assert outcome["outputs"]["numbers"] == f"{tmp_path}/root/draw/{outcome['fingerprint']}/numbers"
    numbers = outcome["outputs"]["numbers"]
    code, out, _ = run(average, capsys, "--power", "2", "--numbers", numbers, "--root", tmp_path / "root")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0 and rows["had_previous"] == "false" and float(rows["average"]) > 0 and "/average/" in rows["model"]


def test_rebuild_redoes_the_step(calls: Path, capsys) -> None:
    for flags in ((), (), ("--rebuild",)):
        assert run(draw, capsys, "--count", "2", *flags)[0] == 0
    assert calls.read_text() == "draw\n" * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cuont", "3"], "error: unknown option --cuont; did you mean --count?"),
        (["--noise.scael", "3"], "error: unknown option --noise.scael; did you mean --noise.scale?"),
        (["--zzz", "3"], "error: unknown option --zzz; see --help"),
        (["stray"], "error: got unexpected extra argument (stray)"),
        (["--count"], "error: option '--count' requires an argument."),
        (["--count", "many"], "error: draw.count: input should be a valid integer"),
        (["--count", "0"], "error: draw.count: input should be greater than or equal to 1 (got 0)"),
        (["--noise.shape", "round"], "error: draw.noise.shape: input should be 'normal' or 'uniform' (got 'round')"),
        (["--tags", "[a"], "error: draw.tags: input should be a valid list"),
        (["--config", "nowhere.yaml"], "error: nowhere.yaml: no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(home: Path, capsys, flags: list[str], message: str) -> None:
    code, out, err = run(draw, capsys, *flags)
    assert (code, out) == (2, "") and err.startswith(message) and len(err.splitlines()) == 1
    assert not home.exists()


@pytest.mark.parametrize(
    ("fail", "code", "message"),
    [
        ("user", 2, "error: power: give a smaller one"),
        ("system", 3, "error: the server is away"),
        ("defect", 1, "error: "),
    ],
)
def test_exit_code_follows_the_kind_of_error(capsys, monkeypatch, tmp_path, fail: str, code: int, message: str) -> None:
    numbers = draw({"count": 2}).outputs["numbers"]
    events = tmp_path / "events"
    monkeypatch.setenv("LING_FLOW_EVENTS", str(events))
    capsys.readouterr()
    got, out, err = run(average, capsys, "--power", "2", "--numbers", numbers, "--fail", fail)
    assert (got, out) == (code, "") and err.splitlines()[-1].startswith(message)
    assert ("Traceback" in err) == (fail == "defect") and (fail == "defect" or len(err.splitlines()) == 1)
    event = json.loads(events.read_text().splitlines()[-1])
    assert (event["event"], event["kind"], event["step"]) == ("error", fail, "average")
    assert ("traceback" in event) == (fail == "defect")


def test_a_body_that_leaves_is_no_success(capsys) -> None:
    numbers = draw({"count": 2}).outputs["numbers"]
    code, out, err = run(average, capsys, "--power", "2", "--numbers", numbers, "--fail", "leave")
    assert (code, out) == (1, "") and "average called sys.exit(0)" in err.splitlines()[-1]


def test_bad_config_is_refused_without_importing_anything_heavy() -> None:
    program = (
        "import sys, atexit\n"
        "from toy.draw import draw\n"
        "atexit.register(lambda: print([m for m in ('torch', 'ray', 'mlflow', 'kfp', 'numpy') if m in sys.modules]))\n"
        "draw.main(['--count', 'many'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (2, "[]")
