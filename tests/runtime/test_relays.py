"""A relay between two managers that both have the secret passes their frames on unchanged, and gets no link."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Iterator

import pytest
from link_helpers import SECRET, WAIT_S
from manager_helpers import Pair

from kvroom.core.messages import Peer
from kvroom.errors import AuthenticationError
from kvroom.runtime.manager import KVManager
from kvroom.wire.address import parse_address


class Relay:
    """Listens at an address of its own, and carries every byte to and from the victim. `carried` counts them."""

    def __init__(self, victim: str, host: str, port: int) -> None:
        self._victim = parse_address(victim)
        self._listener = socket.create_server((host, port))
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self.carried = 0
        self._sockets = [self._listener]
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def close(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):  # it is closed already
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # `close` ends it
            client, _ = self._listener.accept()
            server = socket.create_connection(self._victim)
            self._sockets += [client, server]
            for ends in ((client, server), (server, client)):
                self._threads.append(threading.Thread(target=self._carry, args=ends))
                self._threads[-1].start()

    def _carry(self, come: socket.socket, go: socket.socket) -> None:
        with contextlib.suppress(OSError):  # one of them is closed
            while data := come.recv(1 << 16):
                self.carried += len(data)
                go.sendall(data)
            go.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def relay(victim: str, host: str = "127.0.0.1", port: int = 0) -> Iterator[Relay]:
    with contextlib.closing(Relay(victim, host, port)) as between:
        yield between


def dial(manager: KVManager, address: str) -> Peer:
    dialling = manager._links.dial(address)
    return manager.loop.run(asyncio.wait_for(dialling, WAIT_S))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"], ids=["another port", "the same port of another host"])
def test_a_relay_at_another_address_is_refused_although_both_ends_know_the_secret(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        contextlib.ExitStack() as stack,
        caplog.at_level(logging.WARNING, "kvroom.runtime.link"),
    ):
        pair = Pair("tcp", stack, secret=SECRET, host="127.0.0.1")
        victim = parse_address(pair.prefill.address)
        port = victim.port if host != victim.host else 0
        between = stack.enter_context(relay(pair.prefill.address, host, port))
        with pytest.raises(AuthenticationError) as told:
            dial(pair.decode, between.address)
        assert between.carried > 0
        assert f"dialled {between.address} and reached {pair.prefill.address}" in str(told.value)
        assert "--advertise-host" in str(told.value)
        assert pair.prefill._links.peers == pair.decode._links.peers == frozenset()
        assert dial(pair.decode, pair.prefill.address) == pair.prefill.me
        logged = [record.getMessage() for record in caplog.records if str(told.value) in record.getMessage()]
        assert len(logged) == 2  # one on each side


@pytest.mark.parametrize("spelling", ["LOCALHOST", "[::ffff:127.0.0.1]", "localhost.", "[0:0:0:0:0:ffff:7f00:1]"])
def test_other_spellings_of_the_same_address_are_no_relay(spelling: str) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("tcp", stack, secret=SECRET, host="127.0.0.1")
        port = parse_address(pair.prefill.address).port
        assert dial(pair.decode, f"{spelling}:{port}") == pair.prefill.me


def test_without_a_secret_nothing_is_proven_and_a_relay_on_loopback_is_let_through() -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("tcp", stack)
        between = stack.enter_context(relay(pair.prefill.address))
        assert dial(pair.decode, between.address) == pair.prefill.me
