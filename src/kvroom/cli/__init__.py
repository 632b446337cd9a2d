"""The command line: `kvroom COMMAND`.

Every error ends as one line on stderr; the exit status tells its kind (see `kvroom.cli.exit_status`). Only the commands
that run a model import torch.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from kvroom.errors import KVRoomError

from .exit_status import ExitStatus, status_for
from .parser import parse

_OUTPUT_ERRORS = frozenset({errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""Errors of a write. Those of a file that was opened by name carry its name; those of stdout carry none."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, an `ExitStatus`."""
    command, options = parse(argv)
    name = f"kvroom {command.name}"
    try:
        status = command(options)
        _flush()
    except KVRoomError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return status_for(error)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return ExitStatus.INTERRUPTED
    except OSError as error:
        if error.errno not in _OUTPUT_ERRORS or error.filename is not None:
            raise
        _discard_output()
        if error.errno == errno.EPIPE:
            return ExitStatus.BROKEN_PIPE
        print(f"{name}: error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return ExitStatus.OUTPUT
    return status


def _flush() -> None:
    if sys.stdout is not None:  # None if the shell has closed it (`>&-`)
        sys.stdout.flush()


def _discard_output() -> None:
    """Send the rest of stdout nowhere: Python flushes it once more at its end, and would print a traceback."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
