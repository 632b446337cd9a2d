"""Ports are bound before anything slow starts, and a port in use is reported by name."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from kvroom.cli import ports
from kvroom.cli.ports import bound, free_port, port_of
from kvroom.errors import ConfigurationError
from kvroom.wire.address import HostPort
from resolving import BOTH, needs_ipv6, resolver


def test_a_port_in_use_is_named_with_its_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigurationError, match=f"--port: port {port} on 127.0.0.1 is in use"),
            bound("127.0.0.1", port, "--port"),
        ):
            pass


def test_zero_takes_a_free_port_that_can_then_be_listened_on() -> None:
    with bound("127.0.0.1", 0, "--port") as (sock,):
        sock.listen()
        with socket.create_connection(sock.getsockname()):
            pass


@needs_ipv6
def test_a_name_is_bound_at_each_of_its_addresses_with_one_port() -> None:
    with resolver({"both.test": BOTH}), bound("both.test", 0, "--port") as found:
        assert [HostPort.of_socket(sock.getsockname()) for sock in found] == [(host, port_of(found)) for host in BOTH]


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.1"), bound("192.0.2.1", 0, "--port"):
        pass


def test_a_free_port_can_be_bound_and_is_given_to_no_connection() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    port = free_port("127.0.0.1")
    assert port < lowest or lowest <= 20_000
    with bound("127.0.0.1", port, "--port"):
        pass


def test_no_free_port_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take each of a few ports until none is left; then the port comes from the system's own range."""
    monkeypatch.setattr(ports, "_lowest_of_connections", lambda: ports._LOWEST_PORT + 8)
    given = [free_port("127.0.0.1") for _ in range(9)]
    assert len(set(given)) == 9


def test_without_ports_below_those_of_connections_any_free_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_lowest_of_connections", lambda: 1024)
    with bound("127.0.0.1", free_port("127.0.0.1"), "--port"):
        pass
