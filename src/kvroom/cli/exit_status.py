"""Exit statuses of the commands."""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar

from kvroom.errors import ConfigurationError, InvalidRequest, KVRoomError


class ExitStatus(IntEnum):
    """The status with which a command ends. The docstring of each member is its row in docs/command-line.md."""

    DONE = 0
    """The command did what it was asked to do."""
    FAILED = 1
    """The command ran, and a check that it made failed: a wrong token, a room that is not open, no usable transport."""
    USAGE = 2
    """An argument, a variable or a file that the user gave is invalid, or a package is not installed."""
    NO_ANSWER = 3
    """A worker or a router did not answer, or refused to answer."""
    CHILD_ENDED = 4
    """A process that the command had started ended too early, or was not ready in time."""
    OUTPUT = 5
    """The output could not be written, for example because the disk is full."""
    INTERRUPTED = 130
    """Ctrl-C ended the command before it was done."""
    BROKEN_PIPE = 141
    """The program that read the output ended first, as `head` does."""


class CommandError(KVRoomError):
    """An error that ends a command with a status of its own. The text is for the operator."""

    status: ClassVar[ExitStatus] = ExitStatus.FAILED


def status_for(error: KVRoomError) -> ExitStatus:
    """Return the status with which a command ends after `error`."""
    if isinstance(error, CommandError):
        return error.status
    return ExitStatus.USAGE if isinstance(error, ConfigurationError | InvalidRequest) else ExitStatus.FAILED
