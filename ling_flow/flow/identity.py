"""What makes two steps the same step, and which code made an artifact.

The fingerprint hashes the component's name and version, the identity-bearing part of its config and its inputs'
fingerprints. Paths, devices, tracking addresses and the code version never enter it; the code version is recorded
beside the artifact instead.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from ling_flow import __version__
from ling_flow.config import canonical_json, identity_of, plain
from ling_flow.errors import UserError

FINGERPRINT_LENGTH = 16  # hexadecimal digits


def fingerprint(component: str, version: int, config: BaseModel, inputs: Mapping[str, str]) -> str:
    """SHA-256 over the canonical JSON of a step's identity, shortened to 16 hexadecimal digits.

    Args:
        inputs: input name → `"<fingerprint>/<output>"` of the artifact given; optional inputs not given are left out.

    Raises:
        UserError: the config holds an infinity or NaN, or what cannot be written down.
    """
    try:
        canonical_json(plain(config))  # what bears no identity is written down, too
        identity = {"component": component, "version": version, "config": identity_of(config), "inputs": dict(inputs)}
        text = canonical_json(identity)
    except UserError as error:
        raise UserError(f"{component}.{error}") from None
    except ValueError:
        raise UserError(f"{component}: the config holds inf or nan; all its numbers must be finite") from None
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_LENGTH]


@functools.cache
def code_version() -> str:
    """Package version, with git commit and `-dirty` when run from a checkout: `0.1.0+3f2c9ab41d00-dirty`.

    In an image there is no checkout: LING_FLOW_CODE_VERSION says what it was built from.
    """
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return os.environ.get("LING_FLOW_CODE_VERSION") or __version__
    commit = _git(source, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return __version__
    dirty = "-dirty" if _git(source, "status", "--porcelain", "--untracked-files=no") else ""
    return f"{__version__}+{commit}{dirty}"


def _git(directory: Path, *arguments: str) -> str:
    """Output of a git command, or "" where git is missing, slow or fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
