"""`auto`: several transports behind one. For each peer, it writes by the best transport that reaches that peer.

The set of candidates is fixed when memory is registered: the transports that run here, move all of that memory, and are
worth starting (see `choice`). Each end then chooses the transport of its own writes: the first of its candidates that
both ends have and that connects. The two ends may choose differently, so an end has to allow for every candidate by
which the peer might write here: a grant carries a token of each, and a revoke or a fence is proof only if all of them
prove it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Annotated, ClassVar, Literal, NamedTuple

import msgspec
from msgspec import Meta

from kvroom.errors import ConfigurationError, KVRoomError, TransportError
from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.transports import REGISTRY, create
from kvroom.transports.base import DESCRIPTION_BYTES, MalformedDescription, OutOfReach, Transport
from kvroom.transports.kit import claims
from kvroom.transports.kit.descriptions import read_description
from kvroom.transports.kit.devices import kind_of
from kvroom.transports.kit.options import ListeningOptions, Port, TransportOptions
from kvroom.transports.kit.peers import PeerTable
from kvroom.transports.kit.probing import ProbeResult
from kvroom.transports.kit.transfers import Transfer, failed
from kvroom.wire.frames import UNDECODABLE
from kvroom.wire.keys import SigningKey

from .choice import report_on, verdicts


class _AutoDescription(msgspec.Struct, frozen=True, tag="auto"):
    """The signed claim of each candidate, with this endpoint as its owner."""

    endpoint: bytes
    parts: dict[str, bytes]


class _AutoPeer(msgspec.Struct, frozen=True):
    """A connected peer."""

    endpoint: bytes
    chosen: str
    """The candidate that writes to the peer."""
    handles: dict[str, int]
    """The handles of all candidates by which the peer might write here."""
    reason: str
    """The reasons against the candidates before `chosen`."""


class Candidate(NamedTuple):
    """A transport that may be used. `reason` states why it is left out, and is "" for one that is used."""

    name: str
    make: Callable[[], Transport]
    reason: str = ""


Shortlist = Callable[[Set[str]], Sequence[Candidate]]
"""A function from kinds of memory ("cpu", "cuda", ...) to the candidates for them, in order of preference."""


class AutoOptions(ListeningOptions, frozen=True, kw_only=True):
    """Options of `auto`, passed on to the candidates that have them. Their other options keep their defaults."""

    port: Annotated[Port, Meta(description="`port` of `tcp`")] = 0
    mode: Annotated[Literal["auto", "vm", "shm"], Meta(description="`mode` of `local`")] = "auto"
    threads: Annotated[int, Meta(ge=1, description="`threads` of `local`")] = 2
    trusted_fabric: Annotated[bool, Meta(description="also use engines that do not authenticate peers")] = False

    def shortlist(self, kinds: Set[str]) -> list[Candidate]:
        """Return the registry's transports in order, each with a verdict for memory of these kinds."""
        own: dict[str, dict[str, object]] = {
            "local": {"mode": self.mode, "threads": self.threads},
            "tcp": {"port": self.port},
        }
        rows = [report_on(name) for name, entry in REGISTRY.items() if entry.auto]
        found = []
        for verdict in verdicts(rows, kinds, self.trusted_fabric):
            more = own.get(verdict.transport, {})
            make = partial(create, verdict.transport, self.host, self.advertise, self.trusted_fabric, **more)
            found.append(Candidate(verdict.transport, make, "" if verdict.taken else verdict.reason))
        return found


class AutoTransport(Transport):
    """A transport that chooses among others for each peer."""

    name: ClassVar[str] = "auto"
    options: ClassVar[type[TransportOptions]] = AutoOptions

    def __init__(
        self, options: AutoOptions | None = None, candidates: Sequence[Transport] | Shortlist | None = None
    ) -> None:
        """Create the transport without starting any candidate; `register` starts them.

        Args:
            options: The options.
            candidates: A shortlist, or transports in order of preference, each with a different name and not yet
                registered; all of them are closed with this one. None: the transports of the registry.

        Raises:
            ConfigurationError: The value of an option is invalid.
        """
        settings = (options or AutoOptions()).checked(self.name)
        self.key = SigningKey()
        self.endpoint = self.key.public
        given: Sequence[Transport] = () if candidates is None or callable(candidates) else candidates
        self._parts = {part.name: part for part in given}
        self._left_out: dict[str, str] = {}
        self._failed: list[str] = []
        self._order = [part.name for part in given]
        self._shortlist = settings.shortlist if candidates is None else candidates if callable(candidates) else None
        self._peers: PeerTable[_AutoPeer] = PeerTable(self.name)

    def register(self, memory: Sequence[MemoryRange]) -> None:
        """Register the memory with every candidate, as `Transport.register` does.

        A candidate that cannot be created or does not accept the memory is left out, and its reason is recorded.

        Raises:
            ConfigurationError: No candidate is left. The message lists all reasons.
        """
        listed = list(memory)
        kinds = {kind_of(piece.device) for piece in listed}
        for name, make_one, reason in () if self._shortlist is None else self._shortlist(kinds):
            self._order.append(name)
            if reason:
                self._left_out[name] = reason
                continue
            try:
                self._parts[name] = make_one()
            except KVRoomError as error:
                self._drop(name, str(error))
        for part in list(self._parts.values()):
            try:
                part.register(listed)
            except KVRoomError as error:
                self._drop(part.name, str(error))
        while (size := len(self.describe())) > DESCRIPTION_BYTES:
            sizes = {name: len(part.describe()) for name, part in self._parts.items()}
            largest = max(sizes, key=sizes.__getitem__)
            over = f"{size} bytes, {DESCRIPTION_BYTES} are allowed; register fewer, larger regions"
            self._drop(largest, f"its description takes {sizes[largest]} of {over}")
        if not self._parts:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self._left_out.items())
            raise ConfigurationError(
                f"auto: no transport is left for {' and '.join(sorted(kinds)) or 'no'} memory ({reasons}); "
                "`kvroom doctor` shows what is available here"
            )

    def _drop(self, name: str, reason: str) -> None:
        """Leave out a candidate that was selected but failed; `warning` mentions it."""
        self._left_out[name] = reason.removeprefix(f"{name}: ")
        self._failed.append(name)
        part = self._parts.pop(name, None)
        if part is not None:
            part.close()

    def warning(self) -> str:
        own = [part.warning() for part in self._parts.values()]
        lost = [f"auto runs without {name}: {self._left_out[name]}" for name in self._failed]
        return "; ".join(filter(None, [*lost, *own]))

    def describe(self) -> bytes:
        parts = {name: claims.state(part, self.endpoint) for name, part in self._parts.items()}
        return msgspec.msgpack.encode(_AutoDescription(self.endpoint, parts))

    def connect(self, description: bytes) -> int:
        """Connect by every candidate that both ends have, and choose the first that can write.

        Candidates after the chosen one are connected too, because the peer may choose one of them for its own writes.
        Otherwise as `Transport.connect`.
        """
        described = read_description(description, _AutoDescription)
        known = self._peers.of(described.endpoint)
        if known is not None:
            return known
        chosen = ""
        reasons: list[str] = []
        handles: dict[str, int] = {}
        with contextlib.ExitStack() as undo:
            undo.callback(self._release, handles)
            for name in self._order:
                reason = self._try(name, described, handles)
                if not reason:
                    chosen = chosen or name
                elif not chosen:
                    reasons.append(reason)
            if chosen:
                undo.pop_all()
        if not chosen:
            ours, theirs = ", ".join(self._parts), ", ".join(described.parts)
            raise TransportError(
                f"no transport reaches the peer ({'; '.join(reasons)}): this side has {ours}, the peer has {theirs}"
            )
        peer = _AutoPeer(described.endpoint, chosen, handles, "; ".join(reasons))
        return self._peers.add(described.endpoint, peer)

    def _release(self, handles: dict[str, int]) -> None:
        """Release the candidates' handles of a peer that no candidate can write to, and which gets no handle here."""
        for name, handle in handles.items():
            self._parts[name].fence(handle)

    def _try(self, name: str, described: _AutoDescription, handles: dict[str, int]) -> str:
        """Connect by one candidate, or at least watch, and record its handle. Return the reason if it cannot write."""
        if name in self._left_out:
            return f"{name}: {self._left_out[name]}"
        if name not in described.parts:
            return f"the peer has no {name}"
        part, detail = self._parts[name], ""
        description = claims.read(described.parts[name], name, described.endpoint)
        try:
            handle = part.connect(description)
        except MalformedDescription:
            raise
        except OutOfReach as error:
            return str(error)
        except TransportError as error:
            detail = str(error)
            try:
                handle = part.watch(description)
            except TransportError:  # the peer's process is gone, so it writes nowhere
                return detail
        # Fencing one of two peers with the same handle would cut off both.
        for peer in map(self._peers.find, self._peers.all()):
            if peer is not None and peer.endpoint != described.endpoint and peer.handles.get(name) == handle:
                raise MalformedDescription(f"{name}: the peer describes itself as another peer that is connected")
        handles[name] = handle
        return detail

    def explain(self, peer: int) -> str:
        found = self._peers.get(peer)
        if found.reason:
            return f"{found.chosen}, because {found.reason}"
        return self._parts[found.chosen].explain(found.handles[found.chosen])

    def transport_for(self, peer: int) -> str:
        return self._peers.get(peer).chosen

    def grant(self, extents: Extents) -> bytes:
        return msgspec.msgpack.encode({name: part.grant(extents) for name, part in self._parts.items()})

    def bind(self, grant: bytes, peer: int) -> None:
        found, tokens = self._peers.find(peer), _tokens(grant)
        for name, handle in () if found is None else found.handles.items():
            self._parts[name].bind(tokens.get(name, b""), handle)

    def revoke(self, grant: bytes) -> bool:
        tokens = _tokens(grant)
        unproven = {name for name, part in self._parts.items() if not part.revoke(tokens.get(name, b""))}
        peers = [self._peers.find(handle) for handle in self._peers.all()]
        return not any(peer is not None and unproven & peer.handles.keys() for peer in peers)

    def staging_slots(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for part in self._parts.values():
            total.update(part.staging_slots())
        return dict(total)

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        """Submit the blocks to the candidate chosen for the peer, which checks them. Otherwise as in `Transport`."""
        try:
            return self._move(peer, blocks, grant)
        except TransportError as error:
            return failed(error)

    def _move(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        found = self._peers.get(peer)
        token = _tokens(grant).get(found.chosen, b"")
        return self._parts[found.chosen].submit(found.handles[found.chosen], blocks, token)

    def note_lost(self, peer: int, host: str, others: frozenset[str]) -> None:
        found = self._peers.find(peer)
        for name, handle in found.handles.items() if found is not None else ():
            self._parts[name].note_lost(handle, host, others)

    def fence(self, peer: int) -> bool:
        return self._fence(peer, lambda name, handle: self._parts[name].fence(handle))

    def fence_dead(self, peer: int) -> bool:
        return self._fence(peer, lambda name, handle: self._parts[name].fence_dead(handle))

    def _fence(self, peer: int, fence: Callable[[str, int], bool]) -> bool:
        found = self._peers.find(peer)
        if found is None:
            return True
        self._peers.detach(peer)
        proofs = [fence(name, handle) for name, handle in found.handles.items()]
        if all(proofs):
            self._peers.forget(peer)
        return all(proofs)

    def close(self) -> None:
        for part in self._parts.values():
            part.close()
        for handle in self._peers.all():
            self._peers.forget(handle)


def _tokens(grant: bytes) -> dict[str, bytes]:
    try:
        return msgspec.msgpack.decode(grant, type=dict[str, bytes])
    except UNDECODABLE as error:
        raise TransportError(f"auto: the grant is malformed: {error}") from error


def probe() -> ProbeResult:
    """Return that `auto` is always available. `doctor` probes its candidates one by one."""
    return ProbeResult("kvroom")
