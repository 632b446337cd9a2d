"""Promises beyond those of the engines: a stuck peer delays no other, a failed write ends only when it has ended.

The real NIXL over UCX's tcp, and the real Mooncake over tcp. The sink that must not react is a stopped process.
"""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from transport_helpers import Side, wait_until

from kvroom.conformance.ends import End, EndSetup, Host
from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks
from kvroom.transports import create, probe
from kvroom.transports.base import MalformedDescription
from kvroom.transports.kit.ranges import u64
from kvroom.wire.keys import SigningKey

NBYTES = 32 << 20
BIG = 1 << 20
MORI_DOUBLE = "kvroom_lab.doubles.mori_io"


def options(name: str) -> dict[str, Any]:
    """Return the options: an engine other than NIXL, which keeps to loopback, needs a trusted fabric."""
    return {"trusted_fabric": name != "nixl"}


@pytest.fixture(params=["nixl", "mooncake"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    chosen: str = request.param
    if chosen != "mori" and probe(chosen).missing:
        pytest.skip(f"{chosen} cannot run here: {probe(chosen).missing[0].what}")
    monkeypatch.setenv("UCX_TLS", "tcp")
    for setting in ("MC_TCP_PROGRESS_TIMEOUT_SEC", "MC_TCP_STATUS_TIMEOUT_SEC"):
        monkeypatch.setenv(setting, "1")
    return chosen


@pytest.fixture
def source(name: str) -> Iterator[End]:
    end = End.here(EndSetup(name, options(name), [NBYTES], 1))
    yield end
    end.close()


def everything(source: End, sink: End) -> Blocks:
    """Return all of the source's pool, in blocks of 1 MiB, backwards."""
    offset = np.arange(0, NBYTES, BIG, dtype=np.uint64)
    return Blocks(
        u64(source.addresses) + offset, u64(sink.addresses) + offset[::-1], np.full(offset.size, BIG, np.uint64)
    )


def page(source: End, sink: End) -> Blocks:
    return Blocks(u64(source.addresses), u64(sink.addresses), u64([4096]))


def introduce(source: End, sink: End) -> int:
    """Connect, and move a page, so that no connection has to be made later."""
    peer = source.connect(sink.describe())
    sink.connect(source.describe())
    assert source.move(peer, page(source, sink), b"") == 4096
    return peer


@pytest.mark.sampled
def test_a_stuck_peer_holds_up_no_other_and_is_no_proof(name: str, source: End) -> None:
    with Host() as stuck, Host() as lively:
        sinks = [host.open(EndSetup(name, options(name), [NBYTES], 2)) for host in (stuck, lively)]
        peers = [introduce(source, sink) for sink in sinks]
        stuck.stop()
        tickets = [source.begin(peers[0], everything(source, sinks[0]), b"") for _ in range(3)]
        blocks = everything(source, sinks[1])
        assert source.move(peers[1], blocks, b"") == blocks.nbytes
        assert not source.fence(peers[0])
        assert source.unfinished() == 1  # writes not yet started were withdrawn; the started one is not over
        stuck.resume()
        for ticket in tickets[1:]:
            with pytest.raises(Exception, match="the peer was fenced"):
                source.outcome(ticket)
        wait_until(lambda: source.unfinished() == 0, 30)
        assert not source.fence(peers[0])  # alive: it could write here
        again = source.connect(sinks[0].describe())
        assert source.move(again, blocks._replace(dst=everything(source, sinks[0]).dst), b"") == blocks.nbytes
        for sink in sinks:
            sink.close()


@pytest.mark.parametrize("name", ["mooncake"], indirect=True)  # NIXL never gives up on a peer that is alive
def test_a_failed_write_is_over_only_when_no_byte_of_it_can_land(source: End, name: str) -> None:
    """The engine gives up on a sink that does not read; bytes that it has sent wait in the kernel for that sink."""
    with Host() as host:
        sink = host.open(EndSetup(name, options(name), [NBYTES], 2))
        peer = introduce(source, sink)
        host.stop()
        ticket = source.begin(peer, everything(source, sink), b"")
        with pytest.raises((TimeoutError, concurrent.futures.TimeoutError)):
            source.outcome(ticket, 5)  # the engine's limit of 1 s has passed long ago
        host.resume()
        with pytest.raises(Exception, match="could not write"):
            source.outcome(ticket)
        before = sink.contents()
        assert source.move(peer, page(source, sink), b"") == 4096  # over a new connection, after the end of the old
        for pool, old in zip(sink.contents(), before, strict=True):
            assert np.array_equal(pool[4096:], old[4096:])
        sink.close()


@pytest.mark.sampled
def test_close_ends_what_is_stuck(name: str) -> None:
    with Host() as host:
        source = End.here(EndSetup(name, options(name), [NBYTES], 1))
        sink = host.open(EndSetup(name, options(name), [NBYTES], 2))
        peer = introduce(source, sink)
        host.stop()
        tickets = [source.begin(peer, everything(source, sink), b"") for _ in range(2)]
        source.close()
        assert source.unfinished() == 0
        for ticket in tickets:
            with pytest.raises(Exception, match=r"closed|could not write"):
                source.outcome(ticket)
        host.resume()


@pytest.mark.sampled
def test_an_idle_transport_costs_no_processor(name: str) -> None:
    """A spinning thread would use as much processor time as this one, which is busy for half a second."""
    with Side(create(name, **options(name)), 1), Side(create(name, **options(name)), 2):
        whole, mine = time.process_time(), time.thread_time()
        while time.thread_time() < mine + 0.5:
            pass  # without yielding the processor: on a busy machine that half a second could take very long
        mine = time.thread_time() - mine
        others = time.process_time() - whole - mine
        assert others < 0.2 * mine


@pytest.mark.sampled
def test_its_threads_end_with_it(name: str) -> None:
    create(name, **options(name)).close()
    before = len(os.listdir("/proc/self/task"))
    side = Side(create(name, **options(name)), 1)
    assert len(os.listdir("/proc/self/task")) > before
    side.transport.close()
    wait_until(lambda: len(os.listdir("/proc/self/task")) <= before)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["nixl", "mooncake", "mori"], indirect=True)
def test_nothing_is_kept_of_a_peer_whose_engine_is_malformed(name: str) -> None:
    """A new key each time would cost a descriptor each time."""
    given = options(name) | ({"part": MORI_DOUBLE} if name == "mori" else {})
    with Side(create(name, **given), 1) as side, Side(create(name, **given), 2) as other:
        honest = msgspec.msgpack.decode(other.transport.describe())
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            engine = honest["engine"] if name == "nixl" else b"no engine says this"
            spoiled = honest | {"engine": engine, "endpoint": SigningKey().public}
            with pytest.raises(MalformedDescription, match=name):
                side.transport.connect(msgspec.msgpack.encode(spoiled))
        assert len(os.listdir("/proc/self/fd")) <= before
        assert side.transport.connect(other.transport.describe())


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["nixl", "mooncake", "mori"], indirect=True)
def test_a_peer_that_cannot_be_written_to_is_watched_all_the_same(name: str) -> None:
    """It may be able to write here, so `auto` asks for a fence: a peer that was never joined must not look gone."""
    given = options(name) | ({"part": MORI_DOUBLE} if name == "mori" else {})
    with Side(create(name, **given), 1) as side, Host() as host:
        sink = host.open(EndSetup(name, given, [NBYTES], 2))
        spoiled = msgspec.msgpack.decode(sink.describe()) | {"engine": b"no engine says this"}
        description = msgspec.msgpack.encode(spoiled)
        with pytest.raises(TransportError, match=name):
            side.transport.connect(description)
        peer = side.transport.watch(description)
        assert not side.transport.fence(peer)
        host.kill()
        wait_until(lambda: side.transport.fence(peer))
