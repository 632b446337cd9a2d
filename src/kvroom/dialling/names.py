"""Resolving names without letting a slow resolver hold up anything but the callers that asked for these names.

`getaddrinfo` blocks for as long as the resolver takes, half a minute and more for a name whose servers are silent, and
cannot be called off. asyncio runs it in the threads of its default executor, a handful that everything shares: as many
slow names as there are threads stop every other name, and the end of the process waits for them, too.

Here each name that is asked for gets a thread of its own, which dies with the process, and callers that ask for the
same name meanwhile share it. How many threads there are is bounded. Over the bound a name is refused with a clear
error, except for one that was resolved before: such names have room of their own. So a flood of slow names, which
anybody can cause who chooses the addresses in requests, stops neither the workers that are in use nor each other.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

MAX_LOOKUPS = 128
MAX_KNOWN = 1024
KNOWN_LOOKUPS = 64
"""How many more names may be looked up at a time if they are among the `MAX_KNOWN` that were resolved last."""


class FoundAddress(NamedTuple):
    """One address of a host, as `socket.getaddrinfo` returns it."""

    family: int
    kind: int
    protocol: int
    canonical: str
    address: tuple[Any, ...]


class _Question(NamedTuple):
    """The arguments of `socket.getaddrinfo`."""

    host: str | bytes | None
    port: str | int | bytes | None
    family: int
    kind: int
    protocol: int
    flags: int


class Names:
    """Answers questions of any thread. `lookups` and `known_lookups` are the bounds on threads, see the module."""

    def __init__(self, lookups: int = MAX_LOOKUPS, known_lookups: int = KNOWN_LOOKUPS) -> None:
        self._lookups, self._known_lookups = lookups, known_lookups
        self._lock = threading.Lock()  # guards the tables, never held during a lookup
        self._running: dict[_Question, Future[list[FoundAddress]]] = {}
        self._known: OrderedDict[str | bytes | None, None] = OrderedDict()

    def look_up(
        self,
        host: str | bytes | None,
        port: str | int | bytes | None,
        *,
        family: int = 0,
        kind: int = socket.SOCK_STREAM,
        protocol: int = 0,
        flags: int = 0,
    ) -> Future[list[FoundAddress]]:
        """Return a future of the addresses of a host, in the order in which the system prefers them. Never blocks.

        The future raises `OSError` for a name that cannot be resolved, or not now; it cannot be cancelled.
        """
        question = _Question(host, port, family=family, kind=kind, protocol=protocol, flags=flags)
        with self._lock:
            running = self._running.get(question)
            if running is not None:
                return running
            answer: Future[list[FoundAddress]] = Future()
            answer.set_running_or_notify_cancel()
            most = self._lookups + (self._known_lookups if host in self._known else 0)
            if len(self._running) >= most:
                why = (
                    f"the host name was not looked up, because {len(self._running)} other lookups have not ended yet: "
                    "is the resolver of this machine reached?"
                )
                answer.set_exception(OSError(why))
                return answer
            self._running[question] = answer
        try:
            threading.Thread(target=self._ask, args=(question, answer), name="kvroom-name", daemon=True).start()
        except RuntimeError as error:  # the system has no thread left
            refused = OSError(f"the host name cannot be resolved: {error}")
            self._end(question, lambda: answer.set_exception(refused))
        return answer

    def after_fork(self) -> None:
        """Forget, in a child process, the lookups of its parent: their threads are not there to end them."""
        self._lock = threading.Lock()
        self._running = {}

    def _ask(self, question: _Question, answer: Future[list[FoundAddress]]) -> None:
        try:
            found = [FoundAddress(*each) for each in socket.getaddrinfo(*question)]
        except OSError as error:
            failed = error  # the name that `except` gives is gone when the answer is set
            self._end(question, lambda: answer.set_exception(failed))
        except ValueError as error:  # not a text that could be a name: it holds a NUL, or an overlong label
            refused = OSError(f"the host name cannot be resolved: {error}")
            self._end(question, lambda: answer.set_exception(refused))
        else:
            self._end(question, lambda: answer.set_result(found), known=True)

    def _end(self, question: _Question, tell: Callable[[], None], *, known: bool = False) -> None:
        with self._lock:
            del self._running[question]
            if known:
                self._known.pop(question.host, None)
                self._known[question.host] = None
                if len(self._known) > MAX_KNOWN:
                    self._known.popitem(last=False)
        tell()


NAMES = Names()
"""The names of this process: all of its loops and threads ask here."""
os.register_at_fork(after_in_child=NAMES.after_fork)
