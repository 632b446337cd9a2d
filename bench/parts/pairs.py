"""A pair of processes, one with the source end and one with the sink end, both driven from this process.

`python -m parts.pairs FD` serves ends: each msgpack request gets one response. The output of the processes goes to a
file, because some engines print a lot; it is shown when a process fails.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from kvroom.plan.blocks import Blocks
from kvroom.transports.kit.pool import Pool, allocate
from parts.contest import places
from parts.ends import End, Way
from parts.split import split

PAGE_BYTES = 4096
_QUIET = {"NIXL_LOG_LEVEL": "WARN", "MC_LOG_LEVEL": "ERROR"}
_CHECKED_BYTES = 4 << 20  # checked in one step


class Kind(NamedTuple):
    """The kind of both ends: a class by its name, and its options.

    `spins`: an idle end takes CPU time, so its process is stopped between calls. `shared`: the other process can map
    the pool.
    """

    make: str
    options: dict[str, Any] = {}
    spins: bool = False
    one_process: bool = False
    huge: bool = True  # huge pages for the pool
    shared: bool = False


class _Side:
    """One end, its pool and the blocks, in the process that serves it."""

    def __init__(self, make: str, options: dict[str, Any], nbytes: int, huge: bool, shared: bool) -> None:
        self._pool: Pool = allocate(nbytes, huge=huge, shared=shared)
        self._words: npt.NDArray[np.uint64] = np.frombuffer(self._pool.buffer, np.uint64)
        self._words[:] = np.arange(1, self._words.size + 1, dtype=np.uint64)
        module, _, name = make.partition(":")
        self._end: End = getattr(importlib.import_module(module), name)(self._pool, **options)
        self._blocks, self._one = (Blocks(*[np.empty(0, np.uint64)] * 3) for _ in range(2))
        self._bases = (0, 0)
        self._plans: dict[str, Blocks] = {}

    def address(self) -> int:
        return self._pool.address

    def card(self) -> bytes:
        return self._end.card()

    def meet(self, card: bytes) -> None:
        self._end.meet(card)

    def plan(self, source: int, sink: int, count: int, block_bytes: int) -> None:
        src, dst = places(count, block_bytes, 1), places(count, block_bytes, 2)
        length = np.full(count, block_bytes, np.uint64)
        self._blocks = Blocks(np.uint64(source) + src, np.uint64(sink) + dst, length)
        page = np.full(1, PAGE_BYTES, np.uint64)
        self._one = Blocks(self._blocks.src[:1], self._blocks.dst[:1], page)
        self._bases = (source, sink)

    def keep(self, name: str, source: int, sink: int, nbytes: int, piece_bytes: int, widths: str) -> None:
        self._plans[name] = split(source, sink, nbytes, piece_bytes, widths)
        self._bases = (source, sink)

    def use(self, name: str) -> None:
        self._blocks = self._plans[name]

    def clear(self) -> None:
        self._words[:] = 0

    def wrong(self) -> int:
        """Return the number of words in the blocks, all of one length, that differ from those of the source."""
        size = int(self._blocks.length[0]) // 8
        source, sink = (
            (part - np.uint64(base)) // np.uint64(8) for part, base in zip(self._blocks[:2], self._bases, strict=True)
        )
        at_once, word, bad = max(1, _CHECKED_BYTES // (8 * size)), np.arange(size, dtype=np.uint64), 0
        for start in range(0, len(sink), at_once):
            part = slice(start, start + at_once)
            expected = source[part, None] + word + np.uint64(1)
            bad += int(np.count_nonzero(self._words[sink[part, None] + word] != expected))
        return bad

    def move(self, way: list[int]) -> float:
        start = time.perf_counter()
        self._end.move(self._blocks, Way(*way))
        return time.perf_counter() - start

    def take(self) -> None:
        self._end.take(self._blocks)

    def move_pages(self, times: int, way: list[int]) -> list[float]:
        """Return the seconds of each of `times` transfers of one page, from the call to the result."""
        taken, how = [], Way(*way)
        for _ in range(times):
            start = time.perf_counter()
            self._end.move(self._one, how)
            taken.append(time.perf_counter() - start)
        return taken

    def take_pages(self, times: int) -> None:
        for _ in range(times):
            self._end.take(self._one)

    def close(self) -> None:
        self._end.close()


class _Process:
    """A process that serves ends."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - `close` does
        path = os.pathsep.join((str(Path(__file__).parents[1]), *sys.path))
        environment = os.environ | _QUIET | {"PYTHONPATH": path}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "parts.pairs", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdout=self._log,
                stderr=self._log,
            )
        self._connection = Connection(ours.detach())

    def ask(self, name: str, *args: Any) -> None:
        self._connection.send_bytes(msgspec.msgpack.encode([name, args]))

    def answer(self) -> Any:
        try:
            return msgspec.msgpack.decode(self._connection.recv_bytes())
        except (EOFError, ConnectionError) as error:
            self._process.wait()
            self._log.seek(0)
            said = self._log.read().decode(errors="replace")[-3000:]
            raise RuntimeError(f"a benchmark's process ended with {self._process.returncode}:\n{said}") from error

    def call(self, name: str, *args: Any) -> Any:
        self.ask(name, *args)
        return self.answer()

    def stop(self) -> None:
        """Stop the process with SIGSTOP, and return when it stands still."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self._connection.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Pair:
    """Two connected ends with a pool of `nbytes` each. Every call blocks until it is done."""

    def __init__(self, kind: Kind, nbytes: int) -> None:
        self._source, self._spins = _Process(), kind.spins
        self._sink = self._source if kind.one_process else _Process()
        self._ends = [0, 1]
        for process in (self._source, self._sink):
            process.ask("open", kind.make, kind.options, nbytes, kind.huge, kind.shared)
        self._ends = [self._source.answer(), self._sink.answer()]
        self._on(0, "meet", self._on(1, "card"))
        self._on(1, "meet", self._on(0, "card"))
        if kind.spins:
            self._stop()

    def _on(self, side: int, name: str, *args: Any) -> Any:
        return (self._source, self._sink)[side].call(name, self._ends[side], *args)

    def plan(self, count: int, block_bytes: int) -> None:
        """Set the blocks to move: `count` scattered blocks, and the first page of the first one."""
        with self._awake():
            addresses = [self._on(side, "address") for side in (0, 1)]
            for side in (0, 1):
                self._on(side, "plan", *addresses, count, block_bytes)

    def keep(self, name: str, nbytes: int, piece_bytes: int, widths: str) -> None:
        """Keep a plan of `parts.split` under this name."""
        with self._awake():
            addresses = [self._on(side, "address") for side in (0, 1)]
            for side in (0, 1):
                self._on(side, "keep", name, *addresses, nbytes, piece_bytes, widths)

    def use(self, name: str) -> None:
        """Set the blocks to move to those of a kept plan."""
        with self._awake():
            for side in (0, 1):
                self._on(side, "use", name)

    def move(self, way: Way) -> float:
        """Move all blocks; return the seconds that the source took."""
        return float(self._both("take", (), "move", (way,)))

    def pages(self, times: int, way: Way) -> list[float]:
        """Move one page `times` times; return the seconds of each."""
        return list(self._both("take_pages", (times,), "move_pages", (times, way)))

    def check(self, way: Way) -> None:
        """Clear the sink's pool, move all blocks and compare every byte. Raise `RuntimeError` if any is wrong."""
        with self._awake():
            self._on(1, "clear")
        self.move(way)
        with self._awake():
            bad = self._on(1, "wrong")
        if bad:
            raise RuntimeError(f"{bad} words are wrong after a transfer that succeeded")

    def _both(self, taking: str, how_many: tuple[Any, ...], moving: str, how: tuple[Any, ...]) -> Any:
        with self._awake():
            self._sink.ask(taking, self._ends[1], *how_many)
            self._source.ask(moving, self._ends[0], *how)
            self._sink.answer()  # in one process the sink has no work, and answers first
            return self._source.answer()

    @contextmanager
    def _awake(self) -> Iterator[None]:
        if self._spins:
            self._source.go_on()
            self._sink.go_on()
        yield
        if self._spins:
            self._stop()

    def _stop(self) -> None:
        for process in (self._source, self._sink):
            process.stop()

    def close(self) -> None:
        """End both processes."""
        if self._spins:
            self._source.go_on()
            self._sink.go_on()
        for side in (0, 1):
            self._on(side, "close")
        self._source.close()
        if self._sink is not self._source:
            self._sink.close()


def _serve(connection: Connection) -> None:
    sides: list[_Side] = []
    while True:
        try:
            name, args = msgspec.msgpack.decode(connection.recv_bytes())
        except EOFError:
            return
        if name == "open":
            sides.append(_Side(*args))
            answer: Any = len(sides) - 1
        else:
            answer = getattr(sides[args[0]], name)(*args[1:])
        connection.send_bytes(msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
