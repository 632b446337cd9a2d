"""Lines between the ranks of one engine: what travels on them, and how they come to be.

Rank 0 has a door, the others dial. Both prove the secret as managers do (`kvroom.wire.handshake`) and say which rank
they are; after that a line carries frames in lockstep. Blocking, for the engine's own thread.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import time
from collections.abc import Sequence
from typing import Annotated, cast

import msgspec
from msgspec import Meta

from kvroom.core.messages import Peer, Text
from kvroom.dialling.dial import Dial
from kvroom.errors import ConfigurationError, LinkError, RemoteProtocolError
from kvroom.listening.descriptors import is_exhausted, shortage
from kvroom.listening.repeats import Repeats
from kvroom.listening.sockets import bound
from kvroom.runtime.agreement.rooms import MAX_BODY_BYTES, MAX_ROOMS, AgreementError
from kvroom.wire.address import HostPort, listen_error, os_reason, parse_address
from kvroom.wire.auth import new_incarnation, require_secret
from kvroom.wire.frames import UNDECODABLE, FrameReader, encode_frame
from kvroom.wire.handshake import Handshake, LinkIdentity, Role

logger = logging.getLogger(__name__)
MAX_RANKS = 256
MAX_STRANGERS = 64
MAX_REASON_CHARS = 1000
RETRY_S = 0.1
FAREWELL_S = 1.0
_PART_BYTES = MAX_BODY_BYTES + 1024
_WHOLE_BYTES = MAX_RANKS * _PART_BYTES
_READ_BYTES = 1 << 18

_Rank = Annotated[int, Meta(ge=0, lt=MAX_RANKS)]
_Step = Annotated[int, Meta(ge=0)]
_Values = Annotated[list[int], Meta(max_length=MAX_ROOMS)]


class Join(msgspec.Struct, frozen=True, array_like=True, tag="agreement"):
    """The identity in the handshake: which of how many ranks this is."""

    rank: _Rank
    size: Annotated[int, Meta(ge=1, le=MAX_RANKS)]


class Least(msgspec.Struct, frozen=True, array_like=True, tag="least"):
    """Either way: the values of one rank, or the least of all."""

    step: _Step
    values: _Values


class Gather(msgspec.Struct, frozen=True, array_like=True, tag="gather"):
    """Either way: what one rank gives, or what all gave. Step 0 ends the joining."""

    step: _Step
    bodies: list[bytes]


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """The last frame: why its sender goes."""

    reason: Text


Frame = Least | Gather | Stop
_frames = msgspec.msgpack.Decoder(Frame)
_joins = msgspec.msgpack.Decoder(Join)
_encoder = msgspec.msgpack.Encoder()


class Lost(Exception):
    """A connection is of no use any more; the text says why, as the end of a sentence about its rank."""


class RankSocket:
    """A connection to another rank, past its handshake."""

    def __init__(self, connection: socket.socket, reader: FrameReader) -> None:
        self.socket = connection
        self._reader = reader

    def next(self) -> Frame | None:
        """A frame that is here already."""
        try:
            body = self._reader.next_frame()
            return None if body is None else _frames.decode(body)
        except (RemoteProtocolError, *UNDECODABLE) as error:
            raise Lost(f"sent what is no part of an agreement: {error}") from None

    def read(self) -> Frame | None:
        """Take what has come, and the first frame that is complete with it."""
        if (frame := self.next()) is not None:
            return frame
        try:
            data = self.socket.recv(_READ_BYTES)
        except OSError as error:
            raise Lost(f"is gone: {os_reason(error)}") from None
        if not data:
            raise Lost("closed the connection")
        self._reader.feed(data)
        return self.next()

    def send(self, frame: Frame, until_s: float) -> None:
        try:
            self.socket.settimeout(max(until_s - time.monotonic(), 0.001))
            self.socket.sendall(encode_frame(_encoder.encode(frame), _WHOLE_BYTES))
        except TimeoutError:
            raise Lost("does not read what it is sent") from None
        except OSError as error:
            raise Lost(f"is gone: {os_reason(error)}") from None


class RankDoor:
    """Where the others join rank 0: any number of strangers may knock, and none of them holds up another.

    Who joined is put into `lines`, which belong to the caller whatever happens.
    """

    def __init__(self, size: int, address: str | socket.socket, secret: bytes, lines: dict[int, RankSocket]) -> None:
        self._size = size
        self._secret = secret
        self._lines = lines
        self._listeners = _listen(address, secret)
        self._where = HostPort.of_socket(self._listeners[0].getsockname())
        self._log = Repeats(logger)
        self._incarnation = new_incarnation()
        self._guests: dict[socket.socket, _Greeting] = {}
        self._selector = selectors.DefaultSelector()
        for listener in self._listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)

    def wait(self, until_s: float, join_s: float) -> None:
        """Until all others have joined."""
        while len(self._lines) < self._size - 1:
            ready = self._selector.select(max(until_s - time.monotonic(), 0))
            if not ready and time.monotonic() >= until_s:
                missing = [rank for rank in range(1, self._size) if rank not in self._lines]
                raise AgreementError(cannot_agree(missing, f"did not come within {join_s:g} s; is it up?"))
            for key, _ in ready:
                ready_socket = cast(socket.socket, key.fileobj)
                if ready_socket in self._listeners:
                    self._let_in(ready_socket)
                else:
                    self._hear(ready_socket)

    def close(self) -> None:
        """Send everybody away who has not joined."""
        for guest in list(self._guests):
            self._send_away(guest)
        self._selector.close()
        for listener in self._listeners:
            listener.close()

    def _let_in(self, listener: socket.socket) -> None:
        try:
            guest, _ = listener.accept()
        except OSError as error:  # it has gone again, or no descriptor is left: it stays in the queue
            if is_exhausted(error):
                self._log.warning("rank 0 at %s cannot take connections: %s", self._where, shortage(error))
                time.sleep(RETRY_S)
            return
        try:
            greeting = _Greeting(guest, Role.ACCEPTOR, self._secret, self._incarnation, Join(0, self._size))
        except Lost:
            guest.close()
            return
        if len(self._guests) >= MAX_STRANGERS:
            self._send_away(next(iter(self._guests)))
        self._guests[guest] = greeting
        self._selector.register(guest, selectors.EVENT_READ)

    def _hear(self, guest: socket.socket) -> None:
        greeting = self._guests.get(guest)
        if greeting is None:  # sent away a moment ago
            return
        try:
            line = greeting.read()
        except (RemoteProtocolError, LinkError, Lost) as error:
            self._log.warning("a connection to rank 0 at %s came to nothing: %s", self._where, error)
            self._send_away(guest)
            return
        if line is not None:
            del self._guests[guest]
            self._selector.unregister(guest)
            self._seat(line, greeting.join)

    def _seat(self, line: RankSocket, join: Join) -> None:
        if join.size != self._size:
            refusal = (
                f"rank {join.rank} says that there are {join.size} ranks, rank 0 says {self._size}: start all alike"
            )
        elif not 0 < join.rank < self._size or join.rank in self._lines:
            refusal = f"rank {join.rank} of {self._size} is here already: give each rank a number of its own"
        else:
            self._lines[join.rank] = line
            return
        self._log.warning("a connection to rank 0 at %s was refused: %s", self._where, refusal)
        with contextlib.suppress(Lost):
            line.send(Stop(refusal), time.monotonic() + FAREWELL_S)
        line.socket.close()

    def _send_away(self, guest: socket.socket) -> None:
        del self._guests[guest]
        self._selector.unregister(guest)
        guest.close()


class _Greeting:
    """The handshake on one connection. `join` is what the other says it is, once `read` has returned a line."""

    def __init__(self, connection: socket.socket, role: Role, secret: bytes, incarnation: int, me: Join) -> None:
        self.join = me
        self._socket = connection
        identity = LinkIdentity(_encoder.encode(me))
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            name = str(HostPort.of_socket(connection.getsockname()))
        except OSError as error:
            raise Lost(f"is gone: {os_reason(error)}") from None
        self._handshake = Handshake(role, secret, Peer(name, incarnation), lambda _peer: identity)
        self._reader = FrameReader(self._handshake.frame_limit_bytes)
        self._limit_bytes = _PART_BYTES if role is Role.ACCEPTOR else _WHOLE_BYTES
        self._write()

    def read(self) -> RankSocket | None:
        """Take what has come. `Lost`, `LinkError` or `RemoteProtocolError` when no line can come of it."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except OSError as error:
            raise Lost(f"is gone: {os_reason(error)}") from None
        if not data:
            raise Lost("closed the connection during the handshake")
        self._reader.feed(data)
        while not self._handshake.complete and (body := self._reader.next_frame()) is not None:
            try:
                self._handshake.receive(body)
            finally:
                self._write()
            self._reader.limit_bytes = self._handshake.frame_limit_bytes
        if not self._handshake.complete or self._handshake.peer_identity is None:
            return None
        try:
            self.join = _joins.decode(self._handshake.peer_identity.payload)
        except UNDECODABLE as error:
            raise RemoteProtocolError(f"the peer is no rank of an engine: {error}") from None
        self._reader.limit_bytes = self._limit_bytes
        return RankSocket(self._socket, self._reader)

    def _write(self) -> None:
        try:
            self._socket.sendall(self._handshake.take())
        except OSError as error:
            raise Lost(f"is gone: {os_reason(error)}") from None


def dial(me: Join, address: str, secret: bytes, until_s: float, join_s: float) -> RankSocket:
    """The line to rank 0. It may come later than this rank. `AgreementError` names it and says what was in the way."""
    where = parse_address(address)
    cannot = f"rank {me.rank} cannot join rank 0 at {where}"
    connection = _connect(where, until_s, cannot)
    try:
        greeting = _Greeting(connection, Role.DIALLER, secret, new_incarnation(), me)
        while True:
            connection.settimeout(max(until_s - time.monotonic(), 0.001))
            if (line := greeting.read()) is not None:
                return line
    except (Lost, LinkError, RemoteProtocolError) as error:
        connection.close()
        why = f"rank 0 {error}" if isinstance(error, Lost) else str(error)
        late = f"no answer within {join_s:g} s; does another program listen there?"
        raise AgreementError(f"{cannot}: {late if time.monotonic() >= until_s else why}") from None


def _connect(where: HostPort, until_s: float, cannot: str) -> socket.socket:
    while True:
        try:
            return Dial(where, max(until_s - time.monotonic(), 0.001)).connect()
        except OSError as error:
            if time.monotonic() + RETRY_S >= until_s:
                raise AgreementError(f"{cannot}: {os_reason(error)}; is it up?") from None
        time.sleep(RETRY_S)


def _listen(address: str | socket.socket, secret: bytes) -> list[socket.socket]:
    if isinstance(address, socket.socket):
        require_secret(address.getsockname()[0], secret)
        return [address]
    where = parse_address(address)
    require_secret(where.host, secret)
    with contextlib.ExitStack() as undo:
        try:
            listeners = [undo.enter_context(listener) for listener in bound(where)]
            for listener in listeners:
                listener.listen(MAX_RANKS)
        except OSError as error:
            raise ConfigurationError(listen_error(where, error)) from None
        undo.pop_all()
    return listeners


def cannot_agree(ranks: Sequence[int], why: str) -> str:
    """The sentence of a fault: which ranks, and what is the matter with them."""
    return f"the ranks of this engine cannot agree: rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} {why}"
