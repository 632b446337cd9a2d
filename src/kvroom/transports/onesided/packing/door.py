"""The sink's side of packing: it leases slots of its staging area, and unpacks what was written there into the pages.

Each connection has a thread. Every scatter happens under the connection's lock and looks first whether it still may, so
`revoke`, `expel` and `close` only have to take that lock: once they hold it, not one more byte is unpacked.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from kvroom.dialling.advertised import advertised_host
from kvroom.errors import GrantRevoked, KVRoomError, RemoteProtocolError, TransportError
from kvroom.listening.threads import AcceptThread
from kvroom.plan.blocks import U64
from kvroom.transports.kit import gather
from kvroom.transports.kit.data_handshake import BUSY, answer, tune
from kvroom.transports.kit.data_keys import DataKey
from kvroom.transports.kit.data_socket import listen, to_close
from kvroom.transports.kit.grants import ForeignGrant
from kvroom.transports.onesided.packing import protocol
from kvroom.transports.onesided.packing.protocol import MOST_LEASES, Area, Request
from kvroom.transports.onesided.packing.slots import Slots
from kvroom.wire.address import HostPort

_HANDSHAKE_S = 5.0
_MOST_CONNECTIONS = 256
_JOIN_S = 5.0
_AT_ONCE_BYTES = 1 << 20  # unpacked without letting go of the lock, for which a revoke waits


class Owner(Protocol):
    """What a door asks of the transport behind it. All may be called from any thread."""

    endpoint: bytes

    def key_with(self, source: bytes) -> DataKey | None:
        """Return the key in common with `source`, if this side is connected to it; wait a moment for that."""

    def admit(self, source: bytes, grant: bytes, dst: U64, length: U64) -> None:
        """Raise `TransportError` unless this source may write these blocks under this grant now."""

    def warn_of(self, host: str, error: ForeignGrant) -> None:
        """Log that a peer which connects from there wanted to write under a grant of another."""

    def granted(self, grant: bytes) -> bool:
        """Whether the grant still stands."""

    def quiet(self, source: bytes) -> bool:
        """Whether it is proven that nothing of this source is on its way; may block for a second."""


class Door:
    """Slots of `slot_bytes` each from `address` on, and the socket at which sources ask for them."""

    def __init__(
        self, owner: Owner, host: str, advertise: str | None, address: int, slots: int, slot_bytes: int
    ) -> None:
        self.wait_s = 1.0  # how long a source waits for a slot before it hears that there is none
        self.recent_faults: deque[str] = deque(maxlen=16)  # why connections ended, newest last
        self._owner = owner
        self._changed = threading.Condition()  # guards the slots, the visits and `_waiting`
        self._slots = Slots(slots)
        self._visits: dict[Visit, None] = {}  # oldest first
        self._waiting = 0
        reached_by = advertised_host(host, advertise)
        listeners = listen(host, 0)
        where = HostPort.of(reached_by, listeners[0].getsockname()[1])
        self.area = Area(address, slots, slot_bytes, *where)
        self._accepting = AcceptThread(listeners, "kvroom-door", self._take, refusal=BUSY)

    def audit(self) -> dict[str, int]:
        """Count leased and quarantined slots, and the sources that wait for one."""
        with self._changed:
            return {"leased": self._slots.leased, "quarantined": self._slots.quarantined, "waiting": self._waiting}

    def revoke(self, grant: bytes) -> None:
        """When this returns nothing is unpacked under the grant any more. The owner forgot it before."""
        with self._changed:
            self._slots.revoke(grant)
            visits = list(self._visits)
        for visit in visits:
            visit.pause()

    def expel(self, source: bytes) -> None:
        """End this source's connections and quarantine its slots: after this nothing is unpacked for it."""
        with self._changed:
            visits = [visit for visit in self._visits if visit.source == source]
        for visit in visits:
            visit.close()
            self.lost(visit)

    def quiet(self, source: bytes) -> None:
        """Nothing of this source is on its way: its slots are free. Call `expel` before."""
        with self._changed:
            self._slots.quiet(source)
            self._changed.notify_all()

    def close(self) -> None:
        """End all connections; nothing is unpacked afterwards."""
        self._accepting.close()
        with self._changed:
            visits = list(self._visits)
            self._changed.notify_all()
        for visit in visits:
            visit.close()
            visit.join(_JOIN_S)
            self.lost(visit)

    def greeted(self, visit: Visit, source: bytes) -> None:
        """A source dials only when nothing of it is on its way: an older connection of it, and its leases, are over."""
        self.expel(source)
        visit.source = source
        self.quiet(source)

    def lease(self, visit: Visit, grant: bytes, wait: bool) -> int | None:
        """Lease a slot; None if there is none now, or, if the source waits, for a while."""
        source = visit.source
        with self._changed:
            if self._slots.held(visit) >= MOST_LEASES:
                return None
            if wait and not self._slots.free:
                self._reclaim()
                self._waiting += 1
                self._changed.wait_for(lambda: self._slots.free or self._accepting.closing, self.wait_s)
                self._waiting -= 1
            return None if visit not in self._visits else self._slots.lease(source, visit, grant)

    def _reclaim(self) -> None:
        """Ask for proof, out of the lock, that who has quarantined slots is dead."""
        owners = self._slots.owners
        self._changed.release()
        try:
            proven = [owner for owner in owners if self._owner.quiet(owner)]
        finally:
            self._changed.acquire()
        for owner in proven:
            self._slots.quiet(owner)

    def end(self, visit: Visit, slot: int) -> None:
        """The write into this slot is over, and what was in it unpacked or refused."""
        with self._changed:
            self._slots.end(slot, visit)
            self._changed.notify_all()

    def holds(self, visit: Visit, slot: int) -> bool:
        """Whether this connection leases the slot."""
        with self._changed:
            return self._slots.find(slot, visit) is not None

    def check(self, visit: Visit, request: Request, dst: U64, length: U64) -> None:
        """Raise `TransportError` unless this may be unpacked."""
        most = self.area.slot_bytes
        if not length.all() or int(length.max()) > most or int(length.sum()) > most:
            raise TransportError(f"a block is empty, or all of them have more bytes than the {most} of a slot")
        self._owner.admit(visit.source, request.grant, dst, length)

    def granted(self, grant: bytes) -> bool:
        """Whether the grant still stands."""
        return self._owner.granted(grant)

    def lost(self, visit: Visit, fault: str | None = None) -> None:
        """A connection has ended: what it leased is quarantined."""
        with self._changed:
            self._visits.pop(visit, None)
            self._slots.lost(visit)
            self._changed.notify_all()
            if fault is not None:
                self.recent_faults.append(fault)

    def _take(self, connection: socket.socket) -> None:
        with self._changed:
            try:
                stranger = to_close(list(self._visits), _MOST_CONNECTIONS)
            except TransportError as full:
                self.recent_faults.append(str(full))
                connection.close()
                return
            visit = Visit(connection, self, self._owner)
            self._visits[visit] = None
        if stranger is not None:
            stranger.close()
            self.lost(stranger, "too many connections in their handshake; closed the oldest")
        visit.start()


class Visit:
    """One accepted connection and the thread that serves it."""

    def __init__(self, connection: socket.socket, door: Door, owner: Owner) -> None:
        self.source = b""
        self._socket = connection
        self._door = door
        self._owner = owner
        self._host = ""
        self._lock = threading.Lock()
        self._open = True
        self._ending = False  # said before the lock is taken: who holds it shall not take it again first
        self._thread = threading.Thread(target=self._run, name="kvroom-unpack", daemon=True)
        self.start: Callable[[], None] = self._thread.start

    def pause(self) -> None:
        """Wait until nothing is being unpacked; what follows looks at the grant again."""
        with self._lock:
            return

    def close(self) -> None:
        """When this returns nothing is unpacked for this connection any more."""
        self._ending = True
        with self._lock:
            if self._open:
                self._open = False
                try:
                    self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closes the descriptor
                except OSError:  # the peer was faster
                    return

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end after `close`."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        fault = None
        try:
            tune(self._socket)
            source = answer(self._socket, self._owner.endpoint, self._owner.key_with, _HANDSHAKE_S)
            self._socket.settimeout(None)
            self._host = str(self._socket.getpeername()[0])
            self._door.greeted(self, source)
            while raw := self._exactly(protocol.REQUEST.size, at_border=True):
                self._socket.sendall(self._answered(protocol.read_request(raw)))
        except (OSError, KVRoomError) as error:
            fault = str(error)
        with self._lock:
            fault = fault if self._open else None  # closed by this side: the error is only its echo
            self._open = False
            self._socket.close()
        self._door.lost(self, fault)

    def _answered(self, asked: Request) -> bytes:
        """Do what was asked; return the encoded reply."""
        if asked.kind in (protocol.LEASE, protocol.WAIT):
            slot = self._door.lease(self, asked.grant, asked.kind == protocol.WAIT)
            return protocol.reply(asked.number, protocol.BUSY if slot is None else protocol.DONE, slot or 0)
        if asked.kind == protocol.HELLO:
            return protocol.reply(asked.number, protocol.DONE)
        blocks = None
        if asked.kind == protocol.UNPACK:
            blocks = protocol.read_blocks(asked, self._exactly(16 * asked.blocks))
        if not self._door.holds(self, asked.slot):
            return protocol.reply(asked.number, protocol.REFUSED, text=f"slot {asked.slot} is not leased to the writer")
        verdict, text = protocol.DONE, ""
        if blocks is not None:
            try:
                self._unpack(asked, *blocks)
            except TransportError as error:
                verdict, text = protocol.verdict_of(error), str(error)
                if isinstance(error, ForeignGrant):
                    self._owner.warn_of(self._host, error)
        self._door.end(self, asked.slot)
        return protocol.reply(asked.number, verdict, text=text)

    def _unpack(self, asked: Request, dst: U64, length: U64) -> None:
        self._door.check(self, asked, dst, length)
        start = self._door.area.address + asked.slot * self._door.area.slot_bytes
        for first, last in gather.chunks(length, _AT_ONCE_BYTES):
            nbytes = int(length[first:last].sum())
            with self._lock:  # not for all chunks at once: who revokes waits for it
                if self._ending:
                    raise RemoteProtocolError("closed while a slot was being unpacked")
                if not self._door.granted(asked.grant):
                    raise GrantRevoked("the grant was revoked before all was unpacked")
                gather.scatter(gather.memory(start, nbytes), dst[first:last], length[first:last])
            start += nbytes

    def _exactly(self, size: int, at_border: bool = False) -> bytes:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            count = self._socket.recv_into(view[got:])
            if not count:
                if at_border and not got:
                    return b""
                raise RemoteProtocolError("the connection ended in the middle of a request")
            got += count
        return bytes(data)
