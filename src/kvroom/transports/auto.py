"""`auto`: several transports behind one, the best that reaches each peer doing the writing.

Each end chooses for what it writes itself: the first of its candidates that both ends have and that connects. So an end
must reckon with every candidate by which the peer might write here: grants carry a token of each, and a revoke or a
fence is proof only if all of those prove it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.transports.base import OutOfReach, Transfer, Transport
from kvroom.transports.handles import Handles
from kvroom.transports.local import LocalTransport
from kvroom.transports.tcp import TcpTransport
from kvroom.transports.transfers import failed, read_description


class _Description(msgspec.Struct, frozen=True, tag="auto"):
    endpoint: bytes
    parts: dict[str, bytes]


class _Peer(msgspec.Struct, frozen=True):
    """`chosen` writes; `handles` has every candidate by which the peer might write here."""

    chosen: str
    handles: dict[str, int]
    reason: str


def make(
    host: str = "127.0.0.1",
    port: int = 0,
    advertise: str | None = None,
    mode: str = "auto",
    threads: int = 2,
) -> AutoTransport:
    """Return `local` before `tcp`; `host`, `port`, `advertise` are those of `tcp`, `mode` and `threads` of `local`."""
    tcp = TcpTransport(host, port, advertise)  # first: it is the one that can fail, and nothing else is open then
    return AutoTransport([LocalTransport(mode, threads), tcp])


class AutoTransport(Transport):
    """`candidates` in order of preference, of different names, not yet registered. They are closed with this one."""

    name: ClassVar[str] = "auto"

    def __init__(self, candidates: Sequence[Transport]) -> None:
        self.endpoint = secrets.token_bytes(16)
        self._parts = {part.name: part for part in candidates}
        self._handles: Handles[_Peer] = Handles(self.name)

    def register(self, memory: Sequence[MemoryRange]) -> None:
        for part in self._parts.values():
            part.register(memory)

    def describe(self) -> bytes:
        parts = {name: part.describe() for name, part in self._parts.items()}
        return msgspec.msgpack.encode(_Description(self.endpoint, parts))

    def connect(self, description: bytes) -> int:
        described = read_description(description, _Description)
        known = self._handles.of(described.endpoint)
        if known is not None:
            return known
        return self._handles.add(described.endpoint, self._meet(described))

    def _meet(self, described: _Description) -> _Peer:
        chosen, reasons, handles = "", [], {}
        for name, part in self._parts.items():
            if name not in described.parts:
                reasons.append(f"the peer has no {name}")
                continue
            try:
                handles[name] = part.connect(described.parts[name])
            except OutOfReach as error:
                reasons.append(str(error))
            except TransportError as error:
                reasons.append(str(error))
                handles |= _watched(part, described.parts[name])
            else:
                chosen = chosen or name
        if not chosen:
            ours, theirs = ", ".join(self._parts), ", ".join(described.parts)
            raise TransportError(
                f"no transport reaches the peer ({'; '.join(reasons)}): we have {ours}, it has {theirs}"
            )
        return _Peer(chosen, handles, "; ".join(reasons))

    def why(self, peer: int) -> str:
        found = self._handles.get(peer)
        if found.reason:
            return f"{found.chosen}, because {found.reason}"
        return self._parts[found.chosen].why(found.handles[found.chosen])

    def carrier(self, peer: int) -> str:
        return self._handles.get(peer).chosen

    def grant(self, extents: Extents) -> bytes:
        return msgspec.msgpack.encode({name: part.grant(extents) for name, part in self._parts.items()})

    def revoke(self, grant: bytes) -> bool:
        tokens = _tokens(grant)
        unproven = {name for name, part in self._parts.items() if not part.revoke(tokens.get(name, b""))}
        peers = [self._handles.find(handle) for handle in self._handles.all()]
        return not any(peer is not None and unproven & peer.handles.keys() for peer in peers)

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        try:
            found = self._handles.get(peer)
            token = _tokens(grant).get(found.chosen, b"")
        except TransportError as error:
            return failed(error)
        return self._parts[found.chosen].submit(found.handles[found.chosen], blocks, token)

    def fence(self, peer: int) -> bool:
        found = self._handles.find(peer)
        if found is None:
            return True
        self._handles.detach(peer)
        proofs = [self._parts[name].fence(handle) for name, handle in found.handles.items()]
        if all(proofs):
            self._handles.forget(peer)
        return all(proofs)

    def close(self) -> None:
        for part in self._parts.values():
            part.close()
        for handle in self._handles.all():
            self._handles.forget(handle)


def _watched(part: Transport, description: bytes) -> dict[str, int]:
    try:
        return {part.name: part.watch(description)}
    except TransportError:  # its process is gone: it writes nowhere
        return {}


def _tokens(grant: bytes) -> dict[str, bytes]:
    try:
        return msgspec.msgpack.decode(grant, type=dict[str, bytes])
    except msgspec.MsgspecError as error:
        raise TransportError(f"auto: the grant is malformed: {error}") from error
