"""`memory`: both ends in one process, for tests and simulation. Copies and grants are real; tests inject faults.

One lock guards every endpoint of the process, so no other operation sees a transfer half done: either all of its blocks
have landed or none has. Transfers complete inside `submit` unless `faults` holds them. `auto` never chooses this
transport.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.wire.keys import SigningKey

from .base import Transport
from .kit.descriptions import read_description
from .kit.devices import cpu_memory
from .kit.grants import Grants
from .kit.peers import PeerTable
from .kit.probing import ProbeResult
from .kit.ranges import Ranges
from .kit.transfers import Transfer, TransferRecord


def probe() -> ProbeResult:
    """Return that this transport is always available."""
    return ProbeResult("kvroom", notes=("both ends in one process; for tests",))


class _MemoryDescription(msgspec.Struct, frozen=True, tag="memory"):
    endpoint: bytes


class _Move(TransferRecord):
    def __init__(self, endpoint: bytes, blocks: Blocks, grant: bytes) -> None:
        super().__init__(blocks, grant)
        self.endpoint = endpoint


class _World:
    """All open endpoints of this process, and the lock and condition that they share."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.endpoints: weakref.WeakValueDictionary[bytes, MemoryTransport] = weakref.WeakValueDictionary()


_world = _World()


class Faults:
    """Faults that a test injects into one `MemoryTransport`, while it runs and from any thread.

    - `hold()`: transfers submitted from now on wait. `release(n)` carries out the n oldest; `release()` carries out all
      of them and ends the hold. `wait_held(n, timeout_s)` returns once n transfers wait.
    - `fail_next(n, text)`: the next n transfers fail with `text`, and none of their bytes lands.
    - `proof = False`: behave like a one-sided transport. Grants are not enforced (a late write lands), and `revoke` and
      `fence` prove nothing until the peer is dead.
    - `die()`: behave as if the process was killed. Held transfers fail, no peer can write here, and this endpoint
      writes to no peer.
    """

    def __init__(self, transport: MemoryTransport) -> None:
        self._transport = transport
        self._waiting: list[_Move] = []
        self._holding = False
        self._failures: list[str] = []
        self.proof = True

    @property
    def held(self) -> int:
        """The number of transfers that wait for `release`."""
        with _world.changed:
            return len(self._waiting)

    def hold(self) -> None:
        """Keep every later transfer waiting."""
        with _world.changed:
            self._holding = True

    def release(self, count: int | None = None, *, newest: bool = False) -> None:
        """Carry out the `count` oldest (or newest) held transfers in this thread; None: carry out all, end the hold."""
        with _world.changed:
            if count is None:
                self._holding = False
            border = len(self._waiting) if count is None else count
            if newest:
                self._waiting.reverse()
            moves, self._waiting = self._waiting[:border], self._waiting[border:]
            if newest:
                self._waiting.reverse()
        for move in moves:
            self._transport.carry_out(move)

    def wait_held(self, count: int, timeout_s: float = 5.0) -> None:
        """Return once at least `count` transfers are held; raise `TimeoutError` otherwise."""
        with _world.changed:
            if not _world.changed.wait_for(lambda: len(self._waiting) >= count, timeout_s):
                raise TimeoutError(f"{len(self._waiting)} transfers are held after {timeout_s} s, not {count}")

    def fail_next(self, count: int = 1, text: str = "failed on demand") -> None:
        """Fail the next `count` transfers with this text."""
        with _world.changed:
            self._failures += [text] * count

    def die(self) -> None:
        """Close this endpoint without notifying any peer."""
        self._transport.close()

    def take_failure(self) -> str | None:
        """Return the text with which the next transfer must fail, if any. For the transport itself."""
        with _world.changed:
            return self._failures.pop(0) if self._failures else None

    def keep(self, move: _Move) -> bool:
        """Hold the transfer if transfers are held now. For the transport itself."""
        with _world.changed:
            if self._holding:
                self._waiting.append(move)
                _world.changed.notify_all()
            return self._holding

    def drop(self, endpoint: bytes | None) -> list[_Move]:
        """Remove and return the held transfers to one endpoint, or all of them for None. For the transport itself."""
        with _world.changed:
            gone = [m for m in self._waiting if endpoint in (None, m.endpoint)]
            self._waiting = [m for m in self._waiting if endpoint not in (None, m.endpoint)]
            return gone


class MemoryTransport(Transport):
    """Move blocks between endpoints of one process. Tests inject faults through `faults`."""

    name: ClassVar[str] = "memory"

    def __init__(self) -> None:
        self.key = SigningKey()
        self.endpoint = self.key.public
        self.faults = Faults(self)
        self._peers: PeerTable[bytes] = PeerTable(self.name)
        self._fenced: set[bytes] = set()
        self._grants = Grants(self.name)
        self._open = True
        _world.endpoints[self.endpoint] = self

    def register(self, memory: Sequence[MemoryRange]) -> None:
        self._memory = Ranges.of(cpu_memory(self.name, memory))

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(_MemoryDescription(self.endpoint))

    def connect(self, description: bytes) -> int:
        endpoint = read_description(description, _MemoryDescription).endpoint
        with _world.changed:
            if endpoint not in _world.endpoints:
                raise TransportError("memory: the peer is not an open endpoint of this process")
            self._fenced.discard(endpoint)
            return self._peers.add(endpoint, endpoint)

    def explain(self, peer: int) -> str:
        self._peers.get(peer)
        return "memory: selected by name, both ends are in one process"

    def grant(self, extents: Extents) -> bytes:
        self._memory.check("granted", extents.address, extents.length, "this side registered")
        return self._grants.issue(extents)

    def bind(self, grant: bytes, peer: int) -> None:
        endpoint = self._peers.find(peer)
        if endpoint is not None:
            self._grants.bind(grant, endpoint)

    def revoke(self, grant: bytes) -> bool:
        with _world.changed:
            self._grants.revoke(grant)
            return self.faults.proof

    def _peer_memory(self, peer: int) -> None:
        self._peers.get(peer)  # raises for an unknown handle; the peer checks each write in `admit`

    def _move(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        move = _Move(self._peers.get(peer), blocks, grant)
        if not self.faults.keep(move):
            self.carry_out(move)
        return move.future

    def carry_out(self, move: _Move) -> None:
        """Carry out one transfer now, and complete its future outside the lock. Also called by `Faults.release`."""
        try:
            with _world.changed:
                text = self.faults.take_failure()
                if text is not None:
                    raise TransportError(f"memory: {text}")
                sink = _world.endpoints.get(move.endpoint)
                if sink is None or not self._open:
                    gone = "the peer is gone" if self._open else "this transport is closed"
                    raise TransportError(f"memory: {gone}")
                sink.admit(self.endpoint, move.blocks, move.grant)
                for src, dst, length in zip(*(part.tolist() for part in move.blocks), strict=True):
                    ctypes.memmove(dst, src, length)
        except TransportError as error:
            move.fail(error)
        move.finish()

    def admit(self, source: bytes, blocks: Blocks, grant: bytes) -> None:
        """Raise `TransportError` unless this side, as the sink, allows `source` to write these blocks."""
        self._memory.check("destination", blocks.dst, blocks.length, "the peer registered")
        if not self.faults.proof:
            return
        if source in self._fenced:
            raise TransportError("memory: the peer fenced this endpoint")
        self._grants.check(source, grant, blocks.dst, blocks.length)

    def fence(self, peer: int) -> bool:
        with _world.changed:
            endpoint = self._peers.find(peer)
            proven = self.faults.proof or endpoint not in _world.endpoints
            if endpoint is None:
                return True
            self._fenced.add(endpoint)
            dropped = self.faults.drop(endpoint)
            self._peers.detach(peer)
            if proven:
                self._peers.forget(peer)
        for move in dropped:
            move.fail(TransportError("memory: the peer was fenced"))
            move.finish()
        return proven

    def close(self) -> None:
        with _world.changed:
            self._open = False
            _world.endpoints.pop(self.endpoint, None)
            self._grants.revoke_all()
            self._fenced.clear()
            dropped = self.faults.drop(None)
        for move in dropped:
            move.fail(TransportError("memory: this transport was closed"))
            move.finish()
