"""`fake`: it moves nothing, declares that, and otherwise refuses what other transports refuse."""

from __future__ import annotations

import numpy as np
import pytest
from transport_helpers import NBYTES, PAGE, Side, block

from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.transports import REGISTRY, create
from kvroom.transports.fake import FakeTransport
from kvroom.transports.kit.ranges import u64
from kvroom.transports.memory import MemoryTransport


def sides() -> tuple[Side[FakeTransport], Side[FakeTransport]]:
    return Side(FakeTransport(), fill=7), Side(FakeTransport(), fill=1)


def test_a_transfer_is_done_at_once_and_no_byte_has_moved() -> None:
    source, sink = sides()
    with source, sink:
        there = source.transport.connect(sink.transport.describe())
        transfer = source.transport.submit(there, block(source, sink, PAGE), sink.grant())
        assert transfer.done()
        assert transfer.result() == PAGE
        assert (sink.bytes == 1).all()
        assert (source.bytes == 7).all()
        assert source.transport.submit(there, block(source, sink, 0), b"").result() == 0


def test_it_says_what_it_is() -> None:
    source, sink = sides()
    with source, sink:
        there = source.transport.connect(sink.transport.describe())
        assert source.transport.explain(there) == "fake: selected by name, moves no bytes"
        assert source.transport.warning() == (
            "transport fake moves no bytes: the decode side's pages keep the content that they had before"
        )
    assert not REGISTRY["fake"].auto


def test_memory_of_any_device_is_taken_and_what_is_none_is_not() -> None:
    transport = create("fake")
    transport.register([MemoryRange(4096, 4096, "cuda:0"), MemoryRange(1 << 20, 4096, "npu:1")])
    transport.close()
    for piece in (MemoryRange(4096, 0), MemoryRange(0, 4096)):
        with pytest.raises(ConfigurationError, match="is not memory: address and nbytes must be positive"):
            create("fake").register([piece])


@pytest.mark.parametrize(("end", "start"), [("source", "source block 0 of 1"), ("sink", "destination block 0 of 1")])
def test_what_was_not_registered_is_refused(end: str, start: str) -> None:
    source, sink = sides()
    with source, sink:
        there = source.transport.connect(sink.transport.describe())
        good = block(source, sink, PAGE)
        outside = u64([{"source": source, "sink": sink}[end].pool.address + NBYTES - 1])
        bad = good._replace(**{"src" if end == "source" else "dst": outside})
        with pytest.raises(TransportError, match=f"{start} .* lies outside the memory that"):
            source.transport.submit(there, bad, b"").result(0)
        assert source.transport.submit(there, good, b"").result(0) == PAGE


def test_arrays_that_do_not_fit_each_other_are_refused() -> None:
    source, sink = sides()
    with source, sink:
        there = source.transport.connect(sink.transport.describe())
        with pytest.raises(TransportError, match="blocks need three arrays of one size"):
            source.transport.submit(there, Blocks(u64([1]), u64([]), u64([1])), b"").result(0)


def test_only_registered_memory_is_granted_and_every_revoke_is_proof() -> None:
    source, sink = sides()
    with source, sink:
        grant = sink.grant()
        assert grant  # without a grant, no sink would ask for the proof
        assert sink.transport.revoke(grant)
        with pytest.raises(TransportError, match="granted block 0 of 1"):
            sink.transport.grant(Extents(u64([sink.pool.address]), u64([NBYTES + 1])))


def test_a_fence_is_proof_and_ends_the_handle_until_the_next_connect() -> None:
    source, sink = sides()
    with source, sink:
        there = source.transport.connect(sink.transport.describe())
        assert source.transport.connect(sink.transport.describe()) == there
        assert source.transport.fence(there)
        assert source.transport.fence(there)
        with pytest.raises(TransportError, match="was fenced; connect"):
            source.transport.submit(there, block(source, sink, PAGE), b"").result(0)
        with pytest.raises(TransportError, match="is not a peer handle"):
            source.transport.fence(99)
        again = source.transport.connect(sink.transport.describe())
        assert source.transport.submit(again, block(source, sink, PAGE), b"").result(0) == PAGE


def test_after_close_nothing_is_done() -> None:
    source, sink = sides()
    with source, sink:
        there = source.transport.connect(sink.transport.describe())
        source.transport.close()
        source.transport.close()
        with pytest.raises(TransportError, match="fake: this transport is closed"):
            source.transport.submit(there, block(source, sink, PAGE), b"").result(0)
        with pytest.raises(TransportError, match="fake: this transport is closed"):
            source.transport.connect(sink.transport.describe())


def test_a_peer_of_another_transport_and_garbage_are_refused() -> None:
    with Side(FakeTransport(), fill=7) as source, Side(MemoryTransport(), fill=1) as sink:
        with pytest.raises(TransportError, match="this side uses transport fake, the peer uses memory"):
            source.transport.connect(sink.transport.describe())
        with pytest.raises(TransportError, match="fake: the peer's description is malformed"):
            source.transport.connect(np.random.default_rng(1).bytes(40))
