"""The sending end: one thread per peer dials, sends frames straight from the pages, and reads acknowledgements.

That thread alone touches the socket and finishes futures, so a future that is done has no byte left to send. It dials
at the first transfer and again after a loss; between transfers it sleeps in poll(2).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from kvroom.errors import KVRoomError, TransportError
from kvroom.plan.blocks import Blocks
from kvroom.transports.base import Transfer
from kvroom.transports.iovec import Segments, SocketCalls
from kvroom.transports.tcp_frames import (
    ACK,
    MOST_BLOCKS,
    MOST_BYTES,
    Description,
    frame_head,
    greet,
    refusal,
    tune,
)
from kvroom.transports.transfers import cut, failed, started

_FAREWELL_S = 1.0


class _Job:
    """One transfer: what is left to send of it, and how many of its frames are not acknowledged yet."""

    def __init__(self, blocks: Blocks, grant: bytes) -> None:
        self.future = started()
        self.nbytes = blocks.nbytes
        self.grant = grant
        self.blocks, runs = cut(blocks, MOST_BLOCKS, MOST_BYTES)
        self.runs = deque(runs)
        self.unacknowledged = 0
        self.refusal: TransportError | None = None

    def acknowledge(self, refusal: TransportError | None) -> None:
        """Take one acknowledgement; after a refusal no further frame is sent."""
        self.unacknowledged -= 1
        if refusal:
            self.refusal = self.refusal or refusal
            self.runs.clear()
        if not self.runs and not self.unacknowledged:
            if self.refusal:
                self.future.set_exception(self.refusal)
            else:
                self.future.set_result(self.nbytes)


class _Line:
    """An established connection: the frame that is being sent, and the frames that wait for their acknowledgement."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._calls = SocketCalls(connection.fileno())
        self._segments: Segments | None = None
        self._sent: dict[int, _Job] = {}
        self._number = 0
        self._acks = bytearray()

    @property
    def sending(self) -> bool:
        """Whether a frame is partly sent."""
        return self._segments is not None

    @property
    def jobs(self) -> list[_Job]:
        """The transfers with a frame on this line."""
        return list(self._sent.values())

    def send(self, queue: deque[_Job]) -> None:
        """Send until the queue is empty or the socket is full."""
        while self._segments is not None or queue:
            if self._segments is None and not self._next_frame(queue):
                continue
            if self._segments is not None and not self._calls.send(self._segments):
                return
            if self._segments is not None and not self._segments.left:
                self._segments = None

    def _next_frame(self, queue: deque[_Job]) -> bool:
        job = queue[0]
        if not job.runs:  # all sent, or refused meanwhile
            queue.popleft()
            return False
        start, stop = job.runs.popleft()
        src, dst, length = (part[start:stop] for part in job.blocks)
        self._number += 1
        self._sent[self._number] = job
        job.unacknowledged += 1
        self._segments = Segments(src, length, head=frame_head(self._number, job.grant, dst, length))
        return True

    def receive(self) -> bool:
        """Take the acknowledgements that are there; return False at the end of the stream."""
        data = self.socket.recv(1 << 16)
        self._acks += data
        while len(self._acks) >= ACK.size:
            number, code, size = ACK.unpack_from(self._acks)
            if len(self._acks) < ACK.size + size:
                break
            text = self._acks[ACK.size : ACK.size + size].decode(errors="replace")
            del self._acks[: ACK.size + size]
            if number not in self._sent or (self.sending and number == self._number):
                raise TransportError(f"the peer acknowledged frame {number}, which was not sent")
            self._sent.pop(number).acknowledge(refusal(code, text))
        return bool(data)


class Outbound:
    """All transfers to one peer, in order. `stop` is final."""

    def __init__(self, own: bytes, sink: Description, connect_s: float) -> None:
        self._own = own
        self.sink = sink
        self._connect_s = connect_s
        self._lock = threading.Lock()
        self._posted: list[_Job] = []
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._wake = -1
        self._dialing: socket.socket | None = None
        self._line: _Line | None = None
        self._queue: deque[_Job] = deque()

    def submit(self, blocks: Blocks, grant: bytes) -> Transfer:
        """Queue a transfer of at least one block and return its future. Never blocks."""
        job = _Job(blocks, grant)
        with self._lock:
            if self._stopping:
                return failed(TransportError("tcp: the peer was fenced or the transport closed"))
            self._posted.append(job)
            if self._thread is None:
                self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._thread = threading.Thread(target=self._run, name="kvroom-tcp-source", daemon=True)
                self._thread.start()
            os.eventfd_write(self._wake, 1)
        return job.future

    def stop(self) -> None:
        """Send nothing more and fail what is not acknowledged within a second. Every future is done afterwards."""
        with self._lock:
            self._stopping = True
            thread = self._thread
            if thread is None:
                return
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)
            if self._dialing is not None:
                _hang_up(self._dialing, socket.SHUT_RDWR)
        if thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        while self._take():
            try:
                self._turn(poller)
            except (OSError, KVRoomError) as error:
                if self._stopping:  # `stop` hung up on our dialling
                    break
                self._lose(poller, f"tcp: the connection to {self.sink.host}:{self.sink.port} failed: {error}")
        if self._line is not None:
            self._farewell(self._line)
        self._lose(poller, "tcp: the peer was fenced or the transport closed")
        with self._lock:
            os.close(self._wake)
            self._wake = -1

    def _take(self) -> bool:
        """Move what was posted into the queue; return False when it is time to stop."""
        with self._lock:
            self._queue.extend(self._posted)
            self._posted.clear()
            return not self._stopping

    def _turn(self, poller: select.poll) -> None:
        """Send what can be sent now, then sleep until something happens and take it in."""
        if self._queue and self._line is None:
            self._line = _Line(self._dial())
            poller.register(self._line.socket, select.POLLIN)
        line = self._line
        if line is not None:
            line.send(self._queue)
            poller.modify(line.socket, select.POLLIN | (select.POLLOUT if line.sending else 0))
        for fd, events in poller.poll():
            if fd == self._wake:
                os.eventfd_read(self._wake)
            elif line is not None and events & ~select.POLLOUT and not line.receive():
                raise TransportError("the peer closed it")

    def _dial(self) -> socket.socket:
        host, port = self.sink.host, self.sink.port
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        connection = socket.socket(family, kind, protocol)
        with contextlib.ExitStack() as undo:
            undo.callback(self._end_dial, connection.close)
            with self._lock:
                self._dialing = connection
            tune(connection)
            connection.settimeout(self._connect_s)
            connection.connect(address)
            greet(connection, self._own, self.sink, self._connect_s)
            connection.setblocking(False)
            undo.pop_all()
        self._end_dial()
        return connection

    def _end_dial(self, close: Callable[[], None] | None = None) -> None:
        with self._lock:  # `stop` may be about to hang up on the socket: it must not be closed under its hands
            self._dialing = None
            if close is not None:
                close()

    def _lose(self, poller: select.poll, reason: str) -> None:
        """Close the connection and fail every transfer that is not finished."""
        jobs = [*self._queue]
        self._queue.clear()
        if self._line is not None:
            jobs = self._line.jobs + jobs
            poller.unregister(self._line.socket)
            self._line.socket.close()
            self._line = None
        with self._lock:
            if self._stopping:
                jobs += self._posted
                self._posted.clear()
        for future in {id(job): job.future for job in jobs if not job.future.done()}.values():
            future.set_exception(TransportError(reason))

    @staticmethod
    def _farewell(line: _Line) -> None:
        """End our half and wait, a second at most, for the peer's end: then what was sent has landed or never will."""
        _hang_up(line.socket, socket.SHUT_WR)
        poller = select.poll()
        poller.register(line.socket, select.POLLIN)
        deadline_s = time.monotonic() + _FAREWELL_S
        try:
            while (left_s := deadline_s - time.monotonic()) > 0:
                if poller.poll(left_s * 1000) and not line.receive():
                    return
        except (OSError, TransportError):  # the connection is gone: that is the end we were waiting for
            return


def _hang_up(connection: socket.socket, how: int) -> None:
    try:
        connection.shutdown(how)
    except OSError:  # not connected any more
        return
