"""A peer of a one-sided transport: its memory, the engine's session with it, and the transfers to it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

from kvroom.errors import TransportError
from kvroom.plan.blocks import MemoryRange
from kvroom.transports.base import OutOfReach
from kvroom.transports.kit import machine
from kvroom.transports.kit.data_keys import DataKey
from kvroom.transports.kit.devices import Devices
from kvroom.transports.kit.ranges import Ranges

from .engine import EngineTransfer, OneSidedDescription, OneSidedEngine
from .exposure import Exposed
from .kernel_tcp import TcpRow, plain
from .packing.client import PackClient

S = TypeVar("S")


class OneSidedPeer(Generic[S]):
    """One peer. `running` is its oldest transfer, in flight or next to be; at most one thread works on it at a time."""

    def __init__(
        self, described: OneSidedDescription, engine: OneSidedEngine[S], key: DataKey, client: PackClient | None = None
    ) -> None:
        self.endpoint = described.endpoint
        self.key = key
        self.client = client  # for its pack server; None if blocks to it are never packed
        memory = [MemoryRange(*each) for each in described.memory]
        self.memory, self.devices = Ranges.of(memory), Devices(memory)
        self.ports = frozenset(described.ports)
        self.network = described.network
        self.running: EngineTransfer | None = None
        # A transfer that failed while bytes of it may be in flight. Its future stays open, and no other may begin.
        self.unsettled: EngineTransfer | None = None
        self.failures = 0  # in a row
        self.dead = False  # proven by others: see `Transport.fence_dead`
        self.host = ""  # the address at the other end of its link
        self.last_sockets: dict[int, bool] | None = None
        """Sockets over which its last bytes may arrive, by inode; True: certainly its own. None while it is linked."""
        self._described = described
        self._engine = engine
        self._joining = threading.Lock()  # guards `_session`; held while the engine joins or leaves: maybe seconds
        self._session: S | None = None
        self._waiting: deque[EngineTransfer] = deque()
        self._pidfd: int | None = None
        with contextlib.suppress(OutOfReach):
            self._pidfd = machine.watch(described.process)

    @property
    def here(self) -> bool:
        """True if the peer's process is on this machine, where it can be watched."""
        return self._pidfd is not None

    def mark_linked(self) -> None:
        """Discard what was recorded about the peer's death: a link to it is up."""
        self.dead, self.last_sockets = False, None

    def note_lost(self, rows: Iterable[TcpRow], host: str, others: frozenset[str]) -> None:
        """Record which of these connections may be the peer's. `host` and `others`: see `Transport.note_lost`.

        A connection to the host of another linked peer belongs to that one. A connection to this peer's host is
        certainly its own if no other peer is linked from there. It may be its own if one is, or if it leads to an
        unknown host (a further interface of the peer's). Once a successor is linked from its host, new connections are
        the successor's.
        """
        first, self.last_sockets, self.host = self.last_sockets is None, self.last_sockets or {}, plain(host)
        linked = frozenset(map(plain, others))
        for row in rows:
            at_home = row.host == self.host
            if not at_home and row.host not in linked:
                self.last_sockets.setdefault(row.inode, False)
            elif at_home and (first or self.host not in linked):
                self.last_sockets.setdefault(row.inode, self.host not in linked)

    def session(self) -> S:
        """Return the session, and join the peer first if there is none; raise `TransportError`.

        Some engines open ports when they join their first peer. If these exceed the configured host, the session is
        left again and `Exposed` is raised.
        """
        with self._joining:
            if self._session is None:
                sessions: list[S] = []
                try:
                    self._engine.guard.call(lambda: sessions.append(self._engine.join(self._described)))
                except Exposed:
                    self._engine.leave(sessions[0])
                    raise
                self._session = sessions[0]
            return self._session

    def warm(self) -> S | None:
        """Return the session if a small batch can begin immediately, without waiting for anything, else None."""
        session = self._session
        return session if session is not None and self._engine.begins_at_once(session) else None

    def end_session(self) -> None:
        """Leave the engine's session, if there is one. Call it only when no batch is in flight."""
        with self._joining:
            session, self._session = self._session, None
            if session is not None:
                self._engine.leave(session)

    def add(self, transfer: EngineTransfer) -> bool:
        """Queue a transfer; return True if it runs now, so that a thread must carry it out.

        Call `add`, `next` and `drop` under the transport's lock.
        """
        if self.running is None:
            self.running = transfer
            return True
        self._waiting.append(transfer)
        return False

    def next(self) -> EngineTransfer | None:
        """Replace the running transfer, which is done, by the next one; return that, or None if none waits."""
        self.running = self._waiting.popleft() if self._waiting else None
        return self.running

    def drop(self, reason: str) -> list[EngineTransfer]:
        """Fail the transfers that wait, and stop the running one from beginning another batch; return the former.

        The caller has to `finish` them, without the lock.
        """
        dropped = list(self._waiting)
        self._waiting.clear()
        for transfer in dropped:
            transfer.error = TransportError(reason)
        if self.running is not None:
            self.running.stopped = reason
        return dropped

    def hang_up(self) -> None:
        """End the connection to its pack server, so that no thread waits for it."""
        if self.client is not None:
            self.client.hang_up()

    def gone(self) -> bool:
        """Return True if the peer's process has ended. Always False for a peer on another machine."""
        return self._pidfd is not None and machine.exited(self._pidfd)

    def close(self) -> None:
        """End the session, finish the unsettled transfer, close the pidfd. Called once, when no batch is in flight."""
        if self.client is not None:
            self.client.close()
        self.end_session()
        if self.unsettled is not None:
            self.unsettled.finish()
        if self._pidfd is not None:
            os.close(self._pidfd)
