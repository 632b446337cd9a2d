"""Connections between simulated processes. As with TCP, bytes arrive complete and in order, or the connection is lost.

Each direction carries bytes, then perhaps an end (FIN) or a reset. A partition holds what is in flight until it is
healed; a machine that is down answers nothing; the machine of a dead process resets its connections. Bytes that the
reader has not taken count against the sender, so a stopped process is a slow consumer.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable
from typing import Any

from .world import Process, World

Address = tuple[str, int]


class Network:
    """The listeners, the blocked directions and the latency."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.latency_s = 0.001
        self.window_bytes = 4096
        """The number of bytes that the kernels between two processes hold, before bytes wait in the sender."""
        self.listeners: dict[Address, Listener] = {}
        self.sockets: list[Socket] = []
        self.registered: dict[Address, int] = {}
        """The incarnation that registered last at each address, as a directory lists it."""
        self.blocked: set[tuple[str, str]] = set()
        """(sender, receiver) by name. The new process at an old address has another name, so it is not blocked."""
        self._waiting: list[asyncio.Future[None]] = []

    def delay(self) -> float:
        return self.latency_s * self.world.random.uniform(0.2, 2.0)

    def passes(self, sender: Process, receiver: Process) -> bool:
        return not (sender.cut or receiver.cut or (sender.name, receiver.name) in self.blocked)

    def block(self, sender: str, receiver: str) -> None:
        self.blocked.add((sender, receiver))

    def heal(self, *ways: tuple[str, str]) -> None:
        """Open these directions, or all if none is given; everything held in them arrives now."""
        self.blocked.difference_update(ways or set(self.blocked))
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
        for socket in self.sockets:
            socket.unblock()

    def sockets_of(self, process: Process) -> list[Socket]:
        return [socket for socket in self.sockets if socket.process is process]

    def vanish(self, process: Process, *, host: bool) -> None:
        """End a process. Its machine closes its connections, unless the machine died too."""
        process.kill()
        process.cut = False  # its death is known
        process.host_up = not host
        if self.listeners.get(process.address) is not None and self.listeners[process.address].process is process:
            del self.listeners[process.address]
        for socket in self.sockets_of(process):
            if not host:
                socket.send_end(reset=self.world.chance(0.5))
            socket.open = False

    async def listen(self, process: Process, factory: Callable[[], asyncio.Protocol], address: Address) -> Listener:
        if address in self.listeners:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return Listener(self, process, factory, address)

    async def connect(
        self, process: Process, factory: Callable[[], asyncio.Protocol], address: Address
    ) -> tuple[Socket, asyncio.Protocol]:
        await asyncio.sleep(self.delay())
        while True:
            listener = self.listeners.get(address)
            if (
                listener is not None
                and self.passes(process, listener.process)
                and self.passes(listener.process, process)
            ):
                break
            if listener is None and not process.cut and self.world.chance(0.8):
                raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
            silence = process.create_future()  # no answer, until the caller times out or the direction opens
            self._waiting.append(silence)
            await silence
        near, far = Socket(self, process), Socket(self, listener.process)
        near.peer, far.peer = far, near
        self.sockets += [near, far]
        listener.process.call_soon(far.begin, listener.factory)
        return near, near.begin(factory)


class Listener:
    """A listener: the part of `kvroom.listening.acceptor.Acceptor` that links use."""

    def __init__(
        self, network: Network, process: Process, factory: Callable[[], asyncio.Protocol], address: Address
    ) -> None:
        self.network, self.process, self.factory, self.address = network, process, factory, address
        self.port = address[1]

    def start(self) -> None:
        self.network.listeners[self.address] = self

    async def close(self) -> None:
        if self.network.listeners.get(self.address) is self:
            del self.network.listeners[self.address]


class Socket(asyncio.Transport):
    """One end of a connection, and the bytes in flight from it."""

    peer: Socket
    protocol: asyncio.Protocol

    def __init__(self, network: Network, process: Process) -> None:
        super().__init__()
        self.network, self.process = network, process
        self.world = network.world
        self.open = True
        """True while this end still delivers to its protocol."""
        self.sent_end = False
        self.lost = False
        """True once the protocol was informed that the connection is gone."""
        self.unread = 0
        self._last_arrival = 0.0
        self._held: deque[bytes | str] = deque()
        """Bytes and ends that a blocked direction holds, in order."""

    # -- called by the protocol -----------------------------------------------------------------------------------

    def write(self, data: Any) -> None:
        if not self.sent_end:
            self.unread += len(data)
            self._send(bytes(data))

    def get_write_buffer_size(self) -> int:
        return max(0, self.unread - self.network.window_bytes)

    def close(self) -> None:
        """Send what is queued, then the end; incoming bytes are dropped from here on."""
        if self.open:
            self.open = False
            self._close_when_sent()

    def abort(self) -> None:
        if not self.sent_end:
            self.send_end(reset=True)
            self.open = False
            self.process.call_soon(self._lost, None)

    def is_closing(self) -> bool:
        return not self.open

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.peer.process.address if name == "peername" else default

    def reset_both(self) -> None:
        """Reset the connection at both ends, as a device between the two machines would."""
        for end in (self, self.peer):
            end.sent_end = True
            end.process.call_soon(end.take, "reset")

    # -- in flight ------------------------------------------------------------------------------------------------

    def send_end(self, *, reset: bool) -> None:
        if not self.sent_end:
            self.sent_end = True
            self._send("reset" if reset else "end")

    def unblock(self) -> None:
        while self._held and self.network.passes(self.process, self.peer.process):
            self._travel(self._held.popleft())

    def _send(self, item: bytes | str) -> None:
        if isinstance(item, bytes) and len(item) > 1 and self.world.chance(0.1):
            cut = self.world.random.randrange(1, len(item))
            self._travel(item[:cut])
            item = item[cut:]
        self._travel(item)

    def _travel(self, item: bytes | str) -> None:
        self._last_arrival = max(self._last_arrival, self.world.now + self.network.delay())
        self.world.at(self._last_arrival, lambda: self._arrive(item))

    def _arrive(self, item: bytes | str) -> None:
        there = self.peer
        if self._held or not self.network.passes(self.process, there.process):
            self._held.append(item)
        elif not there.process.alive or not (there.open or item == "reset"):
            self._bounce(item)
        else:
            there.process.call_soon(there.take, item)

    def _bounce(self, item: bytes | str) -> None:
        """Drop an item that cannot be delivered. The receiver's machine answers bytes with a reset, if it runs."""
        there = self.peer
        if isinstance(item, bytes):
            self._taken(len(item))
            if there.process.host_up and self.open and self.process.alive:
                there.sent_end = True
                there._travel("reset")  # noqa: SLF001 - the other end of this socket

    def _taken(self, nbytes: int) -> None:
        self.unread -= nbytes
        self._close_when_sent()

    def _close_when_sent(self) -> None:
        if not self.open and not self.sent_end and not self.get_write_buffer_size():
            self.send_end(reset=False)
            self.process.call_soon(self._lost, None)

    # -- in the loop of the process that owns this end ------------------------------------------------------------

    def begin(self, factory: Callable[[], asyncio.Protocol]) -> asyncio.Protocol:
        """Connect the protocol, before any byte reaches it."""
        self.protocol = factory()
        self.protocol.connection_made(self)
        return self.protocol

    def take(self, item: bytes | str) -> None:
        """Deliver an item from the peer: bytes, "end" or "reset"."""
        if isinstance(item, bytes):
            self.peer._taken(len(item))  # noqa: SLF001
            if self.open:
                self.protocol.data_received(item)
        elif item == "reset":
            self.open = False
            self.sent_end = True
            self._lost(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"))
        elif self.open and not self.protocol.eof_received():
            self.close()

    def _lost(self, error: Exception | None) -> None:
        if not self.lost:
            self.lost = True
            self.protocol.connection_lost(error)
