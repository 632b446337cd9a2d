"""Packing, step by step: an engine whose writes land when the test decides, and sinks that the test calls directly."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from packing_helpers import Gated, idle, met, one, pieces, side
from transport_helpers import Side, wait_until

from kvroom.errors import ConfigurationError, GrantRevoked, KVRoomError, TransportError
from kvroom.plan.blocks import U64, Extents, MemoryRange
from kvroom.transports.kit import data_handshake, gather
from kvroom.transports.kit.data_keys import DataKey
from kvroom.transports.kit.data_socket import STRANGERS
from kvroom.transports.kit.gather import ByteRuns
from kvroom.transports.onesided import kernel_tcp, work
from kvroom.transports.onesided import transport as onesided
from kvroom.transports.onesided.packing import protocol
from kvroom.transports.onesided.packing.client import PackClient
from kvroom.transports.onesided.packing.server import PackServer, PackSession

Pair = tuple[Side[Gated], Side[Gated], int]
Rivals = tuple[Side[Gated], Side[Gated], Side[Gated], PackServer]
LIMIT_S = 10.0


@pytest.fixture
def pair() -> Iterator[Pair]:
    with side(1) as source, side(2) as sink:
        yield source, sink, met(source, sink)
        source.transport.engine.gate.set()


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rivals]:
    """Two sources and a sink with one slot for both, and the sink's pack server."""
    monkeypatch.setattr(onesided, "SLOTS", 1)
    with side(1) as first, side(3) as other, side(2) as sink:
        met(first, sink)
        met(other, sink)
        server = sink.transport._pack_server
        assert server is not None
        yield first, other, sink, server


@contextmanager
def held_scatter(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event, list[int]]]:
    """Hold scatters: (one has begun, go on, the sizes of all that have ended)."""
    begun, go_on, ended, real = threading.Event(), threading.Event(), list[int](), gather.scatter

    def scatter(packed: gather.Bytes, address: U64, length: U64) -> None:
        begun.set()
        assert go_on.wait(LIMIT_S)
        real(packed, address, length)
        ended.append(packed.size)

    monkeypatch.setattr(gather, "scatter", scatter)
    try:
        yield begun, go_on, ended
    finally:
        go_on.set()


def sessions(sink: Side[Gated]) -> list[PackSession]:
    assert sink.transport._pack_server is not None
    return sink.transport._pack_server.sessions


def cut(sink: Side[Gated]) -> None:
    """Break the connections before either side has sent anything."""
    for session in sessions(sink):
        session._socket.shutdown(socket.SHUT_RDWR)


def client(source: Side[Gated], sink: Side[Gated]) -> PackClient:
    """Return a client of the sink's pack server, to be used by the test as this source."""
    area = sink.transport._described.area if sink.transport._described else None
    assert area is not None
    return PackClient("by hand", source.transport.key.shared_with(sink.transport.endpoint), area)


def test_small_blocks_travel_as_one_and_large_ones_as_they_are(pair: Pair) -> None:
    source, sink, peer = pair
    few, written = pieces(source, sink), source.transport.engine.written
    assert source.transport.submit(peer, few, sink.grant()).result(LIMIT_S) == few.nbytes
    assert [batch.blocks.length.tolist() for batch in written] == [[few.nbytes]]
    assert (sink.bytes[: few.nbytes] == 1).all()
    assert (sink.bytes[few.nbytes :] == 2).all()
    written.clear()
    large = pieces(source, sink, 300, 16 << 10)
    source.transport.submit(peer, large, sink.grant()).result(LIMIT_S)
    assert [batch.blocks.length.size for batch in written] == [300]
    assert idle(source, sink)


def test_blocks_longer_than_a_slot_are_packed_if_one_insists() -> None:
    with side(1, packing="always", staging_bytes=1 << 20) as source, side(2) as sink:
        blocks = pieces(source, sink, 3, 1 << 20)
        peer = met(source, sink)
        assert source.transport.submit(peer, blocks, sink.grant()).result(LIMIT_S) == blocks.nbytes
        assert (sink.bytes[: blocks.nbytes] == 1).all()
        assert len(source.transport.engine.written) == 48  # of 64 KiB


def test_a_lease_is_counted_and_ends_with_the_answer(pair: Pair) -> None:
    source, sink, peer = pair
    source.transport.engine.gate.clear()
    transfer = source.transport.submit(peer, pieces(source, sink), sink.grant())
    wait_until(lambda: sink.transport.staging_slots()["leased"] == 1)
    assert source.transport.staging_slots()["packing"] == 1
    source.transport.engine.gate.set()
    assert transfer.result(LIMIT_S)
    assert idle(source, sink)


def test_a_transfer_is_done_when_the_scatter_has_ended(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    source, sink, peer = pair
    with held_scatter(monkeypatch) as (begun, go_on, ended):
        transfer = source.transport.submit(peer, pieces(source, sink, gap=8), sink.grant())
        transfer.add_done_callback(lambda _: ended.append(0))
        assert begun.wait(LIMIT_S)
        assert not transfer.done()
        assert sink.transport.staging_slots()["leased"] == 1
        go_on.set()
        assert transfer.result(LIMIT_S)
    assert ended == [1 << 20, 1 << 20, 0]


def test_a_cut_connection_quarantines_the_slot_until_the_writer_is_quiet(pair: Pair) -> None:
    source, sink, peer = pair
    source.transport.engine.gate.clear()
    transfer = source.transport.submit(peer, pieces(source, sink), sink.grant())
    wait_until(lambda: sink.transport.staging_slots()["leased"] == 1)
    cut(sink)
    wait_until(lambda: sink.transport.staging_slots()["quarantined"] == 1)
    assert sink.transport.staging_slots()["leased"] == 0
    assert not sink.transport.fence(sink.transport.connect(source.transport.describe()))  # it lives: no proof
    assert sink.transport.staging_slots()["quarantined"] == 1
    met(source, sink)
    source.transport.engine.gate.set()
    with pytest.raises(TransportError, match="pack server"):
        transfer.result(LIMIT_S)
    wait_until(lambda: idle(source, sink))
    assert (sink.bytes == 2).all()
    assert source.transport.submit(peer, pieces(source, sink), sink.grant()).result(LIMIT_S)


def test_a_quarantined_slot_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late write may still come into the only slot, so another source goes block by block."""
    monkeypatch.setattr(onesided, "SLOTS", 1)
    with side(1) as slow, side(3) as other, side(2) as sink:
        peers = [met(source, sink) for source in (slow, other)]
        assert sink.transport._pack_server is not None
        sink.transport._pack_server.wait_s = 0.05
        slow.transport.engine.gate.clear()
        late = slow.transport.submit(peers[0], pieces(slow, sink), sink.grant())
        wait_until(lambda: sink.transport.staging_slots()["leased"] == 1)
        cut(sink)
        wait_until(lambda: sink.transport.staging_slots()["quarantined"] == 1)
        blocks = pieces(other, sink)
        assert other.transport.submit(peers[1], blocks, sink.grant()).result(LIMIT_S) == blocks.nbytes
        assert other.transport.engine.written[0].blocks.length.size > 100
        assert (sink.bytes[: blocks.nbytes] == 3).all()
        slow.transport.engine.gate.set()
        assert late.exception(LIMIT_S) is not None
        wait_until(lambda: idle(slow, other, sink))
        assert (sink.bytes[: blocks.nbytes] == 3).all()


def test_a_revoke_while_a_slot_is_written_refuses_what_comes(pair: Pair) -> None:
    source, sink, peer = pair
    source.transport.engine.gate.clear()
    grant = sink.grant()
    transfer = source.transport.submit(peer, pieces(source, sink), grant)
    wait_until(lambda: sink.transport.staging_slots()["leased"] == 1)
    assert not sink.transport.revoke(grant)  # the same peer could write directly
    assert sink.transport.staging_slots() == {"leased": 0, "quarantined": 1, "waiting": 0, "packing": 0}
    source.transport.engine.gate.set()
    with pytest.raises(GrantRevoked, match="gated: the peer refused the transfer"):
        transfer.result(LIMIT_S)
    assert idle(source, sink)
    assert (sink.bytes == 2).all()


def test_a_revoke_waits_for_the_scatter_under_way_and_ends_what_follows(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, sink, peer = pair
    grant, returned = sink.grant(), threading.Event()

    def revoke() -> None:
        sink.transport.revoke(grant)
        returned.set()

    with held_scatter(monkeypatch) as (begun, go_on, ended):
        transfer = source.transport.submit(peer, pieces(source, sink, gap=8), grant)
        assert begun.wait(LIMIT_S)
        revoking = threading.Thread(target=revoke)
        revoking.start()
        wait_until(lambda: grant not in sink.transport._grants)
        assert not returned.wait(0.1)
        go_on.set()
        revoking.join(LIMIT_S)
        assert ended == [1 << 20]
        with pytest.raises(GrantRevoked, match="before all was unpacked"):
            transfer.result(LIMIT_S)
    assert ended == [1 << 20]
    assert idle(source, sink)


def test_a_fence_ends_what_is_being_unpacked(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    source, sink, peer = pair
    handle, returned = sink.transport.connect(source.transport.describe()), threading.Event()

    def fence() -> None:
        assert not sink.transport.fence(handle)
        returned.set()

    with held_scatter(monkeypatch) as (begun, go_on, ended):
        transfer = source.transport.submit(peer, pieces(source, sink, gap=8), sink.grant())
        assert begun.wait(LIMIT_S)
        fencing = threading.Thread(target=fence)
        fencing.start()
        assert not returned.wait(0.1)
        go_on.set()
        fencing.join(LIMIT_S)
        assert returned.is_set()
        assert transfer.exception(LIMIT_S) is not None
    assert ended == [1 << 20]
    # The source is not admitted again, so it cannot report that it has stopped.
    assert sink.transport.staging_slots()["quarantined"] == 1
    met(source, sink)
    assert source.transport.submit(peer, pieces(source, sink, 100), sink.grant()).result(LIMIT_S)


def test_a_source_that_is_fenced_while_it_waits_gets_no_slot(rivals: Rivals) -> None:
    """It would be leased to a connection that has ended, and stay in quarantine after every proof."""
    first, other, sink, server = rivals
    server.wait_s = LIMIT_S
    holding, waiting = client(first, sink), client(other, sink)
    assert holding.ready()
    slot = holding.reply(holding.ask(protocol.LEASE, 0, bytes(16))).slot
    assert waiting.ready()
    waiting.ask(protocol.WAIT, 0, bytes(16))
    wait_until(lambda: sink.transport.staging_slots()["waiting"] == 1)
    (session,) = (each for each in server.sessions if each.source == other.transport.endpoint)
    assert not sink.transport.fence(sink.transport.connect(other.transport.describe()))
    holding.ask(protocol.RELEASE, slot, bytes(16))
    holding.settle()
    session.join(LIMIT_S)
    assert idle(sink)
    waiting.close()
    holding.close()


@pytest.mark.parametrize(("dead", "verdict"), [(True, protocol.DONE), (False, protocol.BUSY)])
def test_a_source_that_waits_gets_the_slot_of_a_writer_that_is_proven_dead(
    dead: bool, verdict: int, rivals: Rivals
) -> None:
    gone, other, sink, server = rivals
    server.wait_s = 0.05
    server._proven_quiet = lambda source: dead and source == gone.transport.endpoint
    holding, waiting = client(gone, sink), client(other, sink)
    assert holding.ready()
    assert holding.reply(holding.ask(protocol.LEASE, 0, bytes(16))).verdict == protocol.DONE
    cut(sink)
    wait_until(lambda: sink.transport.staging_slots()["quarantined"] == 1)
    assert waiting.ready()
    assert waiting.reply(waiting.ask(protocol.WAIT, 0, bytes(16))).verdict == verdict
    assert sink.transport.staging_slots()["quarantined"] == (not dead)
    waiting.close()
    holding.close()


def test_a_write_that_fails_gives_its_slots_back(pair: Pair) -> None:
    source, sink, peer = pair
    source.transport.engine.fails = "the engine has had enough"
    with pytest.raises(TransportError, match="had enough"):
        source.transport.submit(peer, pieces(source, sink, 8000, 1024), sink.grant()).result(LIMIT_S)
    assert idle(source, sink)
    assert source.transport.submit(peer, pieces(source, sink), sink.grant()).result(LIMIT_S)


def test_a_write_that_may_not_have_ended_keeps_its_slot(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine gave up, and its bytes may be in flight: no other source gets the slot, and the future waits."""
    source, sink, peer = pair
    monkeypatch.setattr(work, "_SETTLE_S", 0.0)
    monkeypatch.setattr(kernel_tcp, "unsent", lambda _: True)
    source.transport.engine.fails = "given up"
    transfer = source.transport.submit(peer, pieces(source, sink), sink.grant())
    wait_until(lambda: sink.transport.staging_slots()["quarantined"] == 1)
    assert source.transport.staging_slots()["packing"] == 1
    assert not transfer.done()
    with pytest.raises(TransportError, match="may still be in flight"):
        source.transport.submit(peer, pieces(source, sink), sink.grant()).result(LIMIT_S)
    assert sink.transport.staging_slots()["quarantined"] == 1
    assert source.transport.staging_slots()["packing"] == 1  # also now that the worker has returned from the first one
    source.transport.close()
    with pytest.raises(TransportError, match="given up"):
        transfer.result(LIMIT_S)


def test_an_unpack_outside_the_grant_is_refused(pair: Pair) -> None:
    source, sink, peer = pair
    blocks = pieces(source, sink)
    grant = sink.transport.grant(Extents(one(sink.pool.address), one(blocks.nbytes - 1)))
    sink.transport.bind(grant, sink.transport.connect(source.transport.describe()))
    with pytest.raises(TransportError, match="lies outside the memory that was granted"):
        source.transport.submit(peer, blocks, grant).result(LIMIT_S)
    assert (sink.bytes == 2).all()
    assert idle(source, sink)
    with pytest.raises(GrantRevoked, match="never issued"):
        source.transport.submit(peer, blocks, bytes(16)).result(LIMIT_S)


def test_small_blocks_under_a_grant_of_another_are_refused(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """A third peer with a key of its own has overheard the grant. The sink logs that, too."""
    source, sink, peer = pair
    with side(3) as other:
        there = met(other, sink)
        grant = sink.grant(sink.transport.connect(source.transport.describe()))
        with pytest.raises(TransportError, match="the grant was not offered to this writer"):
            other.transport.submit(there, pieces(other, sink), grant).result(LIMIT_S)
        assert (sink.bytes == 2).all()
        assert "gated: refused a write by the peer at 127.0.0.1: the grant was not offered" in caplog.text
        assert idle(other, sink)
        assert source.transport.submit(peer, pieces(source, sink), grant).result(LIMIT_S)


def test_a_door_admits_no_peer_in_the_name_of_another(pair: Pair) -> None:
    """Otherwise that peer could free the quarantine of the other one, and end its connections."""
    source, sink, _ = pair
    with side(3) as other:
        met(other, sink)
        area = client(source, sink).area
        key = other.transport.key.shared_with(sink.transport.endpoint)
        with socket.create_connection((area.host, area.port), timeout=LIMIT_S) as raw:
            hello = data_handshake.HELLO.pack(
                data_handshake.MAGIC, source.transport.endpoint, sink.transport.endpoint, bytes(32)
            )
            raw.sendall(hello)
            nonce = raw.recv(data_handshake.CHALLENGE.size, socket.MSG_WAITALL)[:32]
            raw.sendall(key.proof(b"source", hello + nonce))
            assert raw.recv(1) == b""
        wait_until(lambda: not sessions(sink))


def test_a_source_that_connects_again_waits_until_its_older_connection_has_ended(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would report its transfer as over while the sink still unpacks it."""
    source, sink, _ = pair
    older, newer, returned = client(source, sink), client(source, sink), threading.Event()
    grant = sink.grant()

    def dial() -> None:
        assert newer.ready()
        returned.set()

    assert older.ready()
    with held_scatter(monkeypatch) as (begun, go_on, ended):
        slot = older.reply(older.ask(protocol.LEASE, 0, grant)).slot
        older.ask(protocol.UNPACK, slot, grant, ByteRuns(one(sink.pool.address), one(16)))
        assert begun.wait(LIMIT_S)
        older.close()
        dialling = threading.Thread(target=dial)
        dialling.start()
        assert not returned.wait(0.1)
        assert sink.transport.staging_slots()["leased"] == 1
        go_on.set()
        dialling.join(LIMIT_S)
        assert returned.is_set()
        assert ended == [16]
    assert idle(sink)
    newer.close()


def test_what_a_door_refuses(pair: Pair) -> None:
    source, sink, _ = pair
    grant, where = sink.grant(), one(sink.pool.address)
    asking = client(source, sink)
    assert asking.ready()
    asking.ask(protocol.UNPACK, 3, grant, ByteRuns(where, one(16)))
    with pytest.raises(TransportError, match="slot 3 is not leased to the writer"):
        asking.settle()
    slots = [asking.reply(asking.ask(protocol.LEASE, 0, grant)) for _ in range(3)]
    assert [answer.verdict for answer in slots] == [protocol.DONE, protocol.DONE, protocol.BUSY]
    for length, text in ((asking.area.slot_bytes + 1, "exceed the 4194304 bytes of a slot"), (0, "is empty")):
        asking.ask(protocol.UNPACK, slots.pop(0).slot, grant, ByteRuns(where, one(length)))
        with pytest.raises(TransportError, match=text):
            asking.settle()
    assert idle(sink)
    many = np.zeros(protocol.MAX_BLOCKS + 1, np.uint64)
    with pytest.raises(TransportError, match="pack server failed"):  # noqa: PT012 - it may be closed before all is sent
        asking.ask(protocol.UNPACK, 0, grant, ByteRuns(many, many))
        asking.settle()
    assert not asking.connected
    assert idle(sink)


def test_a_door_lets_nobody_in_who_has_no_key_or_is_not_known() -> None:
    with side(1) as source, side(2) as sink:
        stranger = client(source, sink)
        assert sink.transport._pack_server is not None
        sink.transport.connect(source.transport.describe())
        stranger._key = DataKey(source.transport.endpoint, sink.transport.endpoint, bytes(32))
        assert not stranger.ready()
        assert "does not answer" in stranger.error
        assert not stranger.ready()  # not retried immediately
        unknown = client(sink, sink)  # an endpoint that this side has not connected to
        assert not unknown.ready()
        wait_until(lambda: not sessions(sink))
        assert "has not connected" in " ".join(sink.transport._pack_server.recent_errors)


def test_silent_connections_keep_no_source_out_of_a_pack_server(pair: Pair) -> None:
    """The oldest of them is closed for each new one, and small blocks are still packed."""
    source, sink, peer = pair
    area = client(source, sink).area
    with ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection((area.host, area.port), timeout=LIMIT_S)) for _ in range(300)
        ]
        blocks = pieces(source, sink)
        assert source.transport.submit(peer, blocks, sink.grant()).result(LIMIT_S) == blocks.nbytes
        assert [batch.blocks.length.tolist() for batch in source.transport.engine.written] == [[blocks.nbytes]]
        assert silent[0].recv(1) == b""
        assert len(sessions(sink)) <= STRANGERS + 1


def test_without_a_door_that_answers_blocks_go_one_by_one(pair: Pair) -> None:
    source, sink, peer = pair
    assert sink.transport._pack_server is not None
    sink.transport._pack_server.close()
    blocks = pieces(source, sink)
    assert source.transport.submit(peer, blocks, sink.grant()).result(LIMIT_S) == blocks.nbytes
    assert (sink.bytes[: blocks.nbytes] == 1).all()
    assert "one by one" in source.transport.explain(peer)


def test_an_idle_connection_that_the_sink_ended_is_dialled_again(pair: Pair) -> None:
    source, sink, peer = pair
    blocks = pieces(source, sink)
    source.transport.submit(peer, blocks, sink.grant()).result(LIMIT_S)
    cut(sink)
    wait_until(lambda: not sessions(sink))
    assert source.transport.submit(peer, blocks, sink.grant()).result(LIMIT_S) == blocks.nbytes


def test_memory_that_a_peer_may_still_write_outlives_its_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    monkeypatch.setattr(onesided, "_kept", kept)
    with side(1) as source, side(2) as sink, side(3) as other:
        peer = met(source, sink)
        source.transport.engine.gate.clear()
        transfer = source.transport.submit(peer, pieces(source, sink), sink.grant())
        wait_until(lambda: sink.transport.staging_slots()["leased"] == 1)
        staging_slots = sink.transport._staging
        other.transport.close()
        assert not kept
        sink.transport.close()
        assert kept == [staging_slots]
        source.transport.engine.gate.set()
        with pytest.raises(TransportError):
            transfer.result(LIMIT_S)


def test_packing_can_be_forbidden_and_needs_host_memory() -> None:
    for options in ({"packing": "never"}, {"staging_bytes": 0}):
        with side(1, **options) as source, side(2) as sink:
            assert source.grant() == b""
            assert source.transport.staging_slots() == {}
            assert len(source.transport.engine.memory) == 1
            blocks = pieces(source, sink)
            assert source.transport.submit(met(source, sink), blocks, sink.grant()).result(LIMIT_S) == blocks.nbytes
            assert idle(sink)
    with_gpu = Gated()
    with_gpu.register([MemoryRange(1 << 40, 4096, "cuda:0")])
    assert with_gpu.staging_slots() == {}
    with_gpu.close()


@pytest.mark.parametrize("options", [{"packing": "sometimes"}, {"staging_bytes": 4096}])
def test_settings_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=r"packing='sometimes'|staging_bytes=4096"):
        side(1, **options)


def test_garbage_at_the_door_ends_the_connection_only(pair: Pair) -> None:
    source, sink, peer = pair
    asking = client(source, sink)
    for raw in (
        protocol.REQUEST.pack(9, 1, 0, bytes(16), 0),
        protocol.REQUEST.pack(protocol.LEASE, 1, 0, bytes(16), 5),
    ):
        with pytest.raises(KVRoomError, match="blocks: the limit is"):
            protocol.read_request(raw)
        assert asking.ready()
        assert asking._socket is not None
        asking._socket.sendall(raw)
        wait_until(lambda: not sessions(sink))
    asking.close()
    blocks = pieces(source, sink)
    assert source.transport.submit(peer, blocks, sink.grant()).result(LIMIT_S) == blocks.nbytes
