"""Errors have a kind, and the kind decides what happens: who is told what, the exit code, whether a retry makes sense.

Anything that is neither a `UserError` nor a `SystemFault` is a defect of ours and keeps its traceback (exit code 1).
"""

from ling_flow.redact import redact


class LingFlowError(Exception):
    """Base of the errors that are reported in one line instead of a traceback. Its text shows no secret."""

    exit_code = 1

    def __str__(self) -> str:
        return redact(super().__str__())


class UserError(LingFlowError):
    """What the user gave is wrong. One line that names field or file and says what would be right; never retried."""

    exit_code = 2


class SystemFault(LingFlowError):
    """The world failed (a server is away, a disk is full, a worker died). A retry may succeed."""

    exit_code = 3


class RemoteDefect(LingFlowError):
    """A defect of ours in a process elsewhere; `traceback` is the one it printed."""

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback
