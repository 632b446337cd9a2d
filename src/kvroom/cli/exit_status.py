"""Exit statuses of the commands."""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar

from kvroom.errors import ConfigurationError, InvalidRequest, KVRoomError


class ExitStatus(IntEnum):
    """The status with which a command ends. `meaning` is its row in docs/command-line.md."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> ExitStatus:
        """Create a member from its status and its meaning."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    DONE = 0, "the command did what it was asked to do"
    FAILED = (
        1,
        "a check failed: a wrong token in the demo, a room that is not open, a machine without a usable transport",
    )
    USAGE = 2, "an argument, a variable or a file is invalid, or a package is missing: one line names it and the remedy"
    NO_ANSWER = 3, "a worker or a router did not answer, or refused to"
    CHILD_ENDED = 4, "a process that the command had started ended too early, or was not ready in time"
    OUTPUT = 5, "the output could not be written, for example because the disk is full"
    INTERRUPTED = 130, "interrupted (Ctrl-C) before the command was done"
    BROKEN_PIPE = 141, "the program that read the output ended first, as `head` does"


class CommandError(KVRoomError):
    """An error that ends a command with a status of its own. The text is for the operator."""

    status: ClassVar[ExitStatus] = ExitStatus.FAILED


def status_for(error: KVRoomError) -> ExitStatus:
    """Return the status with which a command ends after `error`."""
    if isinstance(error, CommandError):
        return error.status
    return ExitStatus.USAGE if isinstance(error, ConfigurationError | InvalidRequest) else ExitStatus.FAILED
