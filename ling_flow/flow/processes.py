"""Steps of a local run in processes of this machine: what `kfp.local.SubprocessRunner` does wrong is done here."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

_SCRIPT = "ephemeral_component.py"  # in the shell script that starts a step; what follows it is the step's own


@contextlib.contextmanager
def kfp_starts_steps_whole(log: TextIO) -> Iterator[None]:
    """While it lasts, `kfp.local.SubprocessRunner` starts its processes by `command_of` and `_run`, output to `log`.

    KFP's own functions replace "python3" in configs and paths too, and leave the interpreter's path unquoted; they end
    the run at output that is not UTF-8, and wait for whoever holds the step's output open after it has ended.
    """
    from kfp.local import subprocess_task_handler as handler

    def run(full_command: Sequence[str], env_vars: Mapping[str, str] | None = None) -> int:
        return _run(full_command, env_vars, log)

    before = handler.replace_python_executable, handler.run_local_subprocess
    handler.replace_python_executable, handler.run_local_subprocess = command_of, run
    try:
        yield
    finally:
        handler.replace_python_executable, handler.run_local_subprocess = before


def command_of(full_command: Sequence[str], executable: str) -> list[str]:
    """A step's command with `executable` in the place of python3: in KFP's own words alone, up to its shell script."""
    script = next(index for index, part in enumerate(full_command) if _SCRIPT in part)
    return [
        part.replace("python3", shlex.quote(executable)) if index <= script else part
        for index, part in enumerate(full_command)
    ]


def _run(full_command: Sequence[str], env_vars: Mapping[str, str] | None, log: TextIO) -> int:
    """The exit code. The process writes to the log itself, any bytes it likes."""
    log.flush()
    environment = {**os.environ, **(env_vars or {})}
    with subprocess.Popen(full_command, stdout=log, stderr=subprocess.STDOUT, env=environment) as process:
        return process.wait()
