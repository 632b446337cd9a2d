"""Hand-offs between managers whose hosts are written in every form: IPv6, every interface, names with addresses."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
from link_helpers import linked

from identities import PROMPT
from kvroom import KVBootstrapServer, KVManager, KVPoll, Timeouts
from kvroom.bootstrap.threads import own_loop
from kvroom.dialling.advertised import advertised_host
from kvroom.dialling.dial import dial
from kvroom.errors import ConfigurationError
from kvroom.runtime.link import LinkLimits
from kvroom.status.server import StatusServer
from kvroom.transports import probe
from kvroom.wire.address import HostPort, loopback_of, parse_address, read_url
from kvroom_lab.pools import TestPool
from resolving import BOTH, needs_ipv6, resolver

SECRET = b"0123456789abcdef0123456789abcdef"
WAIT_S = 60.0
TIMES = Timeouts(bootstrap_s=WAIT_S, waiting_s=WAIT_S, stall_s=WAIT_S, drain_s=5)
NAMES = {"both.test": BOTH, "dead.test": ("127.0.0.9", "127.0.0.1")}
TRANSPORTS = ("local", "tcp", "nixl", "mooncake")
ASCEND = {"part": "kvroom_lab.doubles.memfabric_hybrid", "data_op_type": "HOST_RDMA"}
TOKENS = 11


class Hosts(NamedTuple):
    """The arguments of both managers, and the host of the directory as the decode side knows it."""

    prefill: dict[str, Any]
    decode: dict[str, Any]
    told: str


HOSTS = {
    "loopback": Hosts({"host": "::1"}, {"host": "[::1]"}, "[::1]"),
    "every interface": Hosts(
        {"host": "::", "advertise_host": "::1"}, {"host": "[::]", "advertise_host": "[::1]"}, "[::1]"
    ),
    "one name": Hosts({"host": "both.test"}, {"host": "Both.test."}, "BOTH.TEST."),
    "second address": Hosts(
        {"host": "127.0.0.1", "advertise_host": "both.test"}, {"host": "127.0.0.1", "advertise_host": "both.test"},
        "both.test",
    ),
    "first address": Hosts(
        {"host": "::1", "advertise_host": "both.test"}, {"host": "::1", "advertise_host": "both.test"}, "both.test"
    ),
    "two families": Hosts({"host": "::1"}, {"host": "127.0.0.1"}, "::1"),
    "families crossed": Hosts({"host": "127.0.0.1"}, {"host": "::1"}, "::ffff:127.0.0.1"),
}  # fmt: skip


NAMED = {"one name", "second address", "first address"}


@contextlib.contextmanager
def managers(transport: str, hosts: Hosts, **options: Any) -> Iterator[tuple[KVManager, KVManager, str]]:
    """Open a prefill and a decode manager; yield them with the directory's address as the decode side knows it."""
    given: dict[str, Any] = {"transport": transport, "secret": SECRET, "timeouts": TIMES, **options}
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(KVBootstrapServer(hosts.prefill["host"], secret=SECRET))
        port = parse_address(directory.address).port
        here = str(HostPort(loopback_of(hosts.prefill["host"]), port))
        pools = TestPool(), TestPool()
        for pool in pools:
            stack.callback(pool.close)
        pools[0].fill(3)
        prefill = stack.enter_context(KVManager(pools[0].layout, register_with=here, **hosts.prefill, **given))
        decode = stack.enter_context(KVManager(pools[1].layout, **hosts.decode, **given))
        prefill.pool, decode.pool = pools  # type: ignore[attr-defined]
        yield prefill, decode, str(HostPort.of(hosts.told, port))


def hand_over(prefill: KVManager, decode: KVManager, told: str, room: int) -> str:
    """Hand one room over, compare its bytes, and return the transport that moved them."""
    with prefill.sender(room, identity=PROMPT) as sender, decode.receiver(told, room, identity=PROMPT) as receiver:
        receiver.send_metadata([5, 3, 1], tokens=TOKENS)
        sender.send([2, 4, 6], stop=TOKENS, last=True)
        moved = receiver.wait(WAIT_S)
        sender.wait(WAIT_S)
    sent, got = prefill.pool.tokens([2, 4, 6], TOKENS), decode.pool.tokens([5, 3, 1], TOKENS)  # type: ignore[attr-defined]
    assert np.array_equal(sent, got)
    return moved.transport


def can_run(transport: str) -> None:
    missing = probe(transport).missing
    if missing:
        pytest.skip(f"{transport} cannot run here: {missing[0].what}")


@needs_ipv6
@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.sampled("transport", "hosts")
def test_a_room_is_handed_over_between_these_hosts(transport: str, hosts: str, tmp_path: Path) -> None:
    can_run(transport)
    if transport == "mooncake" and hosts in NAMED:
        in_a_process_with_these_names(tmp_path, transport, hosts)
        return
    with resolver(NAMES):
        hand_over_between(transport, hosts)


def hand_over_between(transport: str, hosts: str) -> None:
    trusted = transport == "mooncake" or hosts in {*NAMED, "every interface"}
    with managers(transport, HOSTS[hosts], trusted_fabric=trusted) as (prefill, decode, told):
        assert hand_over(prefill, decode, told, 7).startswith(transport)


def in_a_process_with_these_names(folder: Path, transport: str, hosts: str) -> None:
    """Repeat the test where the system itself resolves the names: Mooncake does that for its data connections."""
    names = folder / "hosts"
    names.write_text("".join(f"{address} {name}\n" for name, found in NAMES.items() for address in found))
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    if subprocess.run([*alone, f"mount --bind {names} /etc/hosts"], capture_output=True).returncode != 0:
        pytest.skip("this machine gives no user its own mount namespace, in which names can be had")
    here = Path(__file__).parent
    script = f"mount --bind {names} /etc/hosts; exec {sys.executable} -c '{CHILD}' {transport} {hosts!r}"
    path = os.pathsep.join(map(str, (here, here.parent)))
    done = subprocess.run(
        [*alone, script], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=4 * WAIT_S
    )
    assert done.returncode == 0, done.stderr


CHILD = "import sys; from test_addresses import hand_over_between; hand_over_between(*sys.argv[1:])"


@pytest.mark.parametrize("transport", ["local", "tcp", "nixl"])
@pytest.mark.sampled("transport")
def test_an_address_of_a_name_that_nothing_listens_at_is_passed_over(transport: str) -> None:
    can_run(transport)
    name = {"host": "127.0.0.1", "advertise_host": "dead.test"}
    with (
        resolver(NAMES),
        managers(transport, Hosts(name, name, "dead.test"), trusted_fabric=True) as (prefill, decode, told),
    ):
        assert hand_over(prefill, decode, told, 7).startswith(transport)


def link_local() -> str:
    """Return a link-local address of this machine with its interface."""
    path = Path("/proc/net/if_inet6")
    for line in path.read_text().splitlines() if path.exists() else ():
        address, _, _, scope, _, name = line.split()
        if scope == "20":
            return f"{ipaddress.IPv6Address(bytes.fromhex(address))}%{name}"
    pytest.skip("this machine has no link-local IPv6 address")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.sampled("transport")
def test_link_local_addresses_keep_their_interface(transport: str) -> None:
    can_run(transport)
    host = link_local()
    told = f"[{host.replace('%', '%25')}]"
    hosts = Hosts({"host": host}, {"host": told}, told)
    with managers(transport, hosts, trusted_fabric=True) as (prefill, decode, address):
        assert parse_address(prefill.address).host == parse_address(address).host == host
        assert hand_over(prefill, decode, address, 7).startswith(transport)


@needs_ipv6
@pytest.mark.parametrize("hosts", ["loopback", "every interface"])
def test_ascends_engine_gets_an_ipv6_address_in_brackets(hosts: str) -> None:
    with managers("ascend", HOSTS[hosts], transport_options=ASCEND, trusted_fabric=True) as (prefill, decode, told):
        assert hand_over(prefill, decode, told, 7).startswith("ascend")


@needs_ipv6
@pytest.mark.parametrize(("host", "shown"), [("[::1]", "::1"), ("::", "::1"), ("0.0.0.0", "127.0.0.1")])
def test_the_url_of_a_window_can_be_asked(host: str, shown: str) -> None:
    with (
        contextlib.closing(TestPool()) as pool,
        KVManager(pool.layout, transport="tcp", secret=SECRET) as manager,
        StatusServer(manager, host, token=SECRET) as window,
    ):
        assert read_url(window.url) == window.url
        assert urlsplit(window.url).hostname == shown
        with dial(parse_address(window.url.removeprefix("http://")), WAIT_S):
            pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_every_interface_is_advertised_as_an_address_of_this_machine(host: str) -> None:
    try:
        expected = advertised_host(host)
    except ConfigurationError as error:
        pytest.skip(str(error))
    with managers("tcp", Hosts({"host": host}, {"host": host}, expected)) as (prefill, decode, told):
        assert parse_address(prefill.address).host == parse_address(decode.address).host == expected
        assert hand_over(prefill, decode, told, 7).startswith("tcp")


def slow_names(count: int) -> list[str]:
    return [f"slow-{number}.test" for number in range(count)]


def test_a_hundred_rooms_with_slow_names_hold_up_no_other() -> None:
    """While the names of their directories wait to be resolved, a room whose directory has a good name succeeds."""
    slow = slow_names(100)
    name = Hosts({"host": "127.0.0.1"}, {"host": "127.0.0.1"}, "dead.test")
    with (
        resolver(NAMES, slow) as asked,
        managers("tcp", name, bootstrap_allow="any") as (prefill, decode, told),
        contextlib.ExitStack() as rooms,
    ):
        for number, host in enumerate(slow, 100):
            rooms.enter_context(decode.receiver(f"{host}:8998", number, identity=PROMPT))
        asked.wait_asked(*slow)
        hand_over(prefill, decode, told, 7)
        assert not any(asked.answered[host] for host in slow)
        start_s = time.monotonic()
        rooms.close()
        decode.close()
        assert time.monotonic() - start_s < WAIT_S / 3
        assert not any(asked.answered[host] for host in slow)


def test_links_to_slow_names_hold_up_no_other() -> None:
    """A hundred prefill ranks have names that are not resolved; the loop still links with one that has a good name."""
    slow = slow_names(100)

    async def body() -> None:
        async with linked(limits=LinkLimits(connect_s=WAIT_S)) as (a, _), linked(advertise_host="dead.test") as (b, _):
            dials = [asyncio.create_task(a.dial(f"{host}:7000")) for host in slow]
            await asyncio.to_thread(asked.wait_asked, *slow)
            assert await a.dial(b.me.address) == b.me
            assert not any(asked.answered[host] for host in slow)
            await a.close()
            await asyncio.gather(*dials, return_exceptions=True)

    with resolver(NAMES, slow) as asked, contextlib.closing(own_loop()) as loop:
        loop.run_until_complete(body())
        loop.run_until_complete(loop.shutdown_default_executor())


def test_prefill_ranks_with_slow_names_hold_up_no_other() -> None:
    """The name of one sink is not resolved, so `tcp` cannot connect to it: rooms of another sink go on."""
    bad: dict[str, Any] = {"host": "127.0.0.1", "advertise_host": "slow.test"}
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(resolver(NAMES, ["slow.test"]))
        prefill, decode, told = stack.enter_context(managers("tcp", HOSTS_V4))
        pool = TestPool()
        stack.callback(pool.close)
        late = stack.enter_context(KVManager(pool.layout, transport="tcp", secret=SECRET, timeouts=TIMES, **bad))
        sender = stack.enter_context(prefill.sender(8, identity=PROMPT))
        receiver = stack.enter_context(late.receiver(told, 8, identity=PROMPT))
        receiver.send_metadata([5, 3, 1], tokens=TOKENS)
        sender.send([2, 4, 6], stop=TOKENS, last=True)
        asked.wait_asked("slow.test")
        for room in range(10, 13):
            hand_over(prefill, decode, told, room)
        assert not asked.answered["slow.test"]
        start_s = time.monotonic()
        prefill.close()
        assert time.monotonic() - start_s < WAIT_S / 3


HOSTS_V4 = Hosts({"host": "127.0.0.1"}, {"host": "127.0.0.1"}, "127.0.0.1")


def test_a_link_tries_the_next_address_while_one_is_silent() -> None:
    """The first address of the name neither accepts nor refuses a connection, as behind a firewall."""
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.socket())
        silent.bind(("127.0.0.9", 0))
        silent.listen(0)
        stack.enter_context(socket.create_connection(silent.getsockname()))
        stack.enter_context(resolver(NAMES))
        pool = TestPool()
        stack.callback(pool.close)
        options: dict[str, Any] = {"transport": "tcp", "secret": SECRET, "timeouts": TIMES}
        port = silent.getsockname()[1]
        directory = stack.enter_context(KVBootstrapServer(secret=SECRET))
        stack.enter_context(
            KVManager(
                pool.layout, port=port, advertise_host="dead.test", register_with=directory.address, **options
            )
        )  # fmt: skip
        changed = threading.Event()
        limits = LinkLimits(connect_s=WAIT_S, handshake_s=WAIT_S)
        decode = stack.enter_context(KVManager(pool.layout, link_limits=limits, on_change=changed.set, **options))
        start_s = time.monotonic()
        with decode.receiver(directory.address, 7, identity=PROMPT) as receiver:
            while receiver.poll() is not KVPoll.WaitingForInput:  # its prefill ranks are linked
                assert changed.wait(WAIT_S)
                changed.clear()
        assert time.monotonic() - start_s < WAIT_S / 2
