"""How a local run starts the process of a step: only KFP's own words change, and no output can end the run."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from ling_flow.flow.processes import command_of, kfp_starts_steps_whole

INPUT = json.dumps({"config": '{"name": "python3 docs"}', "outputFile": "/home/python3/home/out"})
PRINT_ARGUMENTS = "import json, sys; print(json.dumps(sys.argv[1:]))"


def command(code: str = "x = 'python3'") -> list[str]:
    """As KFP makes it for a lightweight component, with the script cut short."""
    script = 'true "$program_path/ephemeral_component.py"; python3 -c "$0" "$@"'
    return ["sh", "-ec", script, code, "--executor_input", INPUT]


def test_only_the_words_of_kfp_name_the_interpreter() -> None:
    assert command_of(command(), "/opt/python") == [
        "sh", "-ec", command()[2].replace("python3", "/opt/python"), "x = 'python3'", "--executor_input", INPUT,
    ]  # fmt: skip


def run(tmp_path: Path, *full_command: str) -> tuple[int, bytes]:
    """Exit code and output of a step's process, as `kfp.local` runs it."""
    from kfp.local import SubprocessRunner
    from kfp.local.subprocess_task_handler import SubprocessTaskHandler

    class Started(SubprocessTaskHandler):  # type: ignore[misc]
        def validate_not_container_component(self, full_command: Any) -> None:
            """Ours is no component of KFP."""

    path = tmp_path / "log.txt"
    with path.open("w") as log, kfp_starts_steps_whole(log):
        status = Started("python", list(full_command), str(tmp_path), SubprocessRunner(use_venv=False)).run()
    return status.value, path.read_bytes()


def test_an_interpreter_whose_path_has_a_blank_and_python3_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / "my python3 it's" / "python"
    interpreter.parent.mkdir()
    interpreter.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    _, out = run(tmp_path, *command(PRINT_ARGUMENTS))
    assert json.loads(out) == ["--executor_input", INPUT]


def test_bytes_that_are_no_text_stay_in_the_log(tmp_path: Path) -> None:
    assert run(tmp_path, *command("import os; os.write(1, b'\\xff\\xfe\\n')"))[1] == b"\xff\xfe\n"


def test_a_child_left_behind_is_not_waited_for(tmp_path: Path) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '100']).pid)"
    _, out = run(tmp_path, *command(code))
    os.kill(int(out), 15)  # it is there still


def test_kfp_is_itself_again_afterwards() -> None:
    from kfp.local import subprocess_task_handler as handler

    before = handler.replace_python_executable, handler.run_local_subprocess
    with kfp_starts_steps_whole(io.StringIO()):
        assert handler.replace_python_executable is command_of
    assert (handler.replace_python_executable, handler.run_local_subprocess) == before
