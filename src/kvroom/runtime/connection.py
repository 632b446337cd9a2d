"""One TCP connection between two managers, from its first byte to its last.

    greeting --> waiting --> up --> ended        (any state may go to ended)

greeting: the handshake runs; waiting: both sides have identified themselves, and the side with the lower incarnation
has not sent `Open` yet; up: messages flow. A connection decides nothing about other connections: its owner does, which
is `runtime.link.Links`. The rules of links and their reasons are at the top of that module.

A connection has no task: asyncio calls it as a protocol, and at most one timer is pending. All methods run on the loop.
"""

from __future__ import annotations

import asyncio
import enum
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

from kvroom.core.messages import Message, Peer
from kvroom.errors import KVRoomError, LinkError, RemoteProtocolError
from kvroom.wire.address import HostPort
from kvroom.wire.frames import (
    Control,
    FrameReader,
    Goodbye,
    Inquiry,
    Open,
    Ping,
    Pong,
    Spare,
    decode_envelope,
    encode_envelope,
)
from kvroom.wire.handshake import Handshake, LinkIdentity, Role
from kvroom.wire.keys import RunKey

MAX_CAUSE_CHARS = 1000


@dataclass(frozen=True)
class LinkLimits:
    """Times and sizes of the links of one manager. Both ends may have different limits."""

    heartbeat_s: float = 5.0
    """A peer that sent nothing for this time is pinged; after the same time again its link is lost."""
    connect_s: float = 5.0
    """Limit for opening the TCP connection of a dial."""
    handshake_s: float = 5.0
    """Limit from the TCP connection to an open link; after it the connection is closed."""
    linger_s: float = 1.0
    """Limit for sending the last bytes of a connection that is closing."""
    strangers: int = 64
    """Accepted connections that have not proven the secret yet; beyond this number the oldest one is closed."""
    queue_bytes: int = 64 << 20
    """Bytes that wait for a slow peer; beyond this number the link is lost."""


class State(enum.Enum):
    """The states of a connection; see the module."""

    GREETING = enum.auto()
    WAITING = enum.auto()
    UP = enum.auto()
    ENDED = enum.auto()


class ConnectionOwner(Protocol):
    """The owner of connections, which they call as they progress. Each method but `received` is called at most once."""

    def made(self, connection: Connection) -> None:
        """Note that the socket is connected; the handshake begins."""

    def introduce(self, connection: Connection, peer: Peer) -> LinkIdentity:
        """Return the identity to send to a peer that has proven the secret."""

    def completed(self, connection: Connection) -> None:
        """Note that both identities were exchanged; the state is WAITING."""

    def opened(self, connection: Connection, number: int) -> None:
        """Take the peer's `Open` with this number."""

    def received(self, connection: Connection, seq: int, message: Message | Inquiry) -> None:
        """Take a message of a connection that is UP."""

    def ended(self, connection: Connection, detail: KVRoomError) -> None:
        """Note that the state is ENDED and why; the socket may still be sending."""

    def gone(self, connection: Connection) -> None:
        """Note that the socket is closed."""


class Connection(asyncio.Protocol):
    """One end of a TCP connection. `peer` and `identity` are set once the state is past GREETING."""

    def __init__(
        self,
        owner: ConnectionOwner,
        role: Role,
        secret: bytes,
        me: Peer,
        limits: LinkLimits,
        *,
        dialled: str = "",
        key: RunKey | None = None,
    ) -> None:
        self.role = role
        self.state = State.GREETING
        self.peer: Peer | None = None
        self.identity = LinkIdentity(b"")
        self.claimed_peer: Peer | None = None
        """The peer that the other end stated to be, set once it has proven the secret, together with `attempt`."""
        self.attempt = 0
        """Number of the identity that this side sent here; 0: none yet."""
        self.number = 0
        """Number of the `Open` that made this connection the link."""
        self.spare = False
        """True if the connection ended because another one is the link."""
        self.error: KVRoomError | None = None
        """The reason of its end; None until the state is ENDED."""
        self._loop = asyncio.get_running_loop()
        self.settled: asyncio.Future[None] = self._loop.create_future()
        """Done once the state is UP or ENDED."""
        self.closed: asyncio.Future[None] = self._loop.create_future()
        """Done once the socket is closed."""
        self._owner = owner
        self._me = me
        self._limits = limits
        self._handshake = Handshake(
            role, secret, me, lambda peer: owner.introduce(self, peer), dialled=dialled, key=key
        )
        self._reader = FrameReader(self._handshake.frame_limit_bytes)
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._turn_end: asyncio.Handle | None = None
        self._queue: list[bytes] = []
        self._queue_bytes = 0
        self._heard_s = 0.0
        self._pinged = False

    def __str__(self) -> str:
        if self.peer is not None:
            return str(self.peer)
        remote = self._transport.get_extra_info("peername") if self._transport is not None else None
        return str(HostPort.of_socket(remote)) if remote else "an unconnected socket"

    @property
    def host(self) -> str:
        """Return the numeric address of the other end; empty if the socket is closed."""
        remote = self._transport.get_extra_info("peername") if self._transport is not None else None
        return HostPort.of_socket(remote).host if remote else ""

    # called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self.state is State.ENDED:
            self._transport.abort()
            return
        # A dialler may have dialled the advertised address or the one at which this connection arrived.
        local = self._transport.get_extra_info("sockname")
        self._handshake.own_addresses = frozenset(
            {self._me.address, *([str(HostPort.of_socket(local))] if local else [])}
        )
        late_s = self._limits.handshake_s
        self._set_timer(
            late_s,
            lambda: self.end(LinkError(f"timed out after {late_s} s (handshake_s): no link with {self}"), abrupt=True),
        )
        self._owner.made(self)
        self._write(self._handshake.take())

    def data_received(self, data: bytes) -> None:
        self._heard_s = self._loop.time()
        self._pinged = False
        try:
            self._reader.feed(data)
            while self.state is not State.ENDED and (body := self._reader.next_frame()) is not None:
                self._on_frame(body)
        except RemoteProtocolError as error:
            self.end(error, Goodbye(str(error)[:MAX_CAUSE_CHARS]))
        except LinkError as error:  # a `Refused` of kind "busy": the peer accepts no links for now
            self.end(error)

    def eof_received(self) -> None:
        during = " during the handshake: is it a kvroom manager?" if self.state is State.GREETING else ""
        self.end(LinkError(f"{self} closed the connection{during}"))

    def connection_lost(self, exc: Exception | None) -> None:
        why = "closed here" if exc is None else f"internal error: {exc!r}"
        if isinstance(exc, OSError):
            why = exc.strerror or str(exc)
        detail = LinkError(f"the connection to {self} broke: {why}")
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        self.closed.set_result(None)
        self._owner.gone(self)
        self.end(detail)

    # called by the owner

    def open(self, number: int) -> None:
        """Send `Open`, which makes this connection the link at the peer, and enter UP."""
        self._write(encode_envelope(0, Open(number)))
        self.up(number)

    def up(self, number: int) -> None:
        """Enter UP: messages may be sent and received, and silence of the peer ends the link."""
        self.state = State.UP
        self.number = number
        self._heard_s = self._loop.time()
        self._set_timer(self._limits.heartbeat_s, self._on_heartbeat)
        self.settled.set_result(None)

    @property
    def busy(self) -> bool:
        """True while more than half of `queue_bytes` waits for the peer."""
        return 2 * self._waiting_bytes() > self._limits.queue_bytes

    def send(self, frame: bytes) -> None:
        """Queue one encoded frame; does nothing unless the state is UP. Never blocks and never calls the owner.

        The first frame of a loop turn is written immediately, the others of that turn together at its end. There, too,
        a queue beyond `queue_bytes` ends the link.
        """
        if self.state is not State.UP or self._transport is None:
            return
        if self._turn_end is None:
            self._transport.write(frame)
            self._turn_end = self._loop.call_soon(self._on_turn_end)
        elif self._queue_bytes <= self._limits.queue_bytes:
            self._queue.append(frame)
            self._queue_bytes += len(frame)

    def end(self, detail: KVRoomError, farewell: Control | None = None, *, abrupt: bool = False) -> None:
        """Enter ENDED and close the socket. Only the first call has an effect, so its `detail` is the reason.

        The queue and the `farewell` are sent first, for `linger_s` at most; the farewell only after the handshake. With
        `abrupt` the socket is reset, and what it has not sent is dropped.
        """
        if self.state is State.ENDED:
            return
        if farewell is not None and self._handshake.complete:
            self._write(encode_envelope(0, farewell))
        self._flush()
        self.state = State.ENDED
        self.spare = isinstance(farewell, Spare) or self.spare
        self.error = detail
        if self._transport is not None:
            if abrupt:
                # A FIN would be queued behind bytes that the peer has not acknowledged. In a network that is cut one
                # way, where frames reach the peer and its acknowledgements do not come back, the peer would notice only
                # after another 2 * `heartbeat_s`. A reset (SO_LINGER of 0 s) is sent immediately.
                sock = self._transport.get_extra_info("socket")
                if sock is not None:  # None where the network is a simulation
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._transport.abort()
            else:
                self._set_timer(self._limits.linger_s, self._transport.abort)
                self._transport.close()
        if not self.settled.done():
            self.settled.set_result(None)
        self._owner.ended(self, detail)

    # inside

    def _on_frame(self, body: bytes) -> None:
        if not self._handshake.complete:
            try:
                self._handshake.receive(body)
            finally:
                self._write(self._handshake.take())
            self._reader.limit_bytes = self._handshake.frame_limit_bytes
            hello, identity = self._handshake.peer_hello, self._handshake.peer_identity
            if hello is not None and identity is not None:  # complete: the identity is the last frame
                self.peer, self.identity = hello.peer, identity
                self.state = State.WAITING
                self._owner.completed(self)
            return
        envelope = decode_envelope(body)
        if isinstance(envelope.message, Control):
            self._controls[type(envelope.message)](self, envelope.message)
        elif self.state is State.UP:
            self._owner.received(self, envelope.seq, envelope.message)
        else:
            raise RemoteProtocolError(f"{self} sent a message before the link was open")

    def _on_open(self, message: Open) -> None:
        if self.state is not State.WAITING:
            raise RemoteProtocolError(f"{self} sent Open twice on one connection")
        self._owner.opened(self, message.number)

    def _on_spare(self, _: Spare) -> None:
        self.spare = True
        self.end(LinkError(f"{self} is linked through another connection"))

    _controls: ClassVar[Mapping[type[Control], Callable[[Connection, Any], None]]] = {
        # `Pong` is queued like a message, so that `queue_bytes` also limits a peer that pings and does not read. `send`
        # drops it unless the link is open.
        Ping: lambda self, _: self.send(encode_envelope(0, Pong())),
        Pong: lambda *_: None,  # nothing to do: `data_received` has noted the time
        Open: _on_open,
        Spare: _on_spare,
        Goodbye: lambda self, message: self.end(LinkError(f"{self} ended the link: {message.detail}")),
    }

    def _write(self, data: bytes) -> None:
        if data and self._transport is not None and self.state is not State.ENDED:
            self._flush()
            self._transport.write(data)

    def _flush(self) -> None:
        if self._queue and self._transport is not None:
            self._transport.write(b"".join(self._queue))
            self._queue.clear()
            self._queue_bytes = 0

    def _waiting_bytes(self) -> int:
        return self._queue_bytes + (self._transport.get_write_buffer_size() if self._transport is not None else 0)

    def _on_turn_end(self) -> None:
        """Write what this loop turn has queued, or end the link if the queue is over its limit.

        The limit is not checked in `send`: the driver calls `send` while it carries out a room's effects, and the end
        of a link feeds its rooms.
        """
        self._turn_end = None
        if self.state is State.ENDED or self._transport is None:
            return
        waiting_bytes = self._waiting_bytes()
        if waiting_bytes > self._limits.queue_bytes:
            limit = self._limits.queue_bytes
            self.end(
                LinkError(
                    f"{self} reads too slowly: {waiting_bytes} bytes wait, and the limit is {limit} (queue_bytes)"
                ),
                abrupt=True,
            )
        else:
            self._flush()

    def _on_heartbeat(self) -> None:
        """Ping a peer that was silent for one `heartbeat_s`; end the link if it stays silent for another.

        A stalled loop here must not count as silence of the peer: asyncio reads what arrived during the stall before it
        runs timers, and a link ends only after a ping and a full `heartbeat_s` for its answer.
        """
        idle_s = self._loop.time() - self._heard_s
        heartbeat_s = self._limits.heartbeat_s
        if self._pinged:
            self.end(LinkError(f"{self} was silent for {idle_s:.1f} s"), abrupt=True)
        elif idle_s < heartbeat_s:
            self._set_timer(heartbeat_s - idle_s, self._on_heartbeat)
        else:
            self._write(encode_envelope(0, Ping()))
            self._pinged = True
            self._set_timer(heartbeat_s, self._on_heartbeat)

    def _set_timer(self, delay_s: float, callback: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, callback)
