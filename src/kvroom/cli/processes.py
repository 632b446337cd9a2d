"""Child processes that end together: with the block that started them, or with the first of them that ends.

Each child leads its own process session, so that Ctrl-C reaches only the parent, which then stops the children in
order. Each child also gets its parent's pid (`--parent-pid`), so that the kernel ends it if the parent is killed
(Linux only: PR_SET_PDEATHSIG in prctl(2)). A child prints one line, `READY role key=value ...`, when it serves.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from kvroom.errors import ConfigurationError

from .exit_status import CommandError, ExitStatus
from .last_words import LastWords

GRACE_S = 10.0
_NOTICE_S = 1.0
"""Seconds for which a failed `Children.guard` waits for the end of a child, which may be the cause of the failure."""
_LINE_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1
_READY = "READY"

T = TypeVar("T")
Output = Callable[[str, str], None]
"""Called with a child's name and a line that the child wrote."""


class Ready(NamedTuple):
    """The content of a ready line."""

    role: str
    """`prefill`, `decode` or `up`."""
    facts: Mapping[str, str]
    """The `url` and the `model`'s name; a worker adds `admin_url`, and a prefill worker `bootstrap_port`."""

    def line(self) -> str:
        """Return the line to print. Values with spaces are quoted as in a shell."""
        return shlex.join([_READY, self.role, *(f"{key}={value}" for key, value in self.facts.items())])


def parse_ready(line: str) -> Ready | None:
    """Parse a ready line; return None for any other line."""
    if not line.startswith(f"{_READY} "):
        return None
    try:
        words = shlex.split(line)
    except ValueError:  # an unclosed quote
        return None
    if len(words) < 2 or not all("=" in word for word in words[2:]):
        return None
    pairs = (word.partition("=") for word in words[2:])
    return Ready(words[1], {key: value for key, _, value in pairs})


class ChildEnded(CommandError):
    """A child ended too early, or was not ready in time. The text holds its name, its status and its last words."""

    status = ExitStatus.CHILD_ENDED


class ChildMisused(ChildEnded):
    """A child ended with status 2 before it was ready: an argument that the user gave is invalid."""

    status = ExitStatus.USAGE


class Child:
    """One child process. `ready` holds its ready line once printed; `ended` is done when the process is reaped.

    Its whole output goes to `log`, if there is one, and every line but the ready line to `output` as well. `is_killed`
    is True once `kill` was called: `Children.guard` does not report the end of such a child.
    """

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, output: Output, *, log: BinaryIO | None = None
    ) -> None:
        self.name = name
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.log_file = None if log is None else str(log.name)
        self.is_killed = False
        self._process = process
        self._output = output
        self._log = log
        self._last_words = LastWords()

        async def ended() -> None:
            await asyncio.gather(self._read(process.stdout), self._read(process.stderr, is_stderr=True))
            await process.wait()
            self._close_log()

        self.ended = asyncio.ensure_future(ended())

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the child has ended.

        Not with `Popen.send_signal`, which asyncio would call: that reaps a child that has just died, and asyncio then
        reports the status 255 in place of the signal that killed it.
        """
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def end_error(self) -> ChildEnded:
        """Return the error that explains the end of this child, which has ended."""
        status = self._process.returncode or 0
        kind = ChildMisused if status == ExitStatus.USAGE and not self.ready.done() else ChildEnded
        return kind(self._last_words.describe(self.name, status, self.log_file))

    async def kill(self) -> None:
        """End the child with SIGKILL, as a crash would, and wait until it is reaped."""
        self.is_killed = True
        self.signal(signal.SIGKILL)
        await asyncio.wait([self.ended])

    async def _read(self, stream: asyncio.StreamReader | None, *, is_stderr: bool = False) -> None:
        while stream is not None:
            try:
                raw = await stream.readline()
            except ValueError:  # longer than _LINE_BYTES; the stream has dropped the line
                raw = b"(a line too long to show)\n"
            if not raw:
                return
            self._write_log(raw)
            line = raw.decode(errors="replace").rstrip()
            ready = parse_ready(line)
            if ready is not None and not self.ready.done():
                self.ready.set_result(ready)
            elif line:
                self._last_words.add(line, is_stderr=is_stderr)
                self._output(self.name, line)

    def _write_log(self, raw: bytes) -> None:
        """Append one line to the log file. A full disk ends the log and not the child."""
        if self._log is None:
            return
        try:
            self._log.write(raw if raw.endswith(b"\n") else raw + b"\n")
        except OSError as error:
            self._output(self.name, f"the log {self.log_file} ends here: {error.strerror}")
            self._close_log()

    def _close_log(self) -> None:
        if self._log is not None:
            with suppress(OSError):  # a network file system reports a full disk at the end
                self._log.close()
            self._log = None


class Children:
    """The children of one `async with` block, which ends and reaps all of them when it is left.

    Args:
        output: gets the lines of every child.
        log_dir: a directory that exists, in which each child's output is appended to `NAME.log`; None for no files.
    """

    def __init__(self, output: Output, log_dir: Path | None = None) -> None:
        self._output = output
        self._log_dir = log_dir
        self._children: list[Child] = []

    async def __aenter__(self) -> Children:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Send SIGTERM to all, SIGKILL after `GRACE_S` to those that still run, and reap every one."""
        endings = [child.ended for child in self._children]
        if endings:
            self.signal(signal.SIGTERM)
            try:
                await asyncio.wait(endings, timeout=GRACE_S)
            finally:  # also when a second Ctrl-C cancels the wait
                self.signal(signal.SIGKILL)
                await asyncio.wait(endings)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every child that still runs."""
        for child in self._children:
            child.signal(number)

    async def start(self, name: str, argv: Sequence[str], environ: Mapping[str, str]) -> Child:
        """Start `kvroom ARGV` with exactly the environment `environ`.

        Raises `ConfigurationError` if its log file cannot be written; no process was started then.
        """
        log = None if self._log_dir is None else open_log(self._log_dir / f"{name}.log")
        arguments = ["-m", "kvroom", *argv, "--parent-pid", str(os.getpid())]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments,
            env=dict(environ), start_new_session=True, limit=_LINE_BYTES,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        child = Child(name, process, self._output, log=log)
        self._children.append(child)
        return child

    async def guard(self, work: Awaitable[T]) -> T:
        """Await `work` and return its result. If a child ends first that was not killed, raise `ChildEnded`.

        `work` is cancelled before that. It may not start or kill children itself.
        """
        task = asyncio.ensure_future(work)
        watched = [child for child in self._children if not child.is_killed]
        endings = [child.ended for child in watched]
        try:
            await asyncio.wait([task, *endings], return_when=asyncio.FIRST_COMPLETED)
            if endings and task.done() and not task.cancelled() and task.exception() is not None:
                # The connections of a dead child are lost before its end is noticed here: wait for the real cause.
                await asyncio.wait(endings, timeout=_NOTICE_S, return_when=asyncio.FIRST_COMPLETED)
            gone = [child for child in watched if child.ended.done()]
            if gone and not (task.done() and task.exception() is None):
                errors = [child.end_error() for child in gone]
                raise type(errors[0])("\n".join(map(str, errors)))
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def open_log(path: Path) -> BinaryIO:
    """Open a log file for appending, without a buffer. Raises `ConfigurationError` if it cannot be written."""
    try:
        return path.open("ab", buffering=0)
    except OSError as error:
        raise ConfigurationError(
            f"--log-dir {path.parent}: cannot write {path.name}: {error.strerror}; give a directory that you can write"
        ) from None


def die_with_parent(parent_pid: int | None, ending: signal.Signals) -> None:
    """Have the kernel send the signal `ending` to this process when its parent ends.

    With None, for a process that an operator started by hand, nothing is set. The setting survives `execve`. Raises
    `ConfigurationError` if the parent has already ended or the kernel refuses.
    """
    if parent_pid is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(ending), 0, 0, 0) != 0:
        raise ConfigurationError(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}; start without a parent")
    # The parent may have ended before prctl: then the signal never comes.
    if os.getppid() != parent_pid:
        raise ConfigurationError(f"the parent process {parent_pid} has ended: start the command again")
