"""The sink's side of packing: it leases slots of its staging area, and unpacks what was written there into the pages.

Every scatter happens under the connection's lock and looks first whether it still may, as `kit.data_socket` asks for.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence

from kvroom.dialling.advertised import advertised_host
from kvroom.errors import GrantRevoked, RemoteProtocolError, TransportError
from kvroom.plan.blocks import U64
from kvroom.transports.kit import gather
from kvroom.transports.kit.data_socket import DataListener, InboundConnection, WriterAdmission
from kvroom.transports.kit.grants import ForeignGrant
from kvroom.wire.address import HostPort

from . import protocol
from .protocol import MAX_LEASES, Area, PackRequest
from .slots import Slots

_MAX_CONNECTIONS = 256
_AT_ONCE_BYTES = 1 << 20  # unpacked without letting go of the lock, for which a revoke waits


class PackServer:
    """Slots of `slot_bytes` each from `address` on, and the socket at which sources ask for them.

    `quiet(source)`: whether it is proven that nothing of this source is on its way; it may block for a second.
    """

    def __init__(
        self,
        admission: WriterAdmission,
        quiet: Callable[[bytes], bool],
        *,
        host: str,
        advertise: str | None,
        address: int,
        slots: int,
        slot_bytes: int,
    ) -> None:
        self.wait_s = 1.0  # how long a source waits for a slot before it hears that there is none
        self._admission = admission
        self._proven_quiet = quiet
        self._changed = threading.Condition()  # guards the slots and `_waiting`
        self._slots = Slots(slots)
        self._waiting = 0
        reached_by = advertised_host(host, advertise)
        self._listener: DataListener[PackSession] = DataListener(
            host,
            0,
            name="kvroom-pack-server",
            limit=_MAX_CONNECTIONS,
            make=lambda accepted: PackSession(accepted, self, admission),
            gone=self._lost,
        )
        where = HostPort.of(reached_by, self._listener.port)
        self.area = Area(address=address, slots=slots, slot_bytes=slot_bytes, host=where.host, port=where.port)

    @property
    def recent_errors(self) -> Sequence[str]:
        """Why connections ended, the newest last."""
        return self._listener.recent_errors

    @property
    def sessions(self) -> list[PackSession]:
        """The connections that have not ended, oldest first."""
        return self._listener.connections()

    def audit(self) -> dict[str, int]:
        """Count leased and quarantined slots, and the sources that wait for one."""
        with self._changed:
            return {"leased": self._slots.leased, "quarantined": self._slots.quarantined, "waiting": self._waiting}

    def revoke(self, grant: bytes) -> None:
        """When this returns nothing is unpacked under the grant any more. The owner forgot it before."""
        with self._changed:
            self._slots.revoke(grant)
        for session in self.sessions:
            session.pause()

    def expel(self, source: bytes) -> None:
        """End this source's connections and quarantine its slots: after this nothing is unpacked for it."""
        for session in self.sessions:
            if session.source == source:
                self._listener.drop(session)

    def quiet(self, source: bytes) -> None:
        """Nothing of this source is on its way: its slots are free. Call `expel` before."""
        with self._changed:
            self._slots.quiet(source)
            self._changed.notify_all()

    def close(self) -> None:
        """End all connections; nothing is unpacked afterwards."""
        self._listener.stop()
        with self._changed:
            self._changed.notify_all()
        self._listener.close()

    def greeted(self, session: PackSession, source: bytes) -> None:
        """A source dials only when nothing of it is on its way: an older connection of it, and its leases, are over."""
        self.expel(source)
        session.source = source
        self.quiet(source)

    def lease(self, session: PackSession, grant: bytes, wait: bool) -> int | None:
        """Lease a slot; None if there is none now, or, if the source waits, for a while."""
        source = session.source
        with self._changed:
            if self._slots.held(session) >= MAX_LEASES:
                return None
            if wait and not self._slots.free:
                owners = self._slots.owners
                # Whether who has quarantined slots is dead is asked out of the lock.
                self._changed.release()
                try:
                    proven = [owner for owner in owners if self._proven_quiet(owner)]
                finally:
                    self._changed.acquire()
                for owner in proven:
                    self._slots.quiet(owner)
                self._waiting += 1
                self._changed.wait_for(lambda: self._slots.free or self._listener.closing, self.wait_s)
                self._waiting -= 1
            return None if session not in self._listener else self._slots.lease(source, session, grant)

    def end(self, session: PackSession, slot: int) -> None:
        """The write into this slot is over, and what was in it unpacked or refused."""
        with self._changed:
            self._slots.end(slot, session)
            self._changed.notify_all()

    def holds(self, session: PackSession, slot: int) -> bool:
        """Whether this connection leases the slot."""
        with self._changed:
            return self._slots.find(slot, session) is not None

    def check(self, session: PackSession, request: PackRequest, dst: U64, length: U64) -> None:
        """Raise `TransportError` unless this may be unpacked."""
        most = self.area.slot_bytes
        if not length.all() or int(length.max()) > most or int(length.sum()) > most:
            raise TransportError(f"a block is empty, or all of them have more bytes than the {most} of a slot")
        self._admission.check(session.source, request.grant, dst, length)

    def _lost(self, session: PackSession) -> None:
        """A connection has ended: what it leased is quarantined."""
        with self._changed:
            self._slots.lost(session)
            self._changed.notify_all()


class PackSession(InboundConnection):
    """One accepted connection and the thread that serves it."""

    def __init__(self, connection: socket.socket, server: PackServer, admission: WriterAdmission) -> None:
        super().__init__(connection, admission, "kvroom-unpack")
        self._pack_server = server

    def pause(self) -> None:
        """Wait until nothing is being unpacked; what follows looks at the grant again."""
        with self._lock:
            return

    def greeted(self, source: bytes) -> None:
        self._pack_server.greeted(self, source)

    def serve(self) -> None:
        while raw := self._exactly(protocol.REQUEST.size, at_border=True):
            self._socket.sendall(self._answered(protocol.read_request(raw)))

    def _answered(self, asked: PackRequest) -> bytes:
        """Do what was asked; return the encoded reply."""
        if asked.kind in (protocol.LEASE, protocol.WAIT):
            slot = self._pack_server.lease(self, asked.grant, asked.kind == protocol.WAIT)
            return protocol.reply(asked.number, protocol.BUSY if slot is None else protocol.DONE, slot or 0)
        if asked.kind == protocol.HELLO:
            return protocol.reply(asked.number, protocol.DONE)
        blocks = None
        if asked.kind == protocol.UNPACK:
            blocks = protocol.read_blocks(asked, self._exactly(16 * asked.blocks))
        if not self._pack_server.holds(self, asked.slot):
            return protocol.reply(asked.number, protocol.REFUSED, text=f"slot {asked.slot} is not leased to the writer")
        verdict, text = protocol.DONE, ""
        if blocks is not None:
            try:
                self._unpack(asked, *blocks)
            except TransportError as error:
                verdict, text = protocol.verdict_of(error), str(error)
                if isinstance(error, ForeignGrant):
                    self._admission.warn_of(self._host, error)
        self._pack_server.end(self, asked.slot)
        return protocol.reply(asked.number, verdict, text=text)

    def _unpack(self, asked: PackRequest, dst: U64, length: U64) -> None:
        self._pack_server.check(self, asked, dst, length)
        start = self._pack_server.area.address + asked.slot * self._pack_server.area.slot_bytes
        for first, last in gather.chunks(length, _AT_ONCE_BYTES):
            nbytes = int(length[first:last].sum())
            with self._lock:  # not for all chunks at once: who revokes waits for it
                if self._ending:
                    raise RemoteProtocolError("closed while a slot was being unpacked")
                if not self._admission.stands(asked.grant):
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
