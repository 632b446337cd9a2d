"""The addresses on which an engine listens, compared with the requested host: written tables, and real engines."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import ExitStack, closing
from typing import Any

import pytest

from kvroom.plan.blocks import MemoryRange
from kvroom.transports import create, probe
from kvroom.transports.kit.pool import allocate
from kvroom.transports.onesided.exposure import Exposed, Guard, is_loopback
from kvroom.transports.onesided.kernel_tcp import ListeningSocket, listeners, read_listeners
from kvroom.transports.onesided.work import within
from kvroom.transports.selection.choice import TransportReport, verdicts

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
V4_ANY, V4_LOOP, V4_LAN = "00000000", "0100007F", "020000C0"  # 192.0.0.2
V6_ANY, V6_LOOP = "0" * 32, "00000000000000000000000001000000"
MAPPED_LAN = "0000000000000000FFFF0000020000C0"

pytestmark = pytest.mark.skipif(
    sys.byteorder != "little", reason="the tables below are those of a little-endian machine"
)


def row(address: str, inode: int = 7, state: str = "0A", port: int = 8000) -> str:
    peer = "0" * len(address)
    return f"   0: {address}:{port:04X} {peer}:0000 {state} 00000000:00000000 00:00000000 00000000 0 0 {inode} 1\n"


@pytest.mark.parametrize(
    ("table", "address", "state", "expected"),
    [
        ("tcp", V4_ANY, "0A", "0.0.0.0:8000 (tcp)"),
        ("tcp", V4_LOOP, "0A", "127.0.0.1:8000 (tcp)"),
        ("tcp", V4_LAN, "0A", "192.0.0.2:8000 (tcp)"),
        ("tcp6", V6_ANY, "0A", "[::]:8000 (tcp)"),
        ("tcp6", V6_LOOP, "0A", "[::1]:8000 (tcp)"),
        ("tcp6", MAPPED_LAN, "0A", "192.0.0.2:8000 (tcp)"),
        ("udp", V4_ANY, "07", "0.0.0.0:8000 (udp)"),
        ("udp6", V6_ANY, "07", "[::]:8000 (udp)"),
    ],
)
def test_a_listener_is_read_from_its_table(table: str, address: str, state: str, expected: str) -> None:
    assert [str(each) for each in read_listeners({table: HEAD + row(address, state=state)}, {7})] == [expected]


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("tcp", row(V4_ANY, inode=8)),  # another process's
        ("tcp", row(V4_ANY, state="01")),  # a connection
        ("udp", row(V4_ANY, state="01")),  # accepts datagrams from its peer only
        ("udp", row(V4_ANY, state="07", port=0)),  # not bound yet
        ("tcp6", row(V6_ANY, state="06", inode=0)),
    ],
)
def test_what_takes_nothing_from_strangers_is_no_listener(table: str, line: str) -> None:
    assert read_listeners({table: HEAD + line}, {7}) == set()


@pytest.mark.parametrize(
    ("host", "address", "exposed"),
    [
        ("127.0.0.1", "127.0.0.1", False),
        ("127.0.0.1", "127.3.2.1", False),
        ("127.0.0.1", "::1", False),
        ("::1", "127.0.0.1", False),
        ("localhost", "127.0.0.1", False),
        ("127.0.0.1", "0.0.0.0", True),
        ("127.0.0.1", "::", True),
        ("::1", "::", True),
        ("127.0.0.1", "192.0.0.2", True),
        ("192.0.0.2", "192.0.0.2", False),
        ("192.0.0.2", "127.0.0.1", False),
        ("192.0.0.2", "192.0.0.3", True),
        ("192.0.0.2", "0.0.0.0", True),
        ("192.0.0.2", "fd00::2", True),
        ("0.0.0.0", "0.0.0.0", True),
        ("0.0.0.0", "192.0.0.2", True),
        ("::", "::", True),
        ("::", "::1", False),
    ],
)
def test_only_loopback_and_the_host_are_what_was_asked_for(host: str, address: str, exposed: bool) -> None:
    guard, opened = Guard("ours", host), [ListeningSocket(address, 8000, "tcp")]
    if not exposed:
        guard.check(opened)
        return
    with pytest.raises(Exposed, match=r"ours: its engine listens on .*:8000 \(tcp\).*--trusted-fabric.*trusted_fabric"):
        guard.check(opened)


def test_loopback_is_told_from_other_hosts() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.0.2")))


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_a_port_opened_meanwhile_is_refused_and_an_older_one_is_not(kind: socket.SocketKind) -> None:
    with ExitStack() as stack:

        def opened() -> int:
            made = stack.enter_context(socket.socket(socket.AF_INET, kind))
            made.bind(("0.0.0.0", 0))
            if kind == socket.SOCK_STREAM:
                made.listen()
            return int(made.getsockname()[1])

        older = opened()
        assert older in {each.port for each in listeners()}
        assert Guard("ours", "127.0.0.1").call(lambda: 5) == 5
        with pytest.raises(Exposed) as caught:
            Guard("ours", "127.0.0.1").call(opened)
        assert f":{older} " not in str(caught.value)
        assert Guard("ours", "127.0.0.1", trusted=True).call(opened)


@pytest.mark.parametrize("name", ["nixl", "mooncake"])
def test_a_real_engine_is_confined_or_refused(name: str) -> None:
    """In a process of its own, since sockets of an engine from before would count as older."""
    if missing := probe(name).missing:
        pytest.skip(f"{name} cannot run here: {missing[0].what}")
    ended = subprocess.run(
        [sys.executable, __file__, name], capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert ended.stdout.splitlines()[-1:] == [{"nixl": "confined", "mooncake": "refused, nothing left"}[name]], ended


def examine(name: str) -> str:
    """Start an engine on loopback; return the result."""
    memory = allocate(1 << 20)
    with closing(memory), closing(create(name)) as transport:
        before = listeners()
        try:
            transport.register([MemoryRange(memory.address, memory.nbytes)])
        except Exposed as error:
            said = f"{name}: its engine listens on " in str(error) and "read and write the KV pool" in str(error)
            left = "nothing left" if gone(before) else f"still open: {listeners() - before}"
            return f"refused, {left}" if said else str(error)
        opened = listeners() - before
        return "confined" if opened and all(is_loopback(each.address) for each in opened) else f"open: {opened}"


def gone(before: set[ListeningSocket]) -> bool:
    return within(10, lambda: not listeners() - before)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mooncake", {"protocol": "rdma"}),
        ("mori", {"part": "kvroom_lab.doubles.mori_io"}),
        ("ascend", {"part": "kvroom_lab.doubles.memfabric_hybrid", "data_op_type": "HOST_RDMA"}),
    ],
)
def test_a_fabric_that_no_table_shows_is_refused(name: str, options: dict[str, Any]) -> None:
    if name == "mooncake" and probe(name).missing:
        pytest.skip("mooncake cannot run here")
    before = listeners()
    with closing(create(name, **options)) as transport, pytest.raises(Exposed, match=r"uses .* any process on that"):
        transport.register([])
    assert listeners() == before


def test_auto_leaves_an_exposed_engine_out_unless_the_fabric_is_trusted() -> None:
    engine = TransportReport(
        "nixl", "yes", True, False, "network", "nixl", "", ("cpu",), fast=True, missing=(), notes=(), exposes="uses X"
    )
    (left_out,) = verdicts([engine], {"cpu"})
    assert (left_out.taken, left_out.reason) == (False, "it uses X; --trusted-fabric allows it")
    (taken,) = verdicts([engine], {"cpu"}, trusted_fabric=True)
    assert taken.taken


if __name__ == "__main__":
    print(examine(sys.argv[1]))
