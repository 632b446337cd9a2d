"""A peer of a one-sided transport: its memory, the session with the engine, the transfers. See `onesided`."""

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
    """One peer. `running` is its oldest transfer, and under way or about to be; at most one thread looks after it."""

    def __init__(
        self, described: OneSidedDescription, engine: OneSidedEngine[S], key: DataKey, client: PackClient | None = None
    ) -> None:
        self.endpoint = described.endpoint
        self.key = key
        self.client = client  # of its pack server, if small blocks can be packed
        memory = [MemoryRange(*each) for each in described.memory]
        self.memory, self.devices = Ranges.of(memory), Devices(memory)
        self.ports = frozenset(described.ports)
        self.network = described.network
        self.running: EngineTransfer | None = None
        self.unsettled: EngineTransfer | None = (
            None  # a transfer that failed, and of which bytes may still be on their way
        )
        self.failures = 0  # in a row
        self.dead = False  # by the word of others: see `Transport.fence_dead`
        self.host = ""  # the other end of its link
        self.met: dict[int, bool] | None = None
        """Sockets on which its last bytes may come, by inode; True: certainly its own. None: its link is up."""
        self._described = described
        self._engine = engine
        self._joining = threading.Lock()  # guards `_session`; held for as long as the engine takes
        self._session: S | None = None
        self._waiting: deque[EngineTransfer] = deque()
        self._pidfd: int | None = None
        with contextlib.suppress(OutOfReach):
            self._pidfd = machine.watch(described.process)

    @property
    def here(self) -> bool:
        """Whether its process can be watched: it is on this machine."""
        return self._pidfd is not None

    def lives(self) -> None:
        """It is linked: whatever was said or noted of its end is void."""
        self.dead, self.met = False, None

    def note_lost(self, rows: Iterable[TcpRow], host: str, others: frozenset[str]) -> None:
        """Note which of these connections may be its own. `host` and `others`: see `Transport.note_lost`.

        Those to hosts of other linked peers are theirs. Those to its own host are its own if no other peer is linked
        from there; else, and to a host that is not known (a further interface), they may be. Once its successor is
        linked from there, new ones are the successor's.
        """
        first, self.met, self.host = self.met is None, self.met or {}, plain(host)
        linked = frozenset(map(plain, others))
        for row in rows:
            at_home = row.host == self.host
            if not at_home and row.host not in linked:
                self.met.setdefault(row.inode, False)
            elif at_home and (first or self.host not in linked):
                self.met.setdefault(row.inode, self.host not in linked)

    def session(self) -> S:
        """Return the session, joined now if there is none; raise `TransportError`.

        Some engines open ports for their first peer: `Exposed`, and left again, if these are too much.
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
        """Return the session if a small batch can begin at once, without waiting for anybody."""
        session = self._session
        return session if session is not None and self._engine.begins_at_once(session) else None

    def end_session(self) -> None:
        """Leave the engine's session, if there is one. Nothing is under way."""
        with self._joining:
            session, self._session = self._session, None
            if session is not None:
                self._engine.leave(session)

    def add(self, transfer: EngineTransfer) -> bool:
        """Take a transfer; return True if a thread must see to it. As `next` and `drop`: under the transport's lock."""
        if self.running is None:
            self.running = transfer
            return True
        self._waiting.append(transfer)
        return False

    def next(self) -> EngineTransfer | None:
        """The running transfer is done: return the one that runs now."""
        self.running = self._waiting.popleft() if self._waiting else None
        return self.running

    def drop(self, reason: str) -> list[EngineTransfer]:
        """Take back the transfers that wait, and let the running one begin no further batch."""
        dropped = list(self._waiting)
        self._waiting.clear()
        for transfer in dropped:
            transfer.error = TransportError(reason)
        if self.running is not None:
            self.running.stopped = reason
        return dropped

    def hang_up(self) -> None:
        """Let nobody wait for its pack server any more."""
        if self.client is not None:
            self.client.hang_up()

    def gone(self) -> bool:
        """Whether the peer's process is known to have ended. Never known of another machine."""
        return self._pidfd is not None and machine.exited(self._pidfd)

    def close(self) -> None:
        """End the session, finish what never settled, give up the pidfd. Called once, when nothing is under way."""
        if self.client is not None:
            self.client.close()
        self.end_session()
        if self.unsettled is not None:
            self.unsettled.finish()
        if self._pidfd is not None:
            os.close(self._pidfd)
