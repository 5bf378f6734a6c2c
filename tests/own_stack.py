"""A stack of the tests' own: PostgreSQL, S3 and MLflow in a new directory, gone with everything in it afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ling_flow.errors import UserError
from ling_flow.flow.stack import Stack


@contextmanager
def own_stack() -> Iterator[Stack]:
    """Running; skips where a program is missing.

    Not below pytest's own directory: root's PostgreSQL runs as another user, who could not enter it.
    """
    home = Path(tempfile.mkdtemp(prefix="ling_flow-stack-", dir="/var/tmp"))
    home.chmod(0o755)
    made = Stack(home / "stack")
    try:
        made.up()
        yield made
    except UserError as error:
        if "not found on this machine" not in str(error):
            raise
        pytest.skip(str(error))
    finally:
        made.down()
        shutil.rmtree(home)
