"""The handles of one transport: small integers that stand for peers, never reused, one per endpoint at a time.

A handle is *attached* (in use), *detached* (fenced without proof, so the peer may still write; it can be fenced again,
or attached again by a new connect), or *forgotten* (fenced with proof).
"""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

from kvroom.errors import TransportError

T = TypeVar("T")


class PeerTable(Generic[T]):
    """A table of endpoints, their handles, and the transport's record of each peer. May be used from any thread."""

    def __init__(self, transport: str) -> None:
        self._transport = transport
        self._changed = threading.Condition()
        self._next = 1
        self._by_handle: dict[int, tuple[bytes, T]] = {}
        self._by_endpoint: dict[bytes, int] = {}
        self._detached: set[int] = set()

    def add(self, endpoint: bytes, value: T) -> int:
        """Attach an endpoint and return its handle. `value` becomes its record unless it was already attached."""
        with self._changed:
            handle = self._by_endpoint.get(endpoint)
            if handle is None:
                handle, self._next = self._next, self._next + 1
                self._by_endpoint[endpoint] = handle
            elif handle not in self._detached:
                return handle
            self._by_handle[handle] = (endpoint, value)
            self._detached.discard(handle)
            self._changed.notify_all()
            return handle

    def attach(self, endpoint: bytes) -> int | None:
        """Return the handle of this endpoint, and attach it again if it was detached; None if there is none."""
        with self._changed:
            handle = self._by_endpoint.get(endpoint)
            if handle is not None:
                self._detached.discard(handle)
            return handle

    def of(self, endpoint: bytes) -> int | None:
        """Return the attached handle of this endpoint, or None."""
        with self._changed:
            handle = self._by_endpoint.get(endpoint)
            return None if handle in self._detached else handle

    def wait_for(self, endpoint: bytes, timeout_s: float) -> T | None:
        """Wait until this endpoint is attached, and return its record, or None after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self.of(endpoint) is not None, timeout_s)
            handle = self.of(endpoint)
            return None if handle is None else self._by_handle[handle][1]

    def find(self, handle: int) -> T | None:
        """Return the record of a handle, or None if it was forgotten. Raise `TransportError` if it never existed."""
        with self._changed:
            if not 0 < handle < self._next:
                raise TransportError(f"{self._transport}: {handle} is not a peer handle; connect() returns them")
            entry = self._by_handle.get(handle)
            return None if entry is None else entry[1]

    def get(self, handle: int) -> T:
        """Return the record of an attached handle. Raise `TransportError` for any other handle."""
        peer = self.find(handle)
        if peer is None or handle in self._detached:
            raise TransportError(f"{self._transport}: peer {handle} was fenced; connect() to it again")
        return peer

    def detach(self, handle: int) -> None:
        """Detach a handle: it is no longer usable, but can be fenced or attached again."""
        with self._changed:
            if handle in self._by_handle:
                self._detached.add(handle)

    def forget(self, handle: int) -> T | None:
        """Forget a handle and return its record, or None if it was already forgotten. Its number is not reused."""
        with self._changed:
            entry = self._by_handle.pop(handle, None)
            if entry is None:
                return None
            del self._by_endpoint[entry[0]]
            self._detached.discard(handle)
            return entry[1]

    def all(self) -> list[int]:
        """Return every handle that is not forgotten."""
        with self._changed:
            return list(self._by_handle)
