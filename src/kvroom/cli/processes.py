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
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from kvroom.errors import ConfigurationError

from .exit_status import CommandError, ExitStatus

GRACE_S = 10.0
_KEPT_LINES = 12
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
    """A child ended too early. The text holds its name and its error message, or its status and its last lines."""

    status = ExitStatus.CHILD_ENDED


class Child:
    """One child process. `ready` holds its ready line once printed; `ended` is done when the process is reaped.

    `is_killed` is True once `kill` was called: `Children.guard` does not report the end of such a child.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, output: Output) -> None:
        self.name = name
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.is_killed = False
        self._process = process
        self._output = output
        self._last: deque[str] = deque(maxlen=_KEPT_LINES)

        async def ended() -> None:
            await asyncio.gather(self._read(process.stdout), self._read(process.stderr))
            await process.wait()

        self.ended = asyncio.ensure_future(ended())

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the child has ended."""
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def kill(self) -> None:
        """End the child with SIGKILL, as a crash would, and wait until it is reaped."""
        self.is_killed = True
        self.signal(signal.SIGKILL)
        await asyncio.wait([self.ended])

    def describe_end(self) -> str:
        """Return the reason why the child ended, for an error message.

        That is the error line with which a command of kvroom ends, or else the exit status and the last output.
        """
        errors = [line.partition(": error: ")[2] for line in self._last if ": error: " in line]
        if errors:
            return f"{self.name}: {errors[-1]}"
        return "\n".join([f"{self.name} ended with status {self._process.returncode}", *self._last])

    async def _read(self, stream: asyncio.StreamReader | None) -> None:
        while stream is not None:
            try:
                raw = await stream.readline()
            except ValueError:  # longer than _LINE_BYTES; the stream has dropped the line
                raw = b"(a line too long to show)\n"
            if not raw:
                return
            line = raw.decode(errors="replace").rstrip()
            ready = parse_ready(line)
            if ready is not None and not self.ready.done():
                self.ready.set_result(ready)
            elif line:
                self._last.append(line)
                self._output(self.name, line)


class Children:
    """The children of one `async with` block, which ends and reaps all of them when it is left."""

    def __init__(self, output: Output) -> None:
        self._output = output
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
        """Start `kvroom ARGV` with exactly the environment `environ`."""
        arguments = ["-m", "kvroom", *argv, "--parent-pid", str(os.getpid())]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments,
            env=dict(environ), start_new_session=True, limit=_LINE_BYTES,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        child = Child(name, process, self._output)
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
            gone = [child for child in watched if child.ended.done()]
            if gone and not (task.done() and task.exception() is None):
                raise ChildEnded(gone[0].describe_end())
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


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
