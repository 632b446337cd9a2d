"""The sink's side of packing: a server that leases staging slots, and unpacks into the pages what was written there.

Every scatter runs under its connection's lock and first checks that it is still permitted (see `kit.data_socket`).
"""

# Theory of operation. (The tests that are named here are in tests/transports; the planted bugs are in its faulty.py.)
#
# A `PackClient` of the source asks for a slot: LEASE for one that is free now, WAIT for one within `wait_s`. The source
# gathers a batch into a slot of its own `StagingPool`, its engine writes that slot into the leased one, and the client
# sends UNPACK with the grant and the blocks. The `PackSession` of that connection checks the blocks, scatters the slot
# into the pages in chunks of 1 MiB, ends the lease and replies. `Slots`, the table of leases, is guarded by the
# server's lock `_changed`; a session scatters under a lock of its own; no thread holds both. The engine writes without
# the sink's help, so the sink cannot see when a write into a slot has ended. The rules follow from that:
#
#  1. A slot has one lease, and only the connection that holds it can unpack or release the slot. Otherwise source B
#     sends RELEASE for the slot that A is writing, C leases it, and C's UNPACK scatters A's bytes into C's pages.
#     Tests: test_no_slot_is_leased_twice, test_a_lease_ends_when_its_writer_says_so_on_its_own_connection.
#  2. The client sends UNPACK only after the engine has finished the write, and RELEASE only when no byte of a failed
#     write can still arrive. Otherwise the sink scatters what an earlier batch left in the slot, or leases the slot to
#     B while A's bytes still arrive. Tests: test_small_blocks_travel_as_one_and_large_ones_as_they_are (UNPACK),
#     test_a_write_that_may_not_have_ended_keeps_its_slot (RELEASE).
#  3. The lease ends after the scatter, and the reply is sent after that. If the lease ended first, B would write into
#     the slot while its last chunk is read. If the reply came first, the source would report its room as done, and the
#     decode engine would read incomplete pages. Test: test_a_transfer_is_done_when_the_scatter_has_ended.
#  4. A lost connection or a revoked grant puts a leased slot into quarantine, and no timeout frees it. Otherwise A
#     loses its connection during a write, the sink leases the slot to B, A's last bytes arrive after B's, and B's
#     UNPACK scatters them into B's pages. The slot is freed by UNPACK or RELEASE over the connection that leased it, by
#     rule 5, or by proof that the writer is dead and its last bytes were read. Until then its memory outlives even the
#     transport. Tests: test_a_quarantined_slot_is_nobody_elses,
#     test_a_revoked_lease_is_quarantined_until_its_write_is_over,
#     test_a_cut_connection_quarantines_the_slot_until_the_writer_is_quiet,
#     test_memory_that_a_peer_may_still_write_outlives_its_transport.
#  5. A source dials only while none of its writes to this sink is in flight, so a new connection frees its slots.
#     Otherwise a write of A fails with bytes left in the kernel's buffers, A's next transfer dials, and the freed slot
#     goes to B, as in rule 4. Test: test_a_write_that_may_not_have_ended_keeps_its_slot. The handshake proves which
#     peer dials; otherwise C frees A's slots in A's name. Test: test_a_door_admits_no_peer_in_the_name_of_another.
#  6. `expel` ends the older connections of a source before `quiet` frees its slots, and HELLO is answered after both.
#     Otherwise A's connection breaks while the sink unpacks, A dials again, and B, which leases the slot, overwrites it
#     during the old scatter; A reports its transfer as over while the sink still writes the pages. Test:
#     test_a_source_that_connects_again_waits_until_its_older_connection_has_ended.
#  7. A connection that has ended leases nothing. Otherwise a source that waits for a slot is fenced and forgotten, and
#     then gets one, which no later proof can free. Test: test_a_source_that_is_fenced_while_it_waits_gets_no_slot.
#  8. The transport takes the grant back, then `revoke` acquires each session's lock once; each chunk checks the grant
#     under that lock. In the other order a chunk checks the grant after the wait and before the grant is taken back,
#     and it lands after `revoke` has returned, in pages that another request has by then. Planted bug: LaxGrants. Test:
#     test_a_revoke_waits_for_the_scatter_under_way_and_ends_what_follows.
#  9. Each chunk also checks `_ending`, which `close` sets before it acquires the lock. Without the check the scatter
#     goes on after a fence has returned; set under the lock, it would come after any number of further chunks, as the
#     session may acquire the lock again first. Test: test_a_fence_ends_what_is_being_unpacked.
# 10. All blocks of an UNPACK are checked before the first chunk. Otherwise a peer reads a neighbouring slot, with
#     another request's KV, by blocks longer than its own slot, or writes under a grant that it has overheard. Planted
#     bugs: LaxGrants, Shares. Tests: test_what_a_door_refuses, test_an_unpack_outside_the_grant_is_refused,
#     test_small_blocks_under_a_grant_of_another_are_refused.
# 11. A connection has two leases at most, WAIT is limited, and a source that waits gets the slots of writers that are
#     proven dead. Otherwise one source holds every slot, and a stuck or dead writer delays every other source. Tests:
#     test_what_a_door_refuses, test_a_quarantined_slot_is_nobody_elses,
#     test_a_source_that_waits_gets_the_slot_of_a_writer_that_is_proven_dead.
# 12. A source does not reuse its own slot while the engine may still read it. Otherwise the gather for B overwrites it,
#     and A's pages receive B's bytes. Test: test_a_write_that_may_not_have_ended_keeps_its_slot.

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
_CHUNK_BYTES = 1 << 20  # scattered under one hold of the lock, for which a revoke waits


class PackServer:
    """The server that leases `slots` staging slots of `slot_bytes` each, the first of which starts at `address`.

    `quiet(source)` returns True if it is proven that the source is dead and none of its bytes is in flight; it may
    block for a second. Methods may be called from any thread.
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
        self.wait_s = 1.0  # how long a WAIT may last before the reply is BUSY
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
        """The errors that ended connections, the newest last."""
        return self._listener.recent_errors

    @property
    def sessions(self) -> list[PackSession]:
        """The connections that have not ended, the oldest first."""
        return self._listener.connections()

    def audit(self) -> dict[str, int]:
        """Count leased and quarantined slots, and the sources that wait for one."""
        with self._changed:
            return {"leased": self._slots.leased, "quarantined": self._slots.quarantined, "waiting": self._waiting}

    def revoke(self, grant: bytes) -> None:
        """Return when nothing is unpacked under the grant any longer. Take the grant back before: see rule 8."""
        with self._changed:
            self._slots.revoke(grant)
        for session in self.sessions:
            session.pause()

    def expel(self, source: bytes) -> None:
        """End this source's connections and quarantine its slots. Once this returns, nothing is unpacked for it."""
        for session in self.sessions:
            if session.source == source:
                self._listener.drop(session)

    def quiet(self, source: bytes) -> None:
        """Free the slots of a source that has no write in flight. Call `expel` before: see rule 6."""
        with self._changed:
            self._slots.quiet(source)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop listening and end all connections. Once this returns, nothing more is unpacked."""
        self._listener.stop()
        with self._changed:
            self._changed.notify_all()
        self._listener.close()

    def greeted(self, session: PackSession, source: bytes) -> None:
        """Admit a source that has connected, so that no write of it is in flight: end its older leases."""
        self.expel(source)
        session.source = source  # after `expel`, which would end this session as well
        self.quiet(source)

    def lease(self, session: PackSession, grant: bytes, wait: bool) -> int | None:
        """Lease a slot and return its number; None if none is free now or, with `wait`, within `wait_s`."""
        source = session.source
        with self._changed:
            if self._slots.held(session) >= MAX_LEASES:
                return None
            if wait and not self._slots.free:
                owners = self._slots.owners
                # The proof may take a second, so it is asked for without the lock: a revoke must not wait for it.
                self._changed.release()
                try:
                    proven = [owner for owner in owners if self._proven_quiet(owner)]
                finally:
                    self._changed.acquire()
                # Without `expel`: a dead writer's last UNPACK may still be read from a slot that is freed here. Its
                # room fails in any case, because the writer can no longer report that all bytes have landed.
                for owner in proven:
                    self._slots.quiet(owner)
                self._waiting += 1
                self._changed.wait_for(lambda: self._slots.free or self._listener.closing, self.wait_s)
                self._waiting -= 1
            # A session that has ended has left the listener before `_lost` takes this lock to quarantine its slots. So
            # a slot that is leased here is either in use, or `_lost` is still to come. See rule 7.
            return None if session not in self._listener else self._slots.lease(source, session, grant)

    def end(self, session: PackSession, slot: int) -> None:
        """Free a slot whose write is over and whose bytes were unpacked or refused."""
        with self._changed:
            self._slots.end(slot, session)
            self._changed.notify_all()

    def holds(self, session: PackSession, slot: int) -> bool:
        """Return True if this connection leases the slot."""
        with self._changed:
            return self._slots.find(slot, session) is not None

    def check(self, session: PackSession, request: PackRequest, dst: U64, length: U64) -> None:
        """Raise `TransportError` unless all blocks fit into a slot and this source may write them under the grant."""
        most = self.area.slot_bytes
        if not length.all() or int(length.max()) > most or int(length.sum()) > most:
            raise TransportError(f"invalid UNPACK: a block is empty, or all exceed the {most} bytes of a slot")
        self._admission.check(session.source, request.grant, dst, length)

    def _lost(self, session: PackSession) -> None:
        """Quarantine the slots that a connection leased which has ended."""
        with self._changed:
            self._slots.lost(session)
            self._changed.notify_all()


class PackSession(InboundConnection):
    """One accepted connection and the thread that serves it."""

    def __init__(self, connection: socket.socket, server: PackServer, admission: WriterAdmission) -> None:
        super().__init__(connection, admission, "kvroom-unpack")
        self._pack_server = server

    def pause(self) -> None:
        """Return when the chunk that is being unpacked is complete. The next one checks the grant again."""
        with self._lock:
            return

    def greeted(self, source: bytes) -> None:
        self._pack_server.greeted(self, source)

    def serve(self) -> None:
        while raw := self._exactly(protocol.REQUEST.size, at_border=True):
            self._socket.sendall(self._answered(protocol.read_request(raw)))

    def _answered(self, asked: PackRequest) -> bytes:
        """Carry out a request; return the encoded reply."""
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
                    self._admission.log_foreign(self._host, error)
        # Before the reply, so that a source that has its reply finds the slot free; after the scatter: see rule 3.
        self._pack_server.end(self, asked.slot)
        return protocol.reply(asked.number, verdict, text=text)

    def _unpack(self, asked: PackRequest, dst: U64, length: U64) -> None:
        self._pack_server.check(self, asked, dst, length)
        start = self._pack_server.area.address + asked.slot * self._pack_server.area.slot_bytes
        for first, last in gather.chunks(length, _CHUNK_BYTES):
            nbytes = int(length[first:last].sum())
            with self._lock:  # for one chunk at a time, because `revoke` waits for it
                if self._ending:
                    raise RemoteProtocolError("closed while a slot was being unpacked")
                if not self._admission.is_open(asked.grant):
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
