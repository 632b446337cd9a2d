"""Every listener of kvroom that has a thread, closed while it handles a connection.

The listener here accepts a connection and hands it over only once its owner has begun to close.
"""

from __future__ import annotations

import contextlib
import gc
import secrets
import socket
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest

from kvroom.transports.kit import data_socket
from kvroom.transports.kit.data_socket import WriterAdmission, listen
from kvroom.transports.kit.grants import Grants
from kvroom.transports.kit.peers import PeerTable
from kvroom.transports.local import pools
from kvroom.transports.local.pools import PoolServer
from kvroom.transports.onesided.packing.server import PackServer
from kvroom.transports.tcp.transport import TcpTransport

WAIT_S = 20.0


class LateListener(socket.socket):
    """Hands a connection over only after `owner_closes` is set."""

    owner_closes: threading.Event
    accepted: threading.Event

    def accept(self) -> tuple[socket.socket, Any]:
        found = super().accept()
        self.accepted.set()
        assert self.owner_closes.wait(WAIT_S)
        return found


class Case:
    """The owner of a listener, the listener, and a way for a client to reach it."""

    def __init__(self, owner: TcpTransport | PackServer | PoolServer) -> None:
        accepting = owner._accepting if isinstance(owner, PoolServer) else owner._listener._accepting
        (listener,) = cast(list[LateListener], list(accepting._listeners.values()))
        self.close: Callable[[], None] = owner.close
        self.where = listener.getsockname()
        self.family = listener.family
        self.accepted = listener.accepted = threading.Event()
        listener.owner_closes = accepting._closing  # no client has connected so far


def late_listen(host: str, port: int) -> list[LateListener]:
    """Listen as `listen` does, with such listeners."""
    return [LateListener(fileno=listener.detach()) for listener in listen(host, port)]


def tcp(monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(data_socket, "listen", late_listen)
    made = TcpTransport()
    return Case(made)


def packing(monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(data_socket, "listen", late_listen)
    admission = WriterAdmission(bytes(32), PeerTable[Any]("some"), Grants("some"), introduction_s=0)
    made = PackServer(admission, lambda _: True, host="127.0.0.1", advertise=None, address=0, slots=1, slot_bytes=1)
    return Case(made)


def local(monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(pools, "HANDSHAKE_S", 0.05)  # its limit for a client that sends nothing
    monkeypatch.setattr(pools, "socket", types.SimpleNamespace(**{**vars(socket), "socket": LateListener}))
    made = PoolServer(f"kvroom-test-{secrets.token_hex(8)}", bytes(32), [])
    return Case(made)


@pytest.mark.parametrize("make", [tcp, packing, local], ids=lambda make: make.__name__)
def test_a_connection_that_comes_while_a_listener_closes_is_closed_with_it(
    make: Callable[[pytest.MonkeyPatch], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        case = make(monkeypatch)
        with socket.socket(case.family) as client:
            client.settimeout(WAIT_S)
            client.connect(case.where)
            assert case.accepted.wait(WAIT_S)
            case.close()
            assert set(threading.enumerate()) <= before
            with contextlib.suppress(ConnectionError):
                while client.recv(1 << 16):
                    pass
        gc.collect()
    assert [str(one.message) for one in warned] == []
