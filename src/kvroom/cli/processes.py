"""Child processes that end together: with the block that started them, or with the first of them that ends.

Each is a session of its own, so that Ctrl-C reaches the parent alone, which then ends them in order; and each is told
its parent's pid (`--parent-pid`), so that it dies even if the parent is killed (Linux only: `prctl(2)`,
PR_SET_PDEATHSIG). A child that serves prints one line, `READY role key=value ...`, for people and for its parent.
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

from kvroom.errors import ConfigurationError, KVRoomError

GRACE_S = 10.0
_KEPT_LINES = 12
_LINE_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1
_READY = "READY"

T = TypeVar("T")
Output = Callable[[str, str], None]
"""Called with a child's name and a line that it wrote."""


class Ready(NamedTuple):
    """Who is ready, and where: `url`, for a prefill worker `bootstrap_port`, the `model`'s name."""

    role: str
    facts: Mapping[str, str]

    def line(self) -> str:
        """As it is printed; values that hold spaces are quoted."""
        return shlex.join([_READY, self.role, *(f"{key}={value}" for key, value in self.facts.items())])


def parse_ready(line: str) -> Ready | None:
    """The line read back, or None for any other line."""
    if not line.startswith(f"{_READY} "):
        return None
    try:
        words = shlex.split(line)
    except ValueError:  # a quote without its end
        return None
    if len(words) < 2 or not all("=" in word for word in words[2:]):
        return None
    pairs = (word.partition("=") for word in words[2:])
    return Ready(words[1], {key: value for key, _, value in pairs})


class ChildEnded(KVRoomError):
    """A child ended that should have stayed. The text holds its name, its status and its last words."""


class Child:
    """One running child: its ready line when it comes, and its last words."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, output: Output) -> None:
        self.name = name
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
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
        """Send a signal, unless the child is gone."""
        if self._process.returncode is None:
            self._process.send_signal(number)

    def last_words(self) -> str:
        """Why it ended: the error line that our commands end with, or else its status and what it wrote last."""
        errors = [line.partition(": error: ")[2] for line in self._last if ": error: " in line]
        if errors:
            return f"{self.name}: {errors[-1]}"
        return "\n".join([f"{self.name} ended with status {self._process.returncode}", *self._last])

    async def _read(self, stream: asyncio.StreamReader | None) -> None:
        while stream is not None:
            try:
                raw = await stream.readline()
            except ValueError:  # longer than the limit; the reader has dropped it
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
    """The children of one block; an async context manager that leaves none of them behind."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._children: list[Child] = []

    async def __aenter__(self) -> Children:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Ask all to end, kill those that have not after `GRACE_S`, and reap every one."""
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
        """Start `kvroom ARGV` in an environment."""
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
        """The result of `work`. If a child ends first, `work` is cancelled and `ChildEnded` raised."""
        task = asyncio.ensure_future(work)
        endings = [child.ended for child in self._children]
        try:
            await asyncio.wait([task, *endings], return_when=asyncio.FIRST_COMPLETED)
            gone = [child for child in self._children if child.ended.done()]
            if gone and not (task.done() and task.exception() is None):
                raise ChildEnded(gone[0].last_words())
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def die_with_parent(parent_pid: int | None, ending: signal.Signals) -> None:
    """Have the kernel send us `ending` when our parent is gone. None: we were started by hand, and stay.

    The wish survives `execve`. Raises `ConfigurationError` when the parent is gone already or the kernel refuses.
    """
    if parent_pid is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(ending), 0, 0, 0) != 0:
        raise ConfigurationError(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}; start without a parent")
    if os.getppid() != parent_pid:
        raise ConfigurationError(f"the parent process {parent_pid} is gone: start the command anew")
