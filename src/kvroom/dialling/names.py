"""Name resolution in which a slow name delays only the callers that asked for it.

`getaddrinfo` blocks until the resolver answers, which takes half a minute and more for a name whose servers are silent,
and it cannot be cancelled. asyncio runs it in the few threads of its default executor, which all tasks share: as many
slow names as there are threads block every other name, and also delay the end of the process.

Here each lookup gets a daemon thread, and callers that ask for the same name during the lookup share it. The number of
threads is limited. Over the limit, a name is refused with a clear error, unless it was resolved before: for such names,
more threads are in reserve. A client that chooses the addresses in its requests can therefore cause a flood of slow
names, but names that were resolved before stay reachable.
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
"""The number of additional lookups at a time for the `MAX_KNOWN` names that were resolved last."""


class FoundAddress(NamedTuple):
    """One address of a host, as `socket.getaddrinfo` returns it."""

    family: int
    kind: int
    protocol: int
    canonical: str
    address: tuple[Any, ...]


class _Lookup(NamedTuple):
    """The arguments of `socket.getaddrinfo`."""

    host: str | bytes | None
    port: str | int | bytes | None
    family: int
    kind: int
    protocol: int
    flags: int


class Names:
    """A resolver for all threads. `lookups` and `known_lookups` limit its threads, as the module describes."""

    def __init__(self, lookups: int = MAX_LOOKUPS, known_lookups: int = KNOWN_LOOKUPS) -> None:
        self._lookups, self._known_lookups = lookups, known_lookups
        self._lock = threading.Lock()  # guards the tables, never held during a lookup
        self._running: dict[_Lookup, Future[list[FoundAddress]]] = {}
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
        """Return a future of a host's addresses, in the system's order of preference. Never blocks.

        The arguments are those of `socket.getaddrinfo`. The future cannot be cancelled. It raises `OSError` if the name
        cannot be resolved, or too many lookups are running.
        """
        lookup = _Lookup(host, port, family=family, kind=kind, protocol=protocol, flags=flags)
        with self._lock:
            running = self._running.get(lookup)
            if running is not None:
                return running
            answer: Future[list[FoundAddress]] = Future()
            answer.set_running_or_notify_cancel()
            most = self._lookups + (self._known_lookups if host in self._known else 0)
            if len(self._running) >= most:
                why = (
                    f"the host name was not looked up, because {len(self._running)} other lookups are still running: "
                    "check that this machine reaches its name server"
                )
                answer.set_exception(OSError(why))
                return answer
            self._running[lookup] = answer
        try:
            threading.Thread(target=self._resolve, args=(lookup, answer), name="kvroom-name", daemon=True).start()
        except RuntimeError as error:  # the system refuses another thread
            refused = OSError(f"the host name cannot be resolved: {error}")
            self._end(lookup, lambda: answer.set_exception(refused))
        return answer

    def after_fork(self) -> None:
        """Forget the parent's lookups in a forked child, which does not have the threads that would complete them."""
        self._lock = threading.Lock()
        self._running = {}

    def _resolve(self, lookup: _Lookup, answer: Future[list[FoundAddress]]) -> None:
        try:
            found = [FoundAddress(*each) for each in socket.getaddrinfo(*lookup)]
        except OSError as error:
            failed = error  # Python deletes the name `error` at the end of this clause
            self._end(lookup, lambda: answer.set_exception(failed))
        except ValueError as error:  # not a valid name: it contains a NUL or an overlong label
            refused = OSError(f"the host name cannot be resolved: {error}")
            self._end(lookup, lambda: answer.set_exception(refused))
        else:
            self._end(lookup, lambda: answer.set_result(found), known=True)

    def _end(self, lookup: _Lookup, complete: Callable[[], None], *, known: bool = False) -> None:
        with self._lock:
            del self._running[lookup]
            if known:
                self._known.pop(lookup.host, None)
                self._known[lookup.host] = None
                if len(self._known) > MAX_KNOWN:
                    self._known.popitem(last=False)
        complete()


NAMES = Names()
"""The resolver of this process, for all of its loops and threads."""
os.register_at_fork(after_in_child=NAMES.after_fork)
