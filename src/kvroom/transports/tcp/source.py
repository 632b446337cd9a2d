"""The sending end: one thread per peer dials, sends frames straight from the pages, and reads acknowledgements.

The peer's thread dials at the first transfer and again after a lost connection; between transfers it sleeps in poll(2).
If the connection is idle, the thread that submits a small transfer sends it itself, which saves waking the peer's
thread. The connection is used only under `_connection_lock`, and it is closed before the futures of its transfers fail,
so a completed future has no byte left to send.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque

from kvroom.dialling.dial import Dial
from kvroom.errors import KVRoomError, TransportError
from kvroom.plan.blocks import Blocks
from kvroom.transports.kit.data_handshake import greet, tune
from kvroom.transports.kit.data_keys import DataKey
from kvroom.transports.kit.transfers import Transfer, failed
from kvroom.wire.address import HostPort, loopback_remedy

from .connection import DataConnection, FramedTransfer
from .frames import TcpDescription

_SHUTDOWN_S = 1.0
_INLINE_BYTES = 1 << 16  # a frame of this size fits into the socket's buffer, so sending it takes microseconds


class Outbound:
    """The queue of transfers to one peer, which are sent in order. After `stop`, every new transfer fails."""

    def __init__(self, key: DataKey, sink: TcpDescription, connect_s: float) -> None:
        self.key = key
        self.sink = sink
        self._connect_s = connect_s
        self._lock = threading.Lock()
        self._posted: list[FramedTransfer] = []
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._wake = -1
        self._dialling: Dial | None = None
        self._connection: DataConnection | None = None
        self._queue: deque[FramedTransfer] = deque()
        self._connection_lock = threading.Lock()  # guards the connection and the queue; never held while waiting

    def submit(self, blocks: Blocks, grant: bytes) -> Transfer:
        """Queue a transfer of at least one block and return its future. Never blocks."""
        transfer = FramedTransfer(blocks, grant)
        with self._lock:
            if self._stopping:
                return failed(TransportError("tcp: the peer was fenced or the transport closed"))
            if self._thread is None:
                self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._thread = threading.Thread(target=self._run, name="kvroom-tcp-source", daemon=True)
                self._thread.start()
            if not self._sent_inline(transfer):
                self._posted.append(transfer)
                os.eventfd_write(self._wake, 1)
        return transfer.future

    def _sent_inline(self, transfer: FramedTransfer) -> bool:
        """Send the transfer in the calling thread if nothing is queued. Called under `_lock`.

        The peer's thread sends what the socket does not accept now.
        """
        if transfer.nbytes > _INLINE_BYTES or self._posted or not self._connection_lock.acquire(blocking=False):
            return False
        try:
            connection = self._connection
            if connection is None or self._queue or connection.sending:
                return False
            self._queue.append(transfer)
            with contextlib.suppress(OSError):  # the peer's thread gets the same error and handles it
                connection.send(self._queue)
            if connection.sending or self._queue:
                os.eventfd_write(self._wake, 1)
        finally:
            self._connection_lock.release()
        return True

    def stop(self) -> None:
        """Stop sending, and fail the transfers that are not acknowledged within a second. May be called again.

        Afterwards every future is completed. If the sink answered within that second, no byte is in transit any longer;
        otherwise bytes of failed transfers may still land until the sink revokes their grants.
        """
        with self._lock:
            self._stopping = True
            thread = self._thread
            if thread is None:
                return
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)
            if self._dialling is not None:
                self._dialling.hang_up()
        if thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        while True:
            with self._lock, self._connection_lock:
                self._queue.extend(self._posted)
                self._posted.clear()
                stopping = self._stopping
            if stopping:
                break
            try:
                self._turn(poller)
            except (OSError, KVRoomError) as error:
                if self._stopping:  # `stop` cancelled the dialling
                    break
                where = HostPort(self.sink.host, self.sink.port)
                remedy = loopback_remedy(where.host, error) if self._connection is None else ""
                self._lose(poller, f"tcp: the connection to {where} failed: {error}{remedy}")
        if self._connection is not None:
            # Shut down the sending half, and wait a second at most for the peer to close its half. Once it has, every
            # byte that was sent has either landed or will never land.
            ending = self._connection
            with contextlib.suppress(OSError):  # no longer connected
                ending.socket.shutdown(socket.SHUT_WR)
            waiting = select.poll()
            waiting.register(ending.socket, select.POLLIN)
            deadline_s = time.monotonic() + _SHUTDOWN_S
            with contextlib.suppress(OSError, TransportError):  # a lost connection has ended, too
                while (left_s := deadline_s - time.monotonic()) > 0:
                    if waiting.poll(left_s * 1000) and not self._receive(ending):
                        break
        self._lose(poller, "tcp: the peer was fenced or the transport closed")
        with self._lock:
            os.close(self._wake)
            self._wake = -1

    def _turn(self, poller: select.poll) -> None:
        """Send what the socket accepts now, then sleep until an event and process it."""
        if self._queue and self._connection is None:
            self._connection = DataConnection(self._dial())
            poller.register(self._connection.socket, select.POLLIN)
        connection = self._connection
        if connection is not None:
            with self._connection_lock:
                connection.send(self._queue)
                sending = connection.sending
            poller.modify(connection.socket, select.POLLIN | (select.POLLOUT if sending else 0))
        for fd, events in poller.poll():
            if fd == self._wake:
                os.eventfd_read(self._wake)
            elif connection is not None and events & ~select.POLLOUT and not self._receive(connection):
                raise TransportError("the peer closed the connection")

    def _receive(self, connection: DataConnection) -> bool:
        """Process acknowledgements and complete their transfers. Return False at the end of the stream."""
        try:
            with self._connection_lock:
                return connection.receive()
        finally:
            for transfer in connection.take_ended():
                transfer.finish()

    def _dial(self) -> socket.socket:
        """Return a connection to the first address of the sink's host that proves to be the sink."""
        where = HostPort(self.sink.host, self.sink.port)
        attempt = Dial(where, self._connect_s, tune, lambda found: greet(found, self.key, self._connect_s))
        with self._lock:
            self._dialling = attempt
            if self._stopping:
                attempt.hang_up()
        try:
            connection = attempt.connect()
        finally:
            with self._lock:
                self._dialling = None
        connection.setblocking(False)
        return connection

    def _lose(self, poller: select.poll, reason: str) -> None:
        """Close the connection and fail every transfer that is not completed."""
        with self._lock, self._connection_lock:
            transfers = [*self._queue]
            self._queue.clear()
            if self._connection is not None:
                transfers = self._connection.transfers + transfers
                poller.unregister(self._connection.socket)
                self._connection.socket.close()
                self._connection = None
            if self._stopping:
                transfers += self._posted
                self._posted.clear()
        for transfer in {id(transfer): transfer for transfer in transfers if not transfer.future.done()}.values():
            # Replaces an earlier refusal, too: the sink refused one frame, and the fate of the others is not known.
            transfer.error = TransportError(reason)
            transfer.finish()
