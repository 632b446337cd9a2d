"""`auto`: the transport that it chooses, the reason that it gives, and when it proves a drain."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import msgspec
import numpy as np
import pytest
from transport_helpers import PAGE, Side, block, move_page

from kvroom.conformance.ends import EndSetup, Host
from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import MemoryRange
from kvroom.transports import REGISTRY, Transport, create
from kvroom.transports.base import DESCRIPTION_BYTES
from kvroom.transports.kit.probing import nvidia_gpus, rdma_devices
from kvroom.transports.local import LocalTransport
from kvroom.transports.local.peer import LocalDescription
from kvroom.transports.memory import MemoryTransport
from kvroom.transports.selection.auto import AutoTransport, Candidate, Shortlist
from kvroom.transports.tcp import TcpTransport

WHEELS = {"nixl", "nixl_cu12", "mooncake", "memfabric_hybrid", "mori", "torch"}


class Elsewhere(LocalTransport):
    """`local` on a machine that states another identity."""

    def describe(self) -> bytes:
        described = msgspec.msgpack.decode(super().describe(), type=LocalDescription)
        process = msgspec.structs.replace(described.process, boot="another")
        return msgspec.msgpack.encode(msgspec.structs.replace(described, process=process))


def among(candidates: Sequence[Transport] | Shortlist) -> AutoTransport:
    return AutoTransport(candidates=candidates)


def meet(source: Side[Any], sink: Side[Any]) -> tuple[int, int]:
    there = source.transport.connect(sink.transport.describe())
    return there, sink.transport.connect(source.transport.describe())


def test_local_on_one_machine() -> None:
    with Side(AutoTransport(), fill=7) as source, Side(AutoTransport(), fill=1) as sink:
        there, back = meet(source, sink)
        assert source.transport.explain(there) == "local (vm): same machine, process_vm_writev permitted"
        grant = sink.grant()
        assert source.transport.submit(there, block(source, sink, PAGE), grant).result(5) == PAGE
        assert not sink.transport.revoke(grant)  # the writer lives, and `local` needs no grant
        assert not sink.transport.fence(back)
        assert sink.transport.connect(source.transport.describe()) == back


def test_tcp_between_machines() -> None:
    with (
        Side(among([Elsewhere(), TcpTransport()]), fill=7) as source,
        Side(among([Elsewhere(), TcpTransport()]), fill=1) as sink,
    ):
        there, back = meet(source, sink)
        assert source.transport.explain(there) == "tcp, because local: the peer is on another machine"
        grant = sink.grant()
        assert source.transport.submit(there, block(source, sink, PAGE), grant).result(5) == PAGE
        assert (sink.bytes[:PAGE] == 7).all()
        assert sink.transport.revoke(grant)
        with pytest.raises(TransportError, match="no such grant"):
            source.transport.submit(there, block(source, sink, PAGE), grant).result(5)
        assert sink.transport.fence(back)


def test_tcp_where_local_is_refused() -> None:
    """The sink must still expect writes over `local`: the writer may be allowed what is refused to the sink itself."""
    with Host() as writer, Host() as owner:
        sink = owner.open(EndSetup("auto", {}, [1 << 16]))
        sink.forbid_ptrace()
        source = writer.open(EndSetup("auto", {}, [1 << 16], seed=3))
        source.give_up_ptrace()
        there, back = source.connect(sink.describe()), sink.connect(source.describe())
        assert source.explain(there).startswith("tcp, because local: process_vm_writev into process")
        grant = sink.grant(np.array(sink.addresses, np.uint64), np.array([1 << 16], np.uint64))
        sink.bind(grant, back)
        assert move_page(source, sink, there, grant) == PAGE
        assert not sink.revoke(grant)
        assert not source.fence(there)  # the sink's process lives, and could write into the source
        assert source.connect(sink.describe()) == there
        owner.kill()
        assert source.fence(there)


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [
        ([MemoryTransport], [TcpTransport], "this side has memory, the peer has tcp"),
        ([Elsewhere], [Elsewhere], "another machine"),
    ],
)
def test_no_transport_in_common(ours: list[type[Transport]], theirs: list[type[Transport]], text: str) -> None:
    with (
        Side(among([kind() for kind in ours]), fill=7) as source,
        Side(among([kind() for kind in theirs]), fill=1) as sink,
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
    with Side(AutoTransport(), fill=7) as source, Side(MemoryTransport(), fill=1) as sink:
        parts = msgspec.msgpack.decode(source.transport.describe())["parts"]
        assert "memory" not in parts
        with pytest.raises(TransportError):
            source.transport.connect(sink.transport.describe())


def test_create() -> None:
    for name in ("auto", "fake", "local", "memory", "tcp"):
        transport = create(name, host="127.0.0.1")
        assert transport.name == name
        transport.close()
    with pytest.raises(ConfigurationError, match="unknown transport 'carrier-pigeon': choose one of ascend, auto,"):
        create("carrier-pigeon")
    with pytest.raises(
        ConfigurationError,
        match=r"tcp: unknown option 'threads'; its options are port \(0\), max_c",
    ):
        create("tcp", threads=3)


def test_create_a_transport_of_somebody_else() -> None:
    with closing(create(f"{__name__}:Elsewhere", threads=1)) as transport:
        assert isinstance(transport, Elsewhere)
    with closing(create(f"{__name__}:Elsewhere", host="127.0.0.1")) as transport:  # it does not use a host
        assert isinstance(transport, Elsewhere)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_package.part:Make", "the module no_such_package.part cannot be imported (No module named"),
        ("kvroom.transports.local:Nothing", "the module kvroom.transports.local has no callable 'Nothing'; correct it"),
        ("kvroom.transports.local:__doc__", "has no callable '__doc__'"),
        (":Make", "is not of the form package.module:callable"),
        ("kvroom..local:Make", "is not of the form package.module:callable"),
        ("kvroom.transports.local:", "is not of the form package.module:callable"),
        ("kvroom.transports.local:machine.watch", "is not of the form package.module:callable"),
        ("os:getpid", "made a int: name a callable that returns a kvroom.transports.Transport"),
        ("builtins:dict", "made a dict: name a callable that returns a kvroom.transports.Transport"),
    ],
)
def test_a_name_from_outside_that_leads_nowhere(name: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        create(name)
    assert said in str(raised.value)
    assert name in str(raised.value)


def test_the_registry_says_what_auto_may_choose_in_its_order() -> None:
    may = [name for name, entry in REGISTRY.items() if entry.auto]
    assert may == ["local", "nixl", "mooncake", "ascend", "mori", "tcp"]
    assert [name for name in may if REGISTRY[name].basic] == ["local", "tcp"]


LOOK = """
import json, sys, threading
from kvroom.plan.blocks import MemoryRange
from kvroom.transports import create
from kvroom.transports.kit.pool import allocate
pool = allocate(4096)
transport = create("auto")
transport.register([MemoryRange(pool.address, 4096)])
parts = list(transport._parts)
threads = sorted(thread.name for thread in threading.enumerate())
transport.close()
print(json.dumps({"parts": parts, "threads": threads, "modules": list(sys.modules), "left": transport.warning()}))
"""


@pytest.mark.skipif(bool(rdma_devices() or nvidia_gpus()), reason="this machine has RDMA devices or GPUs")
def test_on_a_plain_machine_it_is_local_then_tcp_and_no_engine_is_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(done.stdout)
    assert found["parts"] == ["local", "tcp"]
    assert found["threads"] == ["MainThread", "kvroom-tcp-accept"]
    assert found["left"] == ""
    assert not WHEELS & {name.partition(".")[0] for name in found["modules"]}


class Broken(MemoryTransport):
    """Registers no memory."""

    name = "broken"
    closed = False

    def register(self, memory: Sequence[MemoryRange]) -> None:
        raise ConfigurationError("broken: the device has left")

    def close(self) -> None:
        self.closed = True
        super().close()


class Wordy(MemoryTransport):
    """Has a long description of itself."""

    name = "wordy"

    def describe(self) -> bytes:
        return bytes(DESCRIPTION_BYTES - 300)


def refuse() -> Transport:
    raise TransportError("absent: the engine did not start")


def test_a_candidate_that_fails_is_left_out_and_closed_with_its_reason() -> None:
    broken = Broken()
    shortlist = [
        Candidate("weak", MemoryTransport, "it is weak"),
        Candidate("absent", refuse),
        Candidate("broken", lambda: broken),
        Candidate("memory", MemoryTransport),
    ]
    with (
        Side(among(lambda kinds: shortlist), 7) as source,
        Side(among([MemoryTransport()]), 1) as sink,
    ):
        assert broken.closed
        there, _ = meet(source, sink)
        assert source.transport.warning() == (
            "auto runs without absent: the engine did not start; auto runs without broken: the device has left"
        )
        assert source.transport.explain(there) == (
            "memory, because weak: it is weak; absent: the engine did not start; broken: the device has left"
        )
        assert sink.transport.warning() == ""
        assert source.transport.submit(there, block(source, sink, PAGE), sink.grant()).result(5) == PAGE


def test_only_what_comes_before_the_chosen_one_needs_a_reason() -> None:
    shortlist = [Candidate("memory", MemoryTransport), Candidate("weak", MemoryTransport, "it is weak")]
    with (
        Side(among(lambda kinds: shortlist), 7) as source,
        Side(among([MemoryTransport()]), 1) as sink,
    ):
        there, _ = meet(source, sink)
        assert source.transport.explain(there) == "memory: selected by name, both ends are in one process"


def test_no_candidate_is_left() -> None:
    broken = Broken()
    shortlist = [Candidate("weak", MemoryTransport, "it is weak"), Candidate("broken", lambda: broken)]
    with (
        closing(among(lambda kinds: shortlist)) as transport,
        pytest.raises(ConfigurationError) as raised,
    ):
        transport.register([MemoryRange(4096, 4096, "cuda:1")])
    assert broken.closed
    assert str(raised.value) == (
        "auto: no transport is left for cuda memory (weak: it is weak; broken: the device has left); "
        "`kvroom doctor` shows what is available here"
    )


def test_memory_that_nothing_here_moves_is_one_error_with_every_reason() -> None:
    with closing(AutoTransport()) as transport, pytest.raises(ConfigurationError) as raised:
        transport.register([MemoryRange(4096, 4096, "abacus:0")])
    for name in (name for name, entry in REGISTRY.items() if entry.auto):
        assert f"{name}: " in str(raised.value)
    assert "tcp: it does not move abacus memory" in str(raised.value)


def test_the_kinds_of_the_memory_reach_the_shortlist() -> None:
    asked: list[Any] = []

    def shortlist(kinds: Any) -> list[Candidate]:
        asked.append(kinds)
        return []

    with (
        closing(among(shortlist)) as transport,
        pytest.raises(ConfigurationError, match="cpu and cuda memory"),
    ):
        transport.register([MemoryRange(4096, 8, "cuda:0"), MemoryRange(8192, 8, "cuda:1"), MemoryRange(64, 8)])
    assert asked == [{"cpu", "cuda"}]


def test_a_description_over_the_limit_costs_the_largest_part_its_place() -> None:
    with Side(among([Wordy(), MemoryTransport()]), 7) as kept:  # both descriptions fit
        assert list(msgspec.msgpack.decode(kept.transport.describe())["parts"]) == ["wordy", "memory"]
    with Side(among([MemoryTransport(), Wordy(), LocalTransport(), TcpTransport()]), 7) as side:
        assert list(msgspec.msgpack.decode(side.transport.describe())["parts"]) == ["memory", "local", "tcp"]
        assert len(side.transport.describe()) <= DESCRIPTION_BYTES
        said = side.transport.warning()
        assert said.startswith(f"auto runs without wordy: its description takes {DESCRIPTION_BYTES - 300} of ")
        assert said.endswith(f"bytes, {DESCRIPTION_BYTES} are allowed; register fewer, larger regions")


def test_a_malformed_grant() -> None:
    with Side(AutoTransport(), fill=7) as source, Side(AutoTransport(), fill=1) as sink:
        there, _ = meet(source, sink)
        with pytest.raises(TransportError, match="grant is malformed"):
            source.transport.submit(there, block(source, sink, PAGE), b"\xff").result(5)
