"""Configs as data: what bears identity, what can be written down, and how files and overrides are read."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, RootModel

from ling_flow.config import StrictModel, canonical_json, context_field, identity_of, parse_overrides, plain, read_yaml
from ling_flow.errors import UserError


class Part(StrictModel):
    size: int = 1
    where: str = context_field("here", why="a path", description="Where it lies")


class Derived(Part):
    more: int = 2


class Sizes(RootModel[list[int]]):
    pass


class Whole(StrictModel):
    tags: set[str] = Field({"alpha", "beta", "gamma", "delta"})
    by_number: dict[int, Part] = Field({1: Part()})
    sizes: Sizes = Sizes([1, 2])
    parts: frozenset[Part] = frozenset({Part(size=2), Part(size=10)})
    part: Part = Part()
    free: Any = None


def test_identity_of_all_kinds_of_fields() -> None:
    assert identity_of(Whole()) == {
        "tags": ["alpha", "beta", "delta", "gamma"],
        "by_number": {"1": {"size": 1}},
        "sizes": [1, 2],
        "parts": [{"size": 10}, {"size": 2}],
        "part": {"size": 1},
        "free": None,
    }
    moved = Whole(parts=frozenset({Part(size=2, where="x"), Part(size=10)}), by_number={1: Part(where="x")})
    assert identity_of(moved) == identity_of(Whole())
    assert plain(moved)["by_number"] == {"1": {"size": 1, "where": "x"}}
    assert Whole.model_validate_json(canonical_json(plain(moved))) == moved


def test_a_set_is_the_same_in_every_process() -> None:
    program = "from tests.test_config import *; print(canonical_json(plain(Whole())))"
    texts = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Whole(part=Derived()), "^part: is a Derived, which the field's type does not name$"),
        (Whole(free=[Derived()]), r"^free\.0: is a Derived"),
        (Whole(free={1: 2, "1": 3}), "^free: has keys that are different but written alike$"),
        (Whole(free=object()), "^cannot be written as JSON"),
    ],
)
def test_what_cannot_be_written_down_is_refused(config: Whole, message: str) -> None:
    with pytest.raises(UserError, match=message):
        identity_of(config)


def test_what_is_no_number_has_no_identity_wherever_it_is() -> None:
    with pytest.raises(ValueError, match=r"free\.a is nan"):
        identity_of(Whole(free={"a": float("nan")}))


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return read_yaml(path)


def test_keys_are_what_was_written(tmp_path: Path) -> None:
    lines = ["1: {007: a, on: b, 2024-01-01: c}", "base: &base {x: 1, y: 2}"]
    lines += ["over: &over {<<: *base, x: 3}", "last: {<<: *over}"]
    assert read(tmp_path, "\n".join(lines)) == {
        "1": {"007": "a", "on": "b", "2024-01-01": "c"},
        "base": {"x": 1, "y": 2},
        "over": {"x": 3, "y": 2},
        "last": {"x": 3, "y": 2},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"c\.yaml: line 3: 'a' is given twice$"),
        ("a:\n  b: 1\n  b: 1\n", r"c\.yaml: line 3: 'b' is given twice$"),
        ("? [a, b]\n: 1\n", r"c\.yaml: line 1: a key must be a name, not a sequence$"),
        ("a: !!binary aGk=\n", r"c\.yaml: not valid YAML \(could not determine a constructor for the tag .*binary"),
        ("a: !!set {x, y}\n", r"c\.yaml: not valid YAML .*set"),
        ("a: &x {b: *x}\n", r"c\.yaml: not valid YAML \(found unconstructable recursive node"),
    ],
)
def test_files_that_json_could_not_hold_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_overrides_are_json_data() -> None:
    assert parse_overrides(["evaluate={1: 2, b: 3}", "x.y=!!binary aGk=", "x.n=1e-3", "x.d=2024-01-01"]) == {
        "evaluate": {"1": 2, "b": 3},
        "x": {"y": "!!binary aGk=", "n": 1e-3, "d": "2024-01-01"},
    }
    with pytest.raises(UserError, match=r"^--set a=\{b: 1, b: 2\}: 'b' is given twice$"):
        parse_overrides(["a={b: 1, b: 2}"])
