"""The two processes of a soak: started together, read until both have reported, and ended together.

Each has a session of its own, so that Ctrl-C reaches only the parent, and the kernel kills it when its parent dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from kvroom.errors import ConfigurationError, KVRoomError
from kvroom_lab.allocator import ALLOCATOR

from .report import SideReport
from .worker import Task

_PR_SET_PDEATHSIG = 1
_GRACE_S = 10.0


class SideEnded(KVRoomError):
    """A process of the soak ended before it had reported. Its stderr has the reason."""


class _Line(NamedTuple):
    """A line that the process of one side printed; None after the last line."""

    side: str
    text: str | None


def run_sides(tasks: Sequence[Task]) -> list[SideReport]:
    """Run a process for each task; return their reports in the same order. No process is left running."""
    heard: queue.SimpleQueue[_Line] = queue.SimpleQueue()
    reports: dict[str, SideReport] = {}
    _say(f"{tasks[0].mix.rooms:,} rooms, {tasks[0].window} open at once")
    with _started(tasks, heard):
        while len(reports) < len(tasks):
            side, text = heard.get()
            if text is None:
                raise SideEnded(f"the process of the {side} ended before it had reported; see its stderr")
            word, _, rest = text.partition(" ")
            if word == "REPORT":
                reports[side] = msgspec.json.decode(rest, type=SideReport)
            elif word == "PROGRESS":
                _show_progress(side, int(rest), tasks[0].mix.rooms)
            else:
                _say(f"[{side}] {text}")  # engines print to stdout
    return [reports[task.side] for task in tasks]


def die_with_parent(parent_pid: int) -> None:
    """Let the kernel kill this process when its parent dies.

    Raise `ConfigurationError` if the parent is dead already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise ConfigurationError(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}; the soak needs Linux")
    if os.getppid() != parent_pid:
        raise ConfigurationError(f"the parent process {parent_pid} is gone: start the soak again")


@contextlib.contextmanager
def _started(tasks: Sequence[Task], heard: queue.SimpleQueue[_Line]) -> Iterator[None]:
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    try:
        for task in tasks:
            command = [sys.executable, "-m", "kvroom_lab.soak", "--parent-pid", str(os.getpid())]
            process = subprocess.Popen(
                [*command, "--task", msgspec.json.encode(task).decode()],
                env={**ALLOCATOR, **os.environ}, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace",
            )  # fmt: skip
            processes.append(process)
            readers.append(threading.Thread(target=_read, args=(task.side, process, heard)))
            readers[-1].start()
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
            process.kill()
            process.wait()
        for reader in readers:
            reader.join()


def _read(side: str, process: subprocess.Popen[str], heard: queue.SimpleQueue[_Line]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            if text := line.rstrip():
                heard.put(_Line(side, text))
    heard.put(_Line(side, None))


def _show_progress(side: str, begun: int, rooms: int) -> None:
    """Show each tenth of the rooms once; a process reports each hundredth."""
    if side == "sink" and begun * 10 // rooms > (begun - max(1, rooms // 100)) * 10 // rooms:
        _say(f"{begun:,} of {rooms:,} rooms")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
