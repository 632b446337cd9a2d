"""The source's connection to the pack server of one sink. Requests go out, replies come in the same order.

For one thread at a time, except `hang_up`. It dials when it is first needed and again after a loss, and only when
nothing of this side is on its way to that sink: dialling says so. See `packing`.
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
_PATIENCE = 10  # a pack server that did not answer is left alone so many times as long as that took, and a second


class PackClient:
    """Asks for slots at one sink's pack server."""

    def __init__(self, name: str, key: DataKey, area: Area) -> None:
        self.area = area
        self.error = ""  # why the pack server did not answer last time
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
        """Whether there is a connection, as far as we know."""
        return self._socket is not None

    def ready(self) -> bool:
        """Whether there is a connection, dialled now if need be; False where the pack server does not answer.

        Nothing of this side is on its way to the sink.
        """
        if self._socket is not None:
            poller = select.poll()
            poller.register(self._socket, select.POLLIN)
            if not poller.poll(0):  # else the sink has ended an idle connection: nothing else can be there to be read
                return True
        self.close()
        start_s = time.monotonic()
        if self._over or start_s < self._not_before_s:
            return False
        try:
            self._socket = self._dial()
            self.reply(self.ask(protocol.HELLO, 0, bytes(protocol.GRANT_BYTES)))
        except (OSError, KVRoomError) as error:
            remedy = loopback_remedy(self._where.host, error)
            self.error = f"{self._name}: the peer's pack server at {self._where} does not answer: {error}{remedy}"
            now_s = time.monotonic()
            self._not_before_s = now_s + 1 + _PATIENCE * (now_s - start_s)
            return False
        self.error = ""
        return True

    def _dial(self) -> socket.socket:
        self._call = Dial(self._where, _CONNECT_S, tune, lambda found: greet(found, self._key, _CONNECT_S))
        if self._over:  # `hang_up` may have come before there was a call
            self._call.hang_up()
        try:
            connection = self._call.connect()
        finally:
            self._call = None
        connection.settimeout(None)
        return connection

    def ask(self, kind: int, slot: int, grant: bytes, runs: ByteRuns | None = None) -> int:
        """Send a request; return its number, for `reply`. Raise `TransportError` if the connection is lost."""
        self._number += 1
        raw = protocol.request(kind, self._number, slot, grant, runs)
        try:
            self._connection().sendall(raw)
        except OSError as error:
            raise self._lost(str(error)) from error
        self._pending.append(self._number)
        return self._number

    def reply(self, number: int) -> PackReply:
        """Wait for the reply to this request. What earlier ones say is kept for `settle`."""
        while True:
            found = self._next()
            if found.number == number:
                return found
            self._refusal = self._refusal or self.refusal(found)

    def refusal(self, answer: PackReply) -> TransportError | None:
        """What a reply says against us, if anything."""
        return protocol.refusal(self._name, answer)

    def settle(self) -> None:
        """Wait for every reply; raise the first refusal among those that `reply` has not returned."""
        while self._pending:
            self._refusal = self._refusal or self.refusal(self._next())
        refusal, self._refusal = self._refusal, None
        if refusal is not None:
            raise refusal

    def _next(self) -> PackReply:
        number, verdict, slot, size = protocol.REPLY.unpack(self._exactly(protocol.REPLY.size))
        text = self._exactly(size).decode(errors="replace")
        if number != self._pending.popleft():
            raise self._lost(f"it answered request {number} out of turn")
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
        """Give the connection up; what is leased over it, the sink quarantines."""
        connection, self._socket = self._socket, None
        self._pending.clear()
        self._refusal = None
        if connection is not None:
            connection.close()

    def hang_up(self) -> None:
        """From another thread: end the connection for good, so that nobody waits on it. Its thread closes it."""
        self._over = True
        call, connection = self._call, self._socket
        if call is not None:
            call.hang_up()
        if connection is not None:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # lost already
                return
