"""The end of a child's output, from which `kvroom up` explains why the child ended.

A message explains an end only if it stands at the end of the output: a child may log an error or a traceback, go on,
and die of something else. Therefore at most `_MAX_AFTER` lines may follow it; the interpreter and libraries print a few
lines while a process exits.
"""

from __future__ import annotations

import re
import signal
from collections import deque

_KEPT_LINES = 12
_MAX_AFTER = 3
_COMMAND_ERROR = re.compile(r"kvroom(?: \S+)?: error: (.+)")
_TRACEBACK = "Traceback (most recent call last):"
_OUT_OF_MEMORY = "the kernel's out-of-memory killer is a frequent cause; `dmesg` shows it"


class LastWords:
    """The end of a child's output: its last lines, and the last message that may say why it ended."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._message: list[str] = []
        self._after = 0
        self._in_traceback = False

    def add(self, line: str, *, is_stderr: bool) -> None:
        """Take a line that is not empty. Messages are looked for on stderr only, where kvroom and Python write them."""
        self._lines.append(line)
        if not is_stderr:
            return
        error = _COMMAND_ERROR.fullmatch(line)
        if line == _TRACEBACK:
            self._in_traceback = True
        elif error is not None:
            self._start(error[1])
        elif self._in_traceback and not line.startswith(" "):
            self._start(line)
        elif self._message and not self._in_traceback:
            self._after += 1
            if self._after <= _MAX_AFTER:  # an exception's text may have several lines
                self._message.append(line)

    def describe(self, name: str, returncode: int, log_file: str | None) -> str:
        """Return the reason why the child `name` ended, for an error message.

        Args:
            name: the child's name.
            returncode: its exit status, or the negative number of the signal that killed it.
            log_file: the file that has its whole output, or None without one.
        """
        where = f" (log: {log_file})" if log_file else ""
        if returncode > 0 and self._message and not self._in_traceback and self._after <= _MAX_AFTER:
            message = "; ".join(self._message)
            return f"{name} ended with status {returncode}: {message}{where}"
        lines = "".join(f"\n  {line}" for line in self._lines)
        last = f"; its last output:{lines}" if lines else "; it printed nothing"
        return f"{name} {_describe_status(returncode)}{where}{last}"

    def _start(self, message: str) -> None:
        self._message, self._after, self._in_traceback = [message], 0, False


def _describe_status(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:  # a real-time signal has a number but no name
        name = f"signal {-returncode}"
    hint = f": {_OUT_OF_MEMORY}" if -returncode == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
