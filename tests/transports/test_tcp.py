"""`tcp` beyond the conformance suite: a raw socket plays peers that are slow, silent, hostile or broken."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import msgspec
import numpy as np
import pytest
from transport_helpers import NBYTES, Side, block, wait_until

from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import Extents
from kvroom.transports.base import MalformedDescription
from kvroom.transports.kit import data_handshake
from kvroom.transports.kit.data_keys import InstanceKey
from kvroom.transports.kit.data_socket import STRANGERS
from kvroom.transports.kit.gather import ByteRuns
from kvroom.transports.kit.ranges import u64
from kvroom.transports.tcp import TcpOptions, TcpTransport, frames
from resolving import BOTH, needs_ipv6, resolver


@pytest.fixture
def source() -> Iterator[Side[TcpTransport]]:
    with Side(TcpTransport(), fill=7) as side:
        yield side


@pytest.fixture
def sink() -> Iterator[Side[TcpTransport]]:
    with Side(TcpTransport(TcpOptions(introduction_s=0.1, handshake_s=0.2)), fill=1) as side:
        yield side


def meet(source: Side[TcpTransport], sink: Side[TcpTransport]) -> tuple[int, int]:
    there = source.transport.connect(sink.transport.describe())
    return there, sink.transport.connect(source.transport.describe())


def dial(sink: Side[TcpTransport], source: Side[TcpTransport] | None = None) -> socket.socket:
    """Connect a raw socket, and shake hands as `source` if it is given."""
    description = frames.checked(sink.transport.describe())
    connection = socket.create_connection((description.host, description.port), timeout=10)
    if source is not None:
        data_handshake.greet(connection, source.transport.key.shared_with(description.endpoint), 10)
        connection.settimeout(10)
    return connection


def read_ack(connection: socket.socket) -> tuple[int, str]:
    number, _, size = frames.ACK.unpack(connection.recv(frames.ACK.size, socket.MSG_WAITALL))
    return number, connection.recv(size, socket.MSG_WAITALL).decode() if size else ""


def ended(connection: socket.socket) -> bool:
    """Wait for the peer's end of the connection, which is a reset if the peer leaves bytes unread."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def frame(sink: Side[TcpTransport], nbytes: int, grant: bytes, number: int = 1) -> bytes:
    """Return the head of a frame of one block at the beginning of the sink's pool."""
    return frames.frame_head(number, grant, ByteRuns(u64([sink.pool.address]), u64([nbytes])))


def test_revoke_in_the_middle_of_a_frame_is_proof(source: Side[TcpTransport], sink: Side[TcpTransport]) -> None:
    meet(source, sink)
    grant = sink.grant()
    with dial(sink, source) as raw:
        raw.sendall(frame(sink, 1000, grant) + b"\x09" * 500)
        wait_until(lambda: bool((sink.bytes[:500] == 9).all()))
        assert sink.transport.revoke(grant)
        before = sink.bytes.copy()
        raw.sendall(b"\x09" * 500)
        number, refusal = read_ack(raw)
        assert number == 1
        assert "revoked" in refusal
        assert np.array_equal(sink.bytes, before)
        again = sink.grant()  # the same connection stays usable
        raw.sendall(frame(sink, 1000, again, number=2) + b"\x0a" * 1000)
        assert read_ack(raw) == (2, "")
        assert (sink.bytes[:1000] == 10).all()


def test_fence_in_the_middle_of_a_frame_is_proof(source: Side[TcpTransport], sink: Side[TcpTransport]) -> None:
    _, to_source = meet(source, sink)
    with dial(sink, source) as raw:
        raw.sendall(frame(sink, 1000, sink.grant()) + b"\x09" * 500)
        wait_until(lambda: bool((sink.bytes[:500] == 9).all()))
        assert sink.transport.fence(to_source)
        before = sink.bytes.copy()
        with pytest.raises(OSError):  # noqa: PT012 - the first send may still be taken by the kernel
            while True:
                raw.sendall(b"\x09" * 100)
        assert np.array_equal(sink.bytes, before)


def test_a_frame_arrives_byte_by_byte(source: Side[TcpTransport], sink: Side[TcpTransport]) -> None:
    meet(source, sink)
    with dial(sink, source) as raw:
        for byte in frame(sink, 20, sink.grant()) + bytes(range(20)):
            raw.sendall(bytes([byte]))
        assert read_ack(raw) == (1, "")
    assert sink.bytes[:20].tolist() == list(range(20))
    assert (sink.bytes[20:] == 1).all()


@pytest.mark.parametrize(
    "head",
    [
        frames.HEADER.pack(1, frames.MAX_BLOCKS + 1, 1, bytes(16)),
        frames.HEADER.pack(1, 1, frames.MAX_BYTES + 1, bytes(16)),
        frames.HEADER.pack(1, 0, 0, bytes(16)),
        frames.HEADER.pack(1, 1, 5, bytes(16)) + u64([4096, 6]).tobytes(),
        frames.HEADER.pack(1, 2, 0, bytes(16)) + u64([4096, 4096, 2**63, 2**63]).tobytes(),
        b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n",
    ],
)
def test_a_frame_over_the_limits_ends_the_connection(
    source: Side[TcpTransport], sink: Side[TcpTransport], head: bytes
) -> None:
    meet(source, sink)
    with dial(sink, source) as raw:
        raw.sendall(head)
        assert ended(raw)
    assert (sink.bytes == 1).all()
    wait_until(lambda: any(error.startswith("tcp: ") for error in sink.transport.recent_errors))


def test_a_writer_that_the_sink_has_not_met_is_refused(source: Side[TcpTransport], sink: Side[TcpTransport]) -> None:
    there = source.transport.connect(sink.transport.describe())
    with pytest.raises(TransportError, match="has not connected"):
        source.transport.submit(there, block(source, sink, 100), sink.grant()).result(10)
    assert (sink.bytes == 1).all()


def test_a_writer_may_be_faster_than_the_sink_s_own_connect(source: Side[TcpTransport]) -> None:
    with Side(TcpTransport(TcpOptions(introduction_s=30)), fill=1) as sink, ThreadPoolExecutor(1) as other_thread:
        dialling = other_thread.submit(dial, sink, source)
        wait_until(lambda: bool(sink.transport._listener.connections()))
        sink.transport.connect(source.transport.describe())
        with dialling.result(10) as raw:
            raw.sendall(frame(sink, 100, sink.grant()) + bytes(100))
            assert read_ack(raw) == (1, "")


def say_hello(raw: socket.socket, source: Side[TcpTransport], sink: Side[TcpTransport]) -> tuple[bytes, bytes]:
    """Begin a handshake in the name of `source`; return the transcript that its proof signs, and the sink's proof."""
    hello = data_handshake.HELLO.pack(
        data_handshake.MAGIC, source.transport.endpoint, sink.transport.endpoint, bytes(32)
    )
    raw.sendall(hello)
    nonce, proof = data_handshake.CHALLENGE.unpack(raw.recv(data_handshake.CHALLENGE.size, socket.MSG_WAITALL))
    return hello + nonce, proof


def is_refused(raw: socket.socket, sink: Side[TcpTransport]) -> bool:
    wait_until(lambda: any("does not have the key of the peer" in error for error in sink.transport.recent_errors))
    return ended(raw) and bool((sink.bytes == 1).all())


def test_a_wrong_key_is_refused(source: Side[TcpTransport], sink: Side[TcpTransport]) -> None:
    """A process that has both descriptions is accepted neither as the source nor as the sink."""
    sink.transport.connect(source.transport.describe())
    with dial(sink) as raw:
        say_hello(raw, source, sink)
        raw.sendall(bytes(32))
        assert is_refused(raw, sink)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        described = frames.checked(sink.transport.describe())
        forged = msgspec.structs.replace(described, port=listener.getsockname()[1])
        there = source.transport.connect(msgspec.msgpack.encode(forged))
        transfer = source.transport.submit(there, block(source, sink, 100), sink.grant())
        connection, _ = listener.accept()
        with connection:
            connection.recv(data_handshake.HELLO.size, socket.MSG_WAITALL)
            connection.sendall(bytes(range(64)))
            with pytest.raises(TransportError, match="does not have the peer's key"):
                transfer.result(10)


def test_a_recorded_handshake_opens_no_second_connection(source: Side[TcpTransport], sink: Side[TcpTransport]) -> None:
    meet(source, sink)
    key = source.transport.key.shared_with(sink.transport.endpoint)
    with dial(sink) as first, dial(sink) as second:
        recorded = key.proof(b"source", say_hello(first, source, sink)[0])
        first.sendall(recorded)
        assert first.recv(1) == data_handshake.WELCOME
        say_hello(second, source, sink)
        second.sendall(recorded + frame(sink, 8, sink.grant()) + bytes(8))
        assert is_refused(second, sink)


def test_the_sink_s_own_proof_sent_back_is_refused(source: Side[TcpTransport], sink: Side[TcpTransport]) -> None:
    meet(source, sink)
    with dial(sink) as raw:
        raw.sendall(say_hello(raw, source, sink)[1])
        assert is_refused(raw, sink)


def test_a_peer_cannot_take_the_place_of_another(source: Side[TcpTransport], sink: Side[TcpTransport]) -> None:
    """It is linked and has a data key of its own, and claims to be the other one."""
    with Side(TcpTransport(), fill=3) as other:
        meet(source, sink)
        meet(other, sink)
        key = other.transport.key.shared_with(sink.transport.endpoint)
        with dial(sink) as raw:
            raw.sendall(key.proof(b"source", say_hello(raw, source, sink)[0]))
            assert is_refused(raw, sink)


def test_a_grant_is_of_no_use_to_a_peer_that_overheard_it(
    source: Side[TcpTransport], sink: Side[TcpTransport], caplog: pytest.LogCaptureFixture
) -> None:
    """It has a link and a data key of its own. Both sides learn of it; the peer that was offered the pages goes on."""
    with Side(TcpTransport(), fill=3) as other:
        there, back = meet(source, sink)
        grant = sink.grant(back)
        beside, other_back = meet(other, sink)
        for nbytes in (100, NBYTES):
            with pytest.raises(TransportError, match="refused the transfer: the grant was not offered to this writer"):
                other.transport.submit(beside, block(other, sink, nbytes), grant).result(10)
        assert (sink.bytes == 1).all()
        assert "tcp: refused a write by the peer at 127.0.0.1: the grant was not offered" in caplog.text
        assert source.transport.submit(there, block(source, sink, 100), grant).result(10) == 100
        sink.transport.bind(grant, other_back)  # it was offered to both
        assert other.transport.submit(beside, block(other, sink, 100, at=500), grant).result(10) == 100
        assert source.transport.submit(there, block(source, sink, 100, at=900), grant).result(10) == 100


P = 2**255 - 19
LOW_ORDER = (  # the y of each of the 8 points whose order divides 8, and some of them over the prime
    0,
    1,
    2707385501144840649318225287225658788936804267575313519463743609750303402022,
    55188659117513257062467267217118295137698188065244968500265048394206261417927,
    P - 1,
    P,
    P + 1,
    2**255,  # the highest bit is the sign of x
    2**255 + P,
)


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_public_key_of_low_order_is_malformed(source: Side[TcpTransport], point: int) -> None:
    described = frames.TcpDescription("127.0.0.1", 9, point.to_bytes(32, "little"))
    with pytest.raises(MalformedDescription, match="a public key of low order"):
        source.transport.connect(msgspec.msgpack.encode(described))


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_public_key_of_another_size_is_malformed(source: Side[TcpTransport], size: int) -> None:
    described = frames.TcpDescription("127.0.0.1", 9, b"k" * size)
    with pytest.raises(MalformedDescription, match="public key of the wrong size"):
        source.transport.connect(msgspec.msgpack.encode(described))


def test_a_data_key_is_of_two_instances_and_the_same_at_both() -> None:
    one, other, third = (InstanceKey("tcp") for _ in range(3))
    proof = one.shared_with(other.public).proof(b"source", b"said")
    assert other.shared_with(one.public).is_proven(proof, b"source", b"said")
    assert not other.shared_with(one.public).is_proven(proof, b"sink", b"said")
    assert not other.shared_with(third.public).is_proven(proof, b"source", b"said")


def test_a_silent_caller_is_dropped(sink: Side[TcpTransport]) -> None:
    with dial(sink) as raw:
        assert ended(raw)
    wait_until(lambda: any("too long" in error or "timed out" in error for error in sink.transport.recent_errors))


def test_connections_are_limited(source: Side[TcpTransport]) -> None:
    """A proven connection stays and goes on; a second one is closed."""
    with Side(TcpTransport(TcpOptions(max_connections=1, handshake_s=30)), fill=1) as sink:
        there, _ = meet(source, sink)
        grant = sink.grant()
        assert source.transport.submit(there, block(source, sink, 100), grant).result(10) == 100
        with dial(sink) as second:
            assert ended(second)
        assert "more than 1 connections" in sink.transport.recent_errors[-1]
        assert source.transport.submit(there, block(source, sink, 100, at=500), grant).result(10) == 100


@pytest.mark.parametrize("connections", [1, 8, 256])
@pytest.mark.parametrize("greeting", [b"", data_handshake.MAGIC])
def test_silent_connections_keep_no_peer_out(source: Side[TcpTransport], connections: int, greeting: bytes) -> None:
    """The oldest of them is closed for each new one, whatever part of a handshake it has sent."""
    with ExitStack() as stack:
        sink = stack.enter_context(Side(TcpTransport(TcpOptions(max_connections=connections, handshake_s=30)), fill=1))
        silent: list[socket.socket] = []
        for _ in range(300):
            silent.append(stack.enter_context(dial(sink)))
            silent[-1].sendall(greeting)
        there, _ = meet(source, sink)
        transfer = source.transport.submit(there, block(source, sink, 100), sink.grant())
        assert transfer.result(10) == 100
        kept = min(connections, STRANGERS)
        assert all(ended(raw) for raw in silent[: 300 - kept])
        assert len(sink.transport._listener.connections()) <= kept + 1


def test_it_reconnects_after_a_loss(source: Side[TcpTransport], sink: Side[TcpTransport]) -> None:
    there, _ = meet(source, sink)
    grant = sink.grant()
    assert source.transport.submit(there, block(source, sink, 100), grant).result(10) == 100
    (connection,) = sink.transport._listener.connections()
    connection.close()
    connection.join(10)
    outbound = source.transport._peers.get(there)
    wait_until(lambda: outbound._connection is None)
    assert source.transport.submit(there, block(source, sink, 100, at=500), grant).result(10) == 100
    assert (sink.bytes[500:600] == 7).all()


def test_a_restarted_peer_is_somebody_else(source: Side[TcpTransport]) -> None:
    with Side(TcpTransport(), fill=1) as first:
        there, _ = meet(source, first)
        port = frames.checked(first.transport.describe()).port
        grant = first.grant()
    with Side(TcpTransport(TcpOptions(port=port)), fill=1) as second:
        second.transport.connect(source.transport.describe())
        with pytest.raises(TransportError, match="failed"):
            source.transport.submit(there, block(source, second, 100), grant).result(10)
        assert (second.bytes == 1).all()


def test_fence_does_not_wait_for_a_silent_peer(source: Side[TcpTransport]) -> None:
    """The sink takes the bytes and never acknowledges them: after a second the future fails."""
    own = InstanceKey("tcp")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        described = frames.TcpDescription("127.0.0.1", listener.getsockname()[1], own.public)
        there = source.transport.connect(msgspec.msgpack.encode(described))
        transfer = source.transport.submit(there, block(source, source, 100), bytes(16))
        connection, _ = listener.accept()
        with connection:
            data_handshake.answer(connection, own.public, own.shared_with, 10)
            assert connection.recv(1)
            assert source.transport.fence(there)
            with pytest.raises(TransportError, match="fenced"):
                transfer.result(0)


def test_more_bytes_than_a_frame_holds() -> None:
    nbytes = frames.MAX_BYTES + 12_345
    with (
        Side(TcpTransport(), fill=7, nbytes=nbytes) as source,
        Side(TcpTransport(), fill=1, nbytes=nbytes + 1) as sink,
    ):
        source.bytes[:: 1 << 12] = np.arange(source.bytes[:: 1 << 12].size, dtype=np.uint32).astype(np.uint8)
        there, _ = meet(source, sink)
        assert source.transport.submit(there, block(source, sink, nbytes), sink.grant()).result(20) == nbytes
        assert np.array_equal(sink.bytes[:-1], source.bytes)
        assert sink.bytes[-1] == 1


def test_nothing_answers(source: Side[TcpTransport]) -> None:
    with Side(TcpTransport(), fill=1) as sink:
        there, _ = meet(source, sink)
        grant = sink.grant()
    with pytest.raises(TransportError, match="refused"):
        source.transport.submit(there, block(source, sink, 100), grant).result(10)
    assert source.transport.fence(there)


def test_bad_settings() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"tcp: port {port} on 127.0.0.1 is in use: .*choose another"):
            TcpTransport(TcpOptions(port=port))
    with pytest.raises(ConfigurationError, match="host 'no such host' is not a host: write a name"):
        TcpTransport(TcpOptions(host="no such host"))
    with pytest.raises(
        ConfigurationError, match=r"cannot listen on unknown\.invalid:0: the host name cannot be resolved"
    ):
        TcpTransport(TcpOptions(host="unknown.invalid"))
    with pytest.raises(ConfigurationError, match="advertise_host '::' means every interface"):
        TcpTransport(TcpOptions(advertise="::"))


@pytest.mark.parametrize("raw", [b"", b"\xff", msgspec.msgpack.encode({"type": "tcp", "host": 1}), b"x" * 1000])
def test_a_malformed_description(source: Side[TcpTransport], raw: bytes) -> None:
    with pytest.raises(TransportError, match="malformed"):
        source.transport.connect(raw)


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("0.0.0.0", 7000, "cannot be dialled"),
        ("a b", 7000, "is not a host"),
        ("[::1]:7000", 7000, "give the port separately"),
        ("::1", 0, "port 0 of host '::1' cannot be dialled"),
        ("worker-3", 70000, "is not a number"),
    ],
)
def test_a_peer_that_listens_where_nothing_can_is_refused(
    source: Side[TcpTransport], host: str, port: int, says: str
) -> None:
    described = frames.TcpDescription(host, port, bytes(32))
    with pytest.raises(TransportError, match="has an invalid address") as caught:
        source.transport.connect(msgspec.msgpack.encode(described))
    assert says in str(caught.value)


@needs_ipv6
@pytest.mark.parametrize("listens", BOTH)
def test_a_sink_at_either_address_of_its_name_gets_the_bytes(source: Side[TcpTransport], listens: str) -> None:
    with (
        resolver({"both.test": BOTH}),
        Side(TcpTransport(TcpOptions(host=listens, advertise="both.test")), fill=1) as sink,
    ):
        there, _ = meet(source, sink)
        assert source.transport.submit(there, block(source, sink, 100), sink.grant()).result(20) == 100
        assert np.array_equal(sink.bytes[:100], source.bytes[:100])


def test_another_program_at_the_first_address_is_passed_over(source: Side[TcpTransport]) -> None:
    """It listens at the sink's port on the sink's other address, and answers as an HTTP server does."""
    with (
        Side(TcpTransport(TcpOptions(host="127.0.0.1", advertise="many.test")), fill=1) as sink,
        socket.create_server(("127.0.0.2", frames.checked(sink.transport.describe()).port)) as other,
        resolver({"many.test": ("127.0.0.2", "127.0.0.1")}),
    ):
        there, _ = meet(source, sink)
        transfer = source.transport.submit(there, block(source, sink, 100), sink.grant())
        stranger, _ = other.accept()
        with stranger:
            assert stranger.recv(1 << 10)
            stranger.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n".ljust(64))
        assert transfer.result(20) == 100


def test_a_slow_name_holds_up_neither_other_peers_nor_the_end(source: Side[TcpTransport]) -> None:
    with (
        Side(TcpTransport(TcpOptions(advertise="slow.test")), fill=1) as slow,
        Side(TcpTransport(), fill=1) as sink,
        resolver(slow=["slow.test"]) as asked,
    ):
        far, _ = meet(source, slow)
        near, _ = meet(source, sink)
        waiting = source.transport.submit(far, block(source, slow, 100), slow.grant())
        asked.wait_asked("slow.test")
        assert source.transport.submit(near, block(source, sink, 100), sink.grant()).result(20) == 100
        assert source.transport.fence(far)
        assert isinstance(waiting.exception(0), TransportError)
        assert not asked.answered["slow.test"]


def test_a_grant_outside_registered_memory(sink: Side[TcpTransport]) -> None:
    with pytest.raises(TransportError, match="granted block 0"):
        sink.transport.grant(Extents(u64([sink.pool.address]), u64([NBYTES + 1])))


def test_a_connection_with_the_last_descriptor_needs_no_other_one(
    sink: Side[TcpTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits of the system are read by the first socket of this process, at the latest by that of `sink`."""
    opened = []
    monkeypatch.setattr("pathlib.Path.open", lambda *where, **_: opened.append(where))
    with socket.socket() as connection:
        data_handshake.tune(connection)
    assert not opened


@pytest.mark.parametrize("other", [False, True], ids=["no listener", "another worker"])
def test_a_sink_at_the_loopback_address_of_another_machine_is_named_with_the_remedy(
    source: Side[TcpTransport], other: bool
) -> None:
    """As the source sees it, nothing listens at this address, or another worker does."""
    with contextlib.ExitStack() as stack:
        with Side(TcpTransport(), fill=1) as sink:
            there, _ = meet(source, sink)
            where = frames.checked(sink.transport.describe())
            grant = sink.grant()
        if other:
            stack.enter_context(Side(TcpTransport(TcpOptions(port=where.port)), fill=1))
        transfer = source.transport.submit(there, block(source, sink, 8), grant)
        with pytest.raises(TransportError, match=r"127\.0\.0\.1 is this machine itself: .* --host or --advertise-host"):
            transfer.result(10)
