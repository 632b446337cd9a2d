"""The source's connection to the pack server of one sink. Replies arrive in the order of the requests.

For one thread at a time, except `hang_up`. The client dials when it is first needed, and again after the connection was
lost, but only while no write of this side to that sink is in flight: the sink takes a new connection as that statement
and frees this side's slots. See the theory of operation in `server.py`.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque

from kvroom.dialling.dial import Dial
from kvroom.errors import KVRoomError, TransportError
from kvroom.transports.kit.data_handshake import greet, tune
from kvroom.transports.kit.data_keys import DataKey
from kvroom.transports.kit.gather import ByteRuns
from kvroom.wire.address import HostPort, loopback_remedy

from . import protocol
from .protocol import Area, PackReply

_CONNECT_S = 5.0
_BACKOFF = 10  # after a failed dial that took t seconds, do not redial for 1 + 10 * t seconds


class PackClient:
    """A client that leases slots from one sink's pack server.

    `name` is the transport's, for errors; `key` proves to the sink which peer this side is.
    """

    def __init__(self, name: str, key: DataKey, area: Area) -> None:
        self.area = area
        self.error = ""  # why the last dial failed; "" after one that succeeded
        self._name = name
        self._key = key
        self._where = HostPort.to_dial(area.host, area.port)
        self._socket: socket.socket | None = None
        self._call: Dial | None = None
        self._number = 0
        self._pending: deque[int] = deque()
        self._refusal: TransportError | None = None
        self._not_before_s = 0.0
        self._over = False

    @property
    def connected(self) -> bool:
        """True while there is a connection, as far as this side can tell without using it."""
        return self._socket is not None

    def ready(self) -> bool:
        """Dial if there is no connection; return False, with `error` set, if the pack server does not answer.

        Call it only while no write of this side to the sink is in flight: a new connection states exactly that. Blocks
        for some seconds at most while it dials, then until the sink has answered.
        """
        if self._socket is not None:
            poller = select.poll()
            poller.register(self._socket, select.POLLIN)
            if not poller.poll(0):  # no reply is due, so anything to read can only be the end of the connection
                return True
        self.close()
        start_s = time.monotonic()
        if self._over or start_s < self._not_before_s:
            return False
        try:
            self._socket = self._dial()
            # The handshake ends before the sink has ended this side's older connections; the reply to HELLO comes after
            # that. A transfer that lost its connection must not be reported as over while the sink still unpacks it.
            self.reply(self.ask(protocol.HELLO, 0, bytes(protocol.GRANT_BYTES)))
        except (OSError, KVRoomError) as error:
            remedy = loopback_remedy(self._where.host, error)
            self.error = f"{self._name}: the peer's pack server at {self._where} does not answer: {error}{remedy}"
            now_s = time.monotonic()
            self._not_before_s = now_s + 1 + _BACKOFF * (now_s - start_s)
            return False
        self.error = ""
        return True

    def _dial(self) -> socket.socket:
        self._call = Dial(self._where, _CONNECT_S, tune, lambda found: greet(found, self._key, _CONNECT_S))
        if self._over:  # `hang_up` may have run before `_call` was set, and would then have found nothing to end
            self._call.hang_up()
        try:
            connection = self._call.connect()
        finally:
            self._call = None
        connection.settimeout(None)
        return connection

    def ask(self, kind: int, slot: int, grant: bytes, runs: ByteRuns | None = None) -> int:
        """Send a request; return its number, for `reply`.

        Raise `TransportError` if the connection is lost; it is closed then, and `ready` dials again.
        """
        self._number += 1
        raw = protocol.request(kind, self._number, slot, grant, runs)
        try:
            self._connection().sendall(raw)
        except OSError as error:
            raise self._lost(str(error)) from error
        self._pending.append(self._number)
        return self._number

    def reply(self, number: int) -> PackReply:
        """Wait for the reply to this request. The first refusal among earlier ones is kept for `settle` to raise."""
        while True:
            found = self._next()
            if found.number == number:
                return found
            self._refusal = self._refusal or self.refusal(found)

    def refusal(self, answer: PackReply) -> TransportError | None:
        """Return the error that a reply reports; None if the request was carried out."""
        return protocol.refusal(self._name, answer)

    def settle(self) -> None:
        """Wait for every reply that is due; raise the first refusal among those that `reply` has not returned."""
        while self._pending:
            self._refusal = self._refusal or self.refusal(self._next())
        refusal, self._refusal = self._refusal, None
        if refusal is not None:
            raise refusal

    def _next(self) -> PackReply:
        number, verdict, slot, size = protocol.REPLY.unpack(self._exactly(protocol.REPLY.size))
        text = self._exactly(size).decode(errors="replace")
        expected = self._pending.popleft()
        if number != expected:
            raise self._lost(f"expected the reply to request {expected}, got that to request {number}")
        return PackReply(number, verdict, slot, text)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = self._connection().recv(size - len(data))
            except OSError as error:
                raise self._lost(str(error)) from error
            if not part:
                raise self._lost("the peer closed it")
            data += part
        return data

    def _connection(self) -> socket.socket:
        if self._socket is None:
            raise TransportError(f"{self._name}: the connection to the peer's pack server was lost")
        return self._socket

    def _lost(self, why: str) -> TransportError:
        self.close()
        return TransportError(f"{self._name}: the connection to the peer's pack server failed: {why}")

    def close(self) -> None:
        """Close the connection; the sink quarantines the slots that are leased over it."""
        connection, self._socket = self._socket, None
        self._pending.clear()
        self._refusal = None
        if connection is not None:
            connection.close()

    def hang_up(self) -> None:
        """End the connection and prevent further dials. For another thread than the client's, which then stops waiting.

        The client's own thread still has to `close` it: the descriptor must not be freed while that thread reads.
        """
        self._over = True
        call, connection = self._call, self._socket
        if call is not None:
            call.hang_up()
        if connection is not None:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # the connection is lost already
                return
