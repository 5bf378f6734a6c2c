"""Fingerprints and code versions."""

import hashlib
import subprocess
from pathlib import Path

import pytest
from toy.draw import DrawConfig, Noise

from ling_flow import __version__
from ling_flow.errors import UserError
from ling_flow.flow import identity
from ling_flow.flow.identity import code_version, fingerprint

INPUTS = {"corpus": "00112233aabbccdd/corpus", "law": "ffeeddccbbaa9988/scaling_law"}


def test_fingerprint_is_fixed_for_ever() -> None:
    """A change here orphans every artifact anyone has made."""
    text = (
        '{"component":"draw","config":{"count":10,"name":"series","noise":{"scale":2.0,"shape":"normal"},"ratio":null,'
        '"tags":["a"]},"inputs":{"corpus":"00112233aabbccdd/corpus","law":"ffeeddccbbaa9988/scaling_law"},"version":3}'
    )
    assert fingerprint("draw", 3, DrawConfig(), INPUTS) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_what_bears_identity() -> None:
    base = fingerprint("draw", 3, DrawConfig(), INPUTS)
    assert fingerprint("draw", 3, DrawConfig(stop_at=5, pause=0.1), dict(reversed(INPUTS.items()))) == base
    others = [
        fingerprint("drawn", 3, DrawConfig(), INPUTS),
        fingerprint("draw", 4, DrawConfig(), INPUTS),
        fingerprint("draw", 3, DrawConfig(count=11), INPUTS),
        fingerprint("draw", 3, DrawConfig(noise=Noise(scale=2.5)), INPUTS),
        fingerprint("draw", 3, DrawConfig(), {**INPUTS, "law": "ffeeddccbbaa9988/other"}),
        fingerprint("draw", 3, DrawConfig(), {"corpus": INPUTS["corpus"]}),
    ]
    assert len({base, *others}) == 7


def test_infinities_have_no_identity() -> None:
    with pytest.raises(UserError, match="draw: the config holds inf or nan"):
        fingerprint("draw", 3, DrawConfig(ratio=float("inf")), INPUTS)


def test_code_version_names_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identify = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identify, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def version() -> str:
        code_version.cache_clear()
        return code_version()

    source = tmp_path / "ling_flow" / "flow" / "identity.py"
    source.parent.mkdir(parents=True)
    source.write_text("one")
    monkeypatch.setattr(identity, "__file__", str(source))
    try:
        assert version() == __version__
        git("init", "-q")
        assert version() == __version__  # no commit yet
        git("add", ".")
        git("commit", "-qm", "first")
        assert version() == f"{__version__}+{git('rev-parse', '--short=12', 'HEAD')}"
        source.write_text("two")
        assert version().endswith("-dirty")
    finally:
        code_version.cache_clear()
