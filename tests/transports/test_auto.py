"""`auto`: which transport it takes, what it says about that, and when it proves a drain."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from transportkit import PAGE, Side, block, move_page

from kvroom.errors import ConfigurationError, TransportError
from kvroom.testing.ends import Host
from kvroom.transports import REGISTRY, Transport, create
from kvroom.transports.auto import AutoTransport, make
from kvroom.transports.local import Description, LocalTransport
from kvroom.transports.memory import MemoryTransport
from kvroom.transports.tcp import TcpTransport


class Elsewhere(LocalTransport):
    """`local` on what says it is another machine."""

    def describe(self) -> bytes:
        described = msgspec.msgpack.decode(super().describe(), type=Description)
        process = msgspec.structs.replace(described.process, boot="another")
        return msgspec.msgpack.encode(msgspec.structs.replace(described, process=process))


def meet(source: Side[Any], sink: Side[Any]) -> tuple[int, int]:
    there = source.transport.connect(sink.transport.describe())
    return there, sink.transport.connect(source.transport.describe())


def test_local_on_one_machine() -> None:
    with Side(make(), fill=7) as source, Side(make(), fill=1) as sink:
        there, back = meet(source, sink)
        assert source.transport.why(there) == "local (vm): same machine, process_vm_writev permitted"
        grant = sink.grant()
        assert source.transport.submit(there, block(source, sink, PAGE), grant).result(5) == PAGE
        assert not sink.transport.revoke(grant)  # the writer lives, and `local` needs no leave
        assert not sink.transport.fence(back)
        assert sink.transport.connect(source.transport.describe()) == back


def test_tcp_between_machines() -> None:
    with (
        Side(AutoTransport([Elsewhere(), TcpTransport()]), fill=7) as source,
        Side(AutoTransport([Elsewhere(), TcpTransport()]), fill=1) as sink,
    ):
        there, back = meet(source, sink)
        assert source.transport.why(there) == "tcp, because local: the peer is on another machine"
        grant = sink.grant()
        assert source.transport.submit(there, block(source, sink, PAGE), grant).result(5) == PAGE
        assert (sink.bytes[:PAGE] == 7).all()
        assert sink.transport.revoke(grant)
        with pytest.raises(TransportError, match="no such grant"):
            source.transport.submit(there, block(source, sink, PAGE), grant).result(5)
        assert sink.transport.fence(back)


def test_tcp_where_local_is_refused() -> None:
    """And the sink still counts with a writer that might be permitted what it is not itself."""
    with Host() as writer, Host() as owner:
        sink = owner.open("auto", {}, [1 << 16])
        sink.forbid_ptrace()
        source = writer.open("auto", {}, [1 << 16], seed=3)
        source.give_up_ptrace()
        there, _ = source.connect(sink.describe()), sink.connect(source.describe())
        assert source.why(there).startswith("tcp, because local: process_vm_writev into process")
        grant = sink.grant(np.array(sink.addresses, np.uint64), np.array([1 << 16], np.uint64))
        assert move_page(source, sink, there, grant) == PAGE
        assert not sink.revoke(grant)
        assert not source.fence(there)  # the sink's process lives, and might write into the source
        assert source.connect(sink.describe()) == there
        owner.kill()
        assert source.fence(there)


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [
        ([MemoryTransport], [TcpTransport], "we have memory, it has tcp"),
        ([Elsewhere], [Elsewhere], "another machine"),
    ],
)
def test_no_transport_in_common(ours: list[type[Transport]], theirs: list[type[Transport]], text: str) -> None:
    with (
        Side(AutoTransport([kind() for kind in ours]), fill=7) as source,
        Side(AutoTransport([kind() for kind in theirs]), fill=1) as sink,
        pytest.raises(TransportError, match=text),
    ):
        source.transport.connect(sink.transport.describe())


@pytest.mark.parametrize(
    ("ours", "theirs"), [("tcp", "auto"), ("auto", "local"), ("memory", "tcp"), ("local", "memory")]
)
def test_two_sides_that_were_told_different_transports(ours: str, theirs: str) -> None:
    with (
        Side(create(ours), fill=7) as source,
        Side(create(theirs), fill=1) as sink,
        pytest.raises(TransportError, match=f"this side uses transport {ours}, the peer uses {theirs}"),
    ):
        source.transport.connect(sink.transport.describe())


def test_it_never_takes_memory() -> None:
    with Side(make(), fill=7) as source, Side(MemoryTransport(), fill=1) as sink:
        parts = msgspec.msgpack.decode(source.transport.describe())["parts"]
        assert sorted(parts) == ["local", "tcp"]
        with pytest.raises(TransportError):
            source.transport.connect(sink.transport.describe())


def test_create() -> None:
    for name in REGISTRY:
        transport = create(name, host="127.0.0.1")
        assert transport.name == name
        transport.close()
    with pytest.raises(ConfigurationError, match="unknown transport 'carrier-pigeon': choose one of auto, local,"):
        create("carrier-pigeon")
    with pytest.raises(ConfigurationError, match="transport tcp: got an unexpected keyword argument 'threads'"):
        create("tcp", threads=3)


def test_a_malformed_grant() -> None:
    with Side(make(), fill=7) as source, Side(make(), fill=1) as sink:
        there, _ = meet(source, sink)
        with pytest.raises(TransportError, match="grant is malformed"):
            source.transport.submit(there, block(source, sink, PAGE), b"\xff").result(5)
