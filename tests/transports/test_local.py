"""`local`: the permission to write, the chosen way, and the errors. The conformance suite moves the blocks."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from transport_helpers import PAGE, Side, block, move_page, wait_until

from kvroom.conformance.ends import EndSetup, Host
from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import Blocks, Extents
from kvroom.transports import create
from kvroom.transports.base import OutOfReach
from kvroom.transports.kit.ranges import u64
from kvroom.transports.local import LocalOptions, LocalTransport
from kvroom.transports.local.peer import LocalDescription
from kvroom.transports.local.writers import ShmWriter, VmWriter


@pytest.fixture
def source() -> Iterator[Side[LocalTransport]]:
    with Side(LocalTransport(), fill=7) as side:
        yield side


@pytest.fixture
def sink() -> Iterator[Side[LocalTransport]]:
    with Side(LocalTransport(), fill=1) as side:
        yield side


def altered(sink: Side[LocalTransport], **process: Any) -> bytes:
    """Return the sink's description with changed statements about its process."""
    described = msgspec.msgpack.decode(sink.transport.describe(), type=LocalDescription)
    other = msgspec.structs.replace(described.process, **process)
    return msgspec.msgpack.encode(msgspec.structs.replace(described, process=other))


@pytest.mark.parametrize("process", [{"boot": "another"}, {"pid_namespace": 1}])
def test_another_machine_is_out_of_reach(
    source: Side[LocalTransport], sink: Side[LocalTransport], process: dict[str, Any]
) -> None:
    with pytest.raises(OutOfReach, match=r"another (machine|pid namespace)"):
        source.transport.connect(altered(sink, **process))


def test_a_pid_that_was_used_again_is_not_the_peer(source: Side[LocalTransport], sink: Side[LocalTransport]) -> None:
    with pytest.raises(TransportError, match="is gone"):
        source.transport.connect(altered(sink, started=1))


def test_a_process_that_is_not_the_peer_is_not_written(
    source: Side[LocalTransport], sink: Side[LocalTransport]
) -> None:
    described = msgspec.msgpack.decode(sink.transport.describe(), type=LocalDescription)
    forged = msgspec.structs.replace(described, probe=sink.pool.address)
    with pytest.raises(TransportError, match="is not the peer that described itself"):
        source.transport.connect(msgspec.msgpack.encode(forged))
    assert (sink.bytes == 1).all()


def test_it_says_which_way_it_took(source: Side[LocalTransport], sink: Side[LocalTransport]) -> None:
    there = source.transport.connect(sink.transport.describe())
    assert source.transport.mode_of(there) == "vm"
    assert source.transport.explain(there) == "local (vm): same machine, process_vm_writev permitted"


def test_where_both_ways_are_open_small_blocks_of_the_sink_are_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that are strided in the sink go through the mapping, all others through the kernel; both land."""

    def refuse(writer: object, blocks: Blocks) -> None:
        raise OSError(f"{type(writer).__name__} was asked to write {blocks.nbytes} bytes")

    with Side(LocalTransport(), fill=7) as source, Side(LocalTransport(), fill=1, shared=True) as sink:
        there = source.transport.connect(sink.transport.describe())
        assert source.transport.mode_of(there) == "vm+shm"
        for nbytes, gap, other in ((512, 512, VmWriter), (2048, 0, ShmWriter), (32 << 10, 32 << 10, ShmWriter)):
            sink.bytes[:] = 1
            monkeypatch.undo()
            monkeypatch.setattr(other, "write", refuse)
            step = np.arange(8, dtype=np.uint64)
            blocks = Blocks(
                np.uint64(source.pool.address) + step * np.uint64(nbytes),
                np.uint64(sink.pool.address) + step * np.uint64(nbytes + gap),
                np.full(8, nbytes, np.uint64),
            )
            assert source.transport.submit(there, blocks, b"").result(5) == 8 * nbytes
            rows = sink.bytes[: 8 * (nbytes + gap)].reshape(8, -1)
            assert (rows[:, :nbytes] == 7).all()
            assert (rows[:, nbytes:] == 1).all()


def test_nothing_is_proven_while_the_writer_lives(source: Side[LocalTransport], sink: Side[LocalTransport]) -> None:
    there = source.transport.connect(sink.transport.describe())
    assert not sink.transport.revoke(sink.transport.grant(Extents(u64([]), u64([]))))
    assert not source.transport.fence(there)
    assert not source.transport.fence(there)
    with pytest.raises(TransportError, match="fenced"):
        source.transport.submit(there, block(source, sink, PAGE), b"").result(5)
    assert source.transport.connect(sink.transport.describe()) == there  # attached again
    assert source.transport.submit(there, block(source, sink, PAGE), b"").result(5) == PAGE


def test_shared_pools_where_the_kernel_refuses_to_write() -> None:
    """The sink's own user may not trace it: `vm` is refused with the remedy, `auto` maps the pool."""
    with Host() as writer, Host() as owner:
        sink = owner.open(EndSetup("local", {}, [1 << 16], shared=True))
        sink.forbid_ptrace()
        description = sink.describe()
        source = writer.open(EndSetup("local", {"mode": "vm"}, [1 << 16], seed=3))
        source.give_up_ptrace()
        with pytest.raises(TransportError, match=r"was refused \(Operation not permitted\): "):
            source.connect(description)
        source = writer.open(EndSetup("local", {}, [1 << 16], seed=3))
        peer = source.connect(description)
        why = source.explain(peer)
        assert why.startswith("local (shm): process_vm_writev into process")
        assert why.endswith("; same machine, the peer's pools are mapped here as shared memory")
        assert move_page(source, sink, peer) == PAGE
        assert np.array_equal(sink.contents()[0][:PAGE], source.contents()[0][:PAGE])


def test_neither_way_is_one_error_with_both_reasons() -> None:
    with Host() as writer, Host() as owner:
        sink = owner.open(EndSetup("local", {}, [1 << 16]))
        sink.forbid_ptrace()
        source = writer.open(EndSetup("local", {}, [1 << 16]))
        source.give_up_ptrace()
        with pytest.raises(
            TransportError, match=r"was refused .*; the peer's memory is not in shared pools .*shared=True"
        ):
            source.connect(sink.describe())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
def test_another_user_gets_no_pool() -> None:
    with Host() as writer, Side(LocalTransport(), fill=1, shared=True) as sink:
        source = writer.open(EndSetup("local", {}, [1 << 16]))
        source.become(65534)
        words = r"run both workers as one user .*did not pass them on to this process \(uid 65534\)"
        with pytest.raises(TransportError, match=words):
            source.connect(sink.transport.describe())


def test_a_wrong_token_gets_no_pool() -> None:
    with (
        Side(LocalTransport(LocalOptions(mode="shm")), fill=7) as source,
        Side(LocalTransport(LocalOptions(mode="shm")), fill=1, shared=True) as sink,
    ):
        described = msgspec.msgpack.decode(sink.transport.describe(), type=LocalDescription)
        forged = msgspec.msgpack.encode(msgspec.structs.replace(described, token=bytes(32)))
        with pytest.raises(TransportError, match="cannot be mapped"):
            source.transport.connect(forged)
        assert source.transport.mode_of(source.transport.connect(sink.transport.describe())) == "shm"


def test_bad_settings() -> None:
    with pytest.raises(ConfigurationError, match="mode='fast'"):
        create("local", mode="fast")
    with pytest.raises(ConfigurationError, match="threads=0"):
        LocalTransport(LocalOptions(threads=0))


def test_a_finished_transfer_is_forgotten(source: Side[LocalTransport], sink: Side[LocalTransport]) -> None:
    """Callbacks refer to a transfer's owner, so a worker that waits for the next one must not keep them alive."""
    peer = source.transport.connect(sink.transport.describe())
    transfer = source.transport.submit(peer, block(source, sink, 1 << 20), b"")  # too large to be copied immediately
    kept = weakref.ref(transfer)
    transfer.result(10)
    del transfer
    wait_until(lambda: kept() is None)
