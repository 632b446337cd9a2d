"""The faults of a soak: transfers break in a transport around the real one, connections are cut from outside."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

from kvroom.errors import TransportError
from kvroom.plan import KVLayout
from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.transports import Transfer, Transport
from kvroom.transports.kit.transfers import failed, started

PLANTED = "a fault planted by the soak"
HOLD_S = 0.03  # while it lasts, dozens of other rooms come and go


class _Held(NamedTuple):
    peer: int
    blocks: Blocks
    grant: bytes
    future: Transfer


class BreakingTransport(Transport):
    """The real transport `inner`, which it owns, made unreliable.

    A transfer that reads a page of `spoiled` moves half of its blocks and fails. A transfer that `delay` selects is in
    flight for `HOLD_S` before its first byte is written: a sink that wrongly assumes a drain gets these bytes late.
    """

    name: ClassVar[str]

    def __init__(self, inner: Transport, layout: KVLayout) -> None:
        type(self).name = inner.name  # peers compare it; a process has one transport
        self.spoiled: set[int] = set()
        self._inner, self.key = inner, inner.key
        self._first = min(layout.regions, key=lambda region: region.base)
        self._slow: set[int] = set()
        self._lock = threading.Lock()
        self._held: list[_Held] = []

    def delay(self, page: int, token: int) -> None:
        """Hold the next transfer that begins at this token of this page of the local pool."""
        self._slow.add(self._first.base + page * self._first.page_stride + token * self._first.token_stride)

    def recover(self, pages: Sequence[int]) -> None:
        """Let transfers from these pages succeed again: the pages will belong to another room."""
        self.spoiled.difference_update(pages)
        if self._slow:
            recovered = {(self._first.base + page * self._first.page_stride) for page in pages}
            for begin in tuple(self._slow):  # a copy, since the loop thread removes entries
                if begin - (begin - self._first.base) % self._first.page_stride in recovered:
                    self._slow.discard(begin)

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        """Move the blocks, unless a fault applies; the real transport checks them."""
        return self._move(peer, blocks, grant) if blocks.src.size else self._inner.submit(peer, blocks, grant)

    def _move(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        slow = self._slow.intersection(blocks.src.tolist()) if self._slow else None
        if slow:
            self._slow -= slow
            return self._hold(_Held(peer, blocks, grant, started()))
        if self.spoiled and (int(blocks.src[0]) - self._first.base) // self._first.page_stride in self.spoiled:
            return self._break(peer, blocks, grant)
        return self._inner.submit(peer, blocks, grant)

    def _break(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        half = blocks.src.size // 2
        if not half:
            return failed(TransportError(PLANTED))
        broken = started()
        moved = self._inner.submit(peer, Blocks(*(part[:half] for part in blocks)), grant)
        moved.add_done_callback(lambda _: broken.set_exception(TransportError(PLANTED)))
        return broken

    def _hold(self, held: _Held) -> Transfer:
        with self._lock:
            self._held.append(held)
        timer = threading.Timer(HOLD_S, self._release, (held,))
        timer.daemon = True
        timer.start()
        return held.future

    def _release(self, held: _Held) -> None:
        with self._lock:
            mine = any(one is held for one in self._held)
            self._held = [one for one in self._held if one is not held]
        if mine:  # otherwise it was fenced
            moved = self._inner.submit(held.peer, held.blocks, held.grant)
            moved.add_done_callback(lambda done: _pass_on(done, held.future))

    def _drop(self, peer: int | None) -> None:
        with self._lock:
            dropped = [one for one in self._held if peer in (None, one.peer)]
            self._held = [one for one in self._held if peer not in (None, one.peer)]
        for one in dropped:
            one.future.set_exception(TransportError("the peer was fenced"))

    def register(self, memory: Sequence[MemoryRange]) -> None:
        self._inner.register(memory)

    def describe(self) -> bytes:
        return self._inner.describe()

    def connect(self, description: bytes) -> int:
        return self._inner.connect(description)

    def watch(self, description: bytes) -> int:
        return self._inner.watch(description)

    def grant(self, extents: Extents) -> bytes:
        return self._inner.grant(extents)

    def bind(self, grant: bytes, peer: int) -> None:
        self._inner.bind(grant, peer)

    def revoke(self, grant: bytes) -> bool:
        return self._inner.revoke(grant)

    def explain(self, peer: int) -> str:
        return self._inner.explain(peer)

    def fence(self, peer: int) -> bool:
        self._drop(peer)
        return self._inner.fence(peer)

    def close(self) -> None:
        self._drop(None)
        self._inner.close()


def _pass_on(done: Transfer, future: Transfer) -> None:
    error = done.exception()
    if error is None:
        future.set_result(done.result())
    else:
        future.set_exception(error)


def cut_connections(port: int) -> int:
    """Shut down every TCP connection that this process has accepted on `port`; return their number.

    Both processes live on. The manager takes no part in it: the sockets are found among the open descriptors, so that
    it is surprised as by a network.
    """
    cut = 0
    for connection in _accepted(port):
        with connection, contextlib.suppress(OSError):  # its peer may have gone in between
            connection.shutdown(socket.SHUT_RDWR)
            cut += 1
    return cut


def _accepted(port: int) -> Iterable[socket.socket]:
    """Yield a duplicate socket for each such connection; the caller closes it."""
    for name in os.listdir("/proc/self/fd"):
        try:
            own = os.dup(int(name))
        except OSError:  # closed in between
            continue
        if not stat.S_ISSOCK(os.fstat(own).st_mode):
            os.close(own)
            continue
        found = socket.socket(fileno=own)
        is_tcp = found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM
        listens = is_tcp and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if is_tcp and not listens and found.getsockname()[1] == port:
            yield found
        else:
            found.close()
