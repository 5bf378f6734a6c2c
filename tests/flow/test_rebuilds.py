"""Inputs that change: rebuilt under a reader, or after it; and rebuilds that are tried again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import Field

from ling_flow.config import StrictModel
from ling_flow.errors import SystemFault
from ling_flow.flow.component import Dataset, Input, Output, Resources, component
from ling_flow.flow.step import Outcome, run_step

pytestmark = pytest.mark.usefixtures("home")

WORD = "old"  # what `make` writes, though it is no part of its config
MEANWHILE: list[Callable[[], object]] = []  # done by `read` between two files


class Nothing(StrictModel):
    pass


class Words(StrictModel):
    words: list[str] = Field([], description="What was read")


class Kept(StrictModel):
    files: int = Field(description="What an earlier try had left")


@component(version=1, resources=Resources())
def make(config: Nothing, data: Output[Dataset]) -> Words:
    """Write the word of the day."""
    for name in ("a", "b"):
        (data.path / name).write_text(WORD)
    return Words()


@component(version=1, resources=Resources())
def read(config: Nothing, data: Input[Dataset]) -> Words:
    """Read one file after another."""
    words = [(data.path / "a").read_text()]
    for other in MEANWHILE:
        other()
    words.append((data.path / "b").read_text())
    return Words(words=words)


@component(version=1, resources=Resources(), resumable=True)
def train(config: Nothing, model: Output[Dataset], data: Input[Dataset] | None = None) -> Kept:
    """Needs three tries."""
    kept = len(list(model.path.iterdir()))
    (model.path / str(kept)).write_text("x")
    if kept < 2:
        raise SystemFault("away")
    return Kept(files=kept)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(f"{__name__}.WORD", "old")
    return make({}).refs["data"]


@pytest.fixture
def rebuild(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Outcome]:
    """Make the data anew."""

    def run(word: str) -> Outcome:
        monkeypatch.setattr(f"{__name__}.WORD", word)
        return run_step(make, Nothing(), {}, rebuild=True)

    return run


def test_an_input_that_is_rebuilt_while_it_is_read(home: Path, data: str, monkeypatch, rebuild) -> None:
    monkeypatch.setattr(f"{__name__}.MEANWHILE", [lambda: rebuild("new")])
    with pytest.raises(SystemFault, match=r"^read: input data \(.*/data\) was rebuilt meanwhile; run again$"):
        read({}, data=data)
    assert list((home / "artifacts" / "read").iterdir()) == []
    assert read({}, data=data).result.words == ["new", "new"], "the next rebuild gives what is there"


def test_a_body_that_stumbles_over_a_rebuild(data: str, monkeypatch, rebuild) -> None:
    def swap() -> None:
        rebuild("new")
        raise FileNotFoundError("a file of before")

    monkeypatch.setattr(f"{__name__}.MEANWHILE", [swap])
    with pytest.raises(SystemFault, match=r"input data .* was rebuilt meanwhile; run again"):
        read({}, data=data)


def test_what_comes_from_other_content_is_not_served(data: str, rebuild, capsys) -> None:
    assert (read({}, data=data).cached, read({}, data=data).cached) == (False, True)
    rebuild("old")
    assert read({}, data=data).cached, "the same content"
    rebuild("new")
    capsys.readouterr()
    outcome = read({}, data=data)
    assert (outcome.cached, outcome.result.words) == (False, ["new", "new"])
    told = "read: was done before, but input data was rebuilt with other content: doing it again"
    assert capsys.readouterr().err.splitlines().count(told) == 1
    assert read({}, data=data).cached


def test_what_does_not_tell_what_it_was_made_of_is_not_served(home: Path, data: str, capsys) -> None:
    outcome = read({}, data=data)
    path = home / "artifacts" / "read" / outcome.fingerprint / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["inputs"]["data"]["digest"]
    path.write_text(json.dumps(manifest))
    assert not read({}, data=data).cached
    assert "was done before, but what its input data held was not recorded" in capsys.readouterr().err


def tries(data: str | None = None, rebuild: bool = False) -> int:
    """How many tries `train` takes."""
    for count in range(1, 9):
        try:
            run_step(train, Nothing(), {"data": data}, rebuild=rebuild)
        except SystemFault:
            continue
        return count
    raise AssertionError("begins anew at each try")


def test_a_rebuild_keeps_its_checkpoints_within_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tries() == 3
    monkeypatch.setenv("LING_FLOW_RUNNER_LOCK", "runs/1/runner.lock")
    with pytest.raises(SystemFault):
        run_step(train, Nothing(), {}, rebuild=True)
    monkeypatch.setenv("LING_FLOW_RUNNER_LOCK", "runs/2/runner.lock")
    assert tries(rebuild=True) == 3, "not those of another run"


def test_checkpoints_of_other_content_are_not_gone_on_from(data: str, rebuild) -> None:
    for _ in range(2):
        with pytest.raises(SystemFault, match="away"):
            train({}, data=data)
    rebuild("new")
    assert tries(data) == 3
    rebuild("old")
    with pytest.raises(SystemFault, match="away"):
        train({}, data=data)
    rebuild("old")
    assert tries(data) == 2, "the same content"
