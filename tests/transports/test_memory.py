"""`memory`: each fault that a test can inject has its effect. The conformance suite covers moving blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from transport_helpers import PAGE, Side, block

from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import MemoryRange
from kvroom.transports.memory import MemoryTransport


@pytest.fixture
def source() -> Iterator[Side[MemoryTransport]]:
    with Side(MemoryTransport(), fill=7) as side:
        yield side


@pytest.fixture
def sink() -> Iterator[Side[MemoryTransport]]:
    with Side(MemoryTransport(), fill=1) as side:
        yield side


def meet(source: Side[MemoryTransport], sink: Side[MemoryTransport]) -> tuple[int, int]:
    there = source.transport.connect(sink.transport.describe())
    return there, sink.transport.connect(source.transport.describe())


def test_held_transfers_go_one_by_one(source: Side[MemoryTransport], sink: Side[MemoryTransport]) -> None:
    there, _ = meet(source, sink)
    grant, faults = sink.grant(), source.transport.faults
    faults.hold()
    transfers = [source.transport.submit(there, block(source, sink, 10, at=10 * i), grant) for i in range(3)]
    faults.wait_held(3)
    faults.release(1)
    assert [transfer.done() for transfer in transfers] == [True, False, False]
    assert sink.bytes[:30].tolist() == [7] * 10 + [1] * 20
    faults.release()
    assert [transfer.result(0) for transfer in transfers] == [10] * 3
    assert source.transport.submit(there, block(source, sink, 10), grant).done()


def test_wait_held_waits(source: Side[MemoryTransport], sink: Side[MemoryTransport]) -> None:
    there, _ = meet(source, sink)
    source.transport.faults.hold()
    submit = threading.Thread(target=source.transport.submit, args=(there, block(source, sink, 10), sink.grant()))
    submit.start()
    source.transport.faults.wait_held(1)
    submit.join()
    with pytest.raises(TimeoutError, match="1 transfers are held"):
        source.transport.faults.wait_held(2, timeout_s=0)


def test_a_held_transfer_does_not_land_after_revoke(source: Side[MemoryTransport], sink: Side[MemoryTransport]) -> None:
    there, _ = meet(source, sink)
    grant = sink.grant()
    source.transport.faults.hold()
    transfer = source.transport.submit(there, block(source, sink, PAGE), grant)
    assert sink.transport.revoke(grant)
    source.transport.faults.release()
    with pytest.raises(TransportError, match="no such grant"):
        transfer.result(0)
    assert (sink.bytes == 1).all()


def test_without_proof_a_late_write_lands(source: Side[MemoryTransport], sink: Side[MemoryTransport]) -> None:
    there, back = meet(source, sink)
    grant = sink.grant()
    sink.transport.faults.proof = False
    source.transport.faults.hold()
    transfer = source.transport.submit(there, block(source, sink, PAGE), grant)
    assert not sink.transport.revoke(grant)
    assert not sink.transport.fence(back)
    source.transport.faults.release()
    assert transfer.result(0) == PAGE
    assert (sink.bytes[:PAGE] == 7).all()
    source.transport.faults.die()
    assert sink.transport.fence(back)


def test_transfers_fail_on_demand(source: Side[MemoryTransport], sink: Side[MemoryTransport]) -> None:
    there, _ = meet(source, sink)
    source.transport.faults.fail_next(2, "the cable was cut")
    for _ in range(2):
        with pytest.raises(TransportError, match="the cable was cut"):
            source.transport.submit(there, block(source, sink, PAGE), sink.grant()).result(0)
    assert (sink.bytes == 1).all()
    assert source.transport.submit(there, block(source, sink, PAGE), sink.grant()).result(0) == PAGE


def test_a_dead_end_moves_nothing(source: Side[MemoryTransport], sink: Side[MemoryTransport]) -> None:
    there, back = meet(source, sink)
    source.transport.faults.hold()
    transfer = source.transport.submit(there, block(source, sink, PAGE), sink.grant())
    source.transport.faults.die()
    with pytest.raises(TransportError, match="closed"):
        transfer.result(0)
    with pytest.raises(TransportError, match="gone"):
        sink.transport.submit(back, block(sink, source, PAGE), sink.grant()).result(0)
    assert sink.transport.fence(back)
    with pytest.raises(TransportError, match="not an open endpoint"):
        sink.transport.connect(source.transport.describe())


def test_memory_of_a_device_is_refused(source: Side[MemoryTransport]) -> None:
    with pytest.raises(ConfigurationError, match="'cuda:0'"):
        source.transport.register([MemoryRange(1, 1, "cuda:0")])
