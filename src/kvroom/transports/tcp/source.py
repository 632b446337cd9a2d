"""The sending end: one thread per peer dials, sends frames straight from the pages, and reads acknowledgements.

It dials at the first transfer and again after a loss; between transfers it sleeps in poll(2). A small transfer that
finds the line idle is sent by the thread that submits it, which saves waking this one. The line is touched under
`_turning` only, and closed before its futures fail, so a future that is done has no byte left to send.
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

_FAREWELL_S = 1.0
_AT_ONCE_BYTES = 1 << 16  # such a frame fits into the socket's buffer: sending it takes microseconds


class Outbound:
    """All transfers to one peer, in order. `stop` is final."""

    def __init__(self, key: DataKey, sink: TcpDescription, connect_s: float) -> None:
        self.key = key
        self.sink = sink
        self._connect_s = connect_s
        self._lock = threading.Lock()
        self._posted: list[FramedTransfer] = []
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._wake = -1
        self._call: Dial | None = None
        self._connection: DataConnection | None = None
        self._queue: deque[FramedTransfer] = deque()
        self._turning = threading.Lock()  # guards the line and the queue; never held while waiting

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
            if not self._sent_at_once(transfer):
                self._posted.append(transfer)
                os.eventfd_write(self._wake, 1)
        return transfer.future

    def _sent_at_once(self, transfer: FramedTransfer) -> bool:
        """Send in this thread if nothing is before it; under `_lock`. What cannot be sent now is left to our thread."""
        if transfer.nbytes > _AT_ONCE_BYTES or self._posted or not self._turning.acquire(blocking=False):
            return False
        try:
            connection = self._connection
            if connection is None or self._queue or connection.sending:
                return False
            self._queue.append(transfer)
            with contextlib.suppress(OSError):  # our thread finds the same fault, and knows what to do
                connection.send(self._queue)
            if connection.sending or self._queue:
                os.eventfd_write(self._wake, 1)
        finally:
            self._turning.release()
        return True

    def stop(self) -> None:
        """Send nothing more and fail what is not acknowledged within a second. Every future is done afterwards."""
        with self._lock:
            self._stopping = True
            thread = self._thread
            if thread is None:
                return
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)
            if self._call is not None:
                self._call.hang_up()
        if thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        while True:
            with self._lock, self._turning:
                self._queue.extend(self._posted)
                self._posted.clear()
                stopping = self._stopping
            if stopping:
                break
            try:
                self._turn(poller)
            except (OSError, KVRoomError) as error:
                if self._stopping:  # `stop` hung up on our call
                    break
                where = HostPort(self.sink.host, self.sink.port)
                remedy = loopback_remedy(where.host, error) if self._connection is None else ""
                self._lose(poller, f"tcp: the connection to {where} failed: {error}{remedy}")
        if self._connection is not None:
            # End our half and wait, a second at most, for the peer's end: then what was sent has landed or never will.
            ending = self._connection
            with contextlib.suppress(OSError):  # not connected any more
                ending.socket.shutdown(socket.SHUT_WR)
            waiting = select.poll()
            waiting.register(ending.socket, select.POLLIN)
            deadline_s = time.monotonic() + _FAREWELL_S
            with contextlib.suppress(OSError, TransportError):  # it is gone: that is the end we were waiting for
                while (left_s := deadline_s - time.monotonic()) > 0:
                    if waiting.poll(left_s * 1000) and not self._receive(ending):
                        break
        self._lose(poller, "tcp: the peer was fenced or the transport closed")
        with self._lock:
            os.close(self._wake)
            self._wake = -1

    def _turn(self, poller: select.poll) -> None:
        """Send what can be sent now, then sleep until something happens and take it in."""
        if self._queue and self._connection is None:
            self._connection = DataConnection(self._dial())
            poller.register(self._connection.socket, select.POLLIN)
        connection = self._connection
        if connection is not None:
            with self._turning:
                connection.send(self._queue)
                sending = connection.sending
            poller.modify(connection.socket, select.POLLIN | (select.POLLOUT if sending else 0))
        for fd, events in poller.poll():
            if fd == self._wake:
                os.eventfd_read(self._wake)
            elif connection is not None and events & ~select.POLLOUT and not self._receive(connection):
                raise TransportError("the peer closed it")

    def _receive(self, connection: DataConnection) -> bool:
        """Take in what has come, finish what has ended; return False at the end of the stream."""
        try:
            with self._turning:
                return connection.receive()
        finally:
            for transfer in connection.take_ended():
                transfer.finish()

    def _dial(self) -> socket.socket:
        """Return a connection to the sink at the first address of its host that proves to be it."""
        where = HostPort(self.sink.host, self.sink.port)
        call = Dial(where, self._connect_s, tune, lambda found: greet(found, self.key, self._connect_s))
        with self._lock:
            self._call = call
            if self._stopping:
                call.hang_up()
        try:
            connection = call.connect()
        finally:
            with self._lock:
                self._call = None
        connection.setblocking(False)
        return connection

    def _lose(self, poller: select.poll, reason: str) -> None:
        """Close the connection and fail every transfer that is not finished."""
        with self._lock, self._turning:
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
            transfer.error = TransportError(
                reason
            )  # also where the sink had refused a part of it: the rest is not known
            transfer.finish()
