"""Looking at a directory while another process works in it."""

from __future__ import annotations

import glob
from pathlib import Path


def found_below(root: Path, pattern: str) -> list[Path]:
    """As `root.rglob(pattern)`, which ends in FileNotFoundError where a directory is renamed as it looks; what begins
    with a dot, and so is not finished, is passed over."""
    return [Path(path) for path in glob.glob(f"{glob.escape(str(root))}/**/{pattern}", recursive=True)]
