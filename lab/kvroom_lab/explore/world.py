"""All managers, the messages and transfers in flight between them, and the actions that are possible next.

A world never changes: `after` returns the next one. The environment behaves as the driver and the links make it
(`runtime/driver.py`, `runtime/link.py`). Each end of a link notices its loss for itself, and `lost` comes before the
`up` of the link that replaces it. A lost writer is fenced, and a fence is proof if the writer's process is gone or if
the sink's transport enforces grants; otherwise only the writer itself, linked again, can state that it has stopped.
A write that a process had started before its death may land until the fence, because a network card may hold it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

from kvroom.core import inputs as asked
from kvroom.core.delivery import Stage
from kvroom.core.messages import Message, Peer
from kvroom.core.phases import GIVEN_UP, TERMINAL, Phase
from kvroom.core.sink import Sink
from kvroom.core.source import Source

from .frozen import message_key
from .managers import PAUSE_S, Event, LawBroken, Manager, Managers, Wish, is_source, owner_of
from .scopes import REQUEST

Action = tuple[Any, ...]
"""An action of a world: the name of a method of `World`, and its arguments."""


class Envelope(NamedTuple):
    """A message on the wire: its number, the message, and a key of what the receiver's rules read of it."""

    seq: int
    message: Message
    key: Hashable


class Flight(NamedTuple):
    """A transfer in flight: this source writes its share of tokens [start, stop) of this generation's offer."""

    source: Peer
    generation: int
    transfer: int
    start: int
    stop: int
    cut: bool = False  # the transport has cut it off: no further byte lands


class World:
    """One state of the whole system (see the module). A manager's index: the sources' ranks first, then the sinks."""

    __slots__ = ("agreed", "crashes", "expired", "fencing", "flights", "landed", "lives", "losses", "managers",
                 "numbers", "path_index", "redials", "registry", "scope", "wire")  # fmt: skip

    def __init__(self, registry: Managers) -> None:
        self.registry, self.scope = registry, registry.scope
        n = self.scope.sources + self.scope.sinks
        self.lives: tuple[int, ...] = (0,) * n
        self.managers: tuple[Manager | None, ...] = tuple(registry.new(self.peer_at(i)) for i in range(n))
        self.wire: dict[tuple[Peer, int], tuple[Envelope, ...]] = {}  # (sender, index of the receiver) -> messages
        self.numbers: dict[tuple[Peer, int], int] = {}  # (sender, index of the receiver) -> number of the last message
        self.flights: frozenset[Flight] = frozenset()
        self.landed: frozenset[tuple[int, Peer, int]] = frozenset()  # generation, source, token
        self.agreed: frozenset[int | None] = frozenset()  # generations whose checksums the sink found equal
        self.fencing: frozenset[tuple[int, Peer]] = frozenset()  # (sink, peer) for which proof will come
        self.expired: tuple[int, ...] = (0,) * n
        # Links that a driver redials. Only winding up looks here, since any link may come up at any time anyway.
        self.redials: frozenset[tuple[int, Peer]] = frozenset()
        self.losses = self.crashes = 0
        self.path_index = 0  # index of the search's entry that led here
        for source, sink in self._pairs():
            self.connect(source, sink)

    def copy(self) -> World:
        copy = object.__new__(World)
        for name in World.__slots__:
            setattr(copy, name, getattr(self, name))
        copy.wire, copy.numbers = self.wire.copy(), self.numbers.copy()
        return copy

    def after(self, action: Action) -> World:
        """Return the world after this action. Raise `LawBroken` if the action breaks a law."""
        copy = self.copy()
        getattr(copy, action[0])(*action[1:])
        copy.check_flights()
        return copy

    def key(self) -> Hashable:
        """Return a key that two worlds share only if the same actions can follow, with the same results."""
        return (self.state(), self.expired, self.losses, self.crashes)

    def state(self) -> Hashable:
        """Return the key without the counts that only limit the search."""
        wire = tuple(
            (way, tuple(envelope.key for envelope in items)) for way, items in sorted(self.wire.items()) if items
        )
        managers = tuple(-1 if manager is None else manager.behaviour for manager in self.managers)
        return managers, self.lives, wire, self.flights, self.landed, self.agreed, self.fencing

    def peer_at(self, index: int) -> Peer:
        sources = self.scope.sources
        name = f"prefill-{index}" if index < sources else f"decode-{index - sources}"
        return Peer(name, (index + 1) * 10 + self.lives[index])

    def index_of(self, peer: Peer) -> int:
        return peer.incarnation // 10 - 1

    def alive(self, peer: Peer) -> bool:
        manager = self.managers[self.index_of(peer)]
        return manager is not None and manager.me == peer

    def _pairs(self) -> Iterator[tuple[int, int]]:
        sources = self.scope.sources
        return ((i, sources + j) for j in range(self.scope.sinks) for i in range(sources))

    def linked(self, a: int, b: int) -> bool:
        """Return whether a considers its link with the present incarnation of b to be up."""
        mine, theirs = self.managers[a], self.managers[b]
        return mine is not None and theirs is not None and theirs.me in mine.linked

    # -- possible actions -----------------------------------------------------------------------------------------

    def actions(self) -> Iterator[Action]:
        for index, manager in enumerate(self.managers):
            if manager is not None:
                yield from self._engine_actions(index, manager)
                yield from self._wire_actions(index, manager)
                if self.expired[index] < self.scope.expiries and manager.table.deadline() is not None:
                    yield ("expire", index)
                if self._can_pause(manager):
                    yield ("pause", index)
        for flight in sorted(self.flights):
            if self.can_write(flight):
                yield ("land", flight)
            if self.alive(flight.source):
                yield ("break_off", flight)
        yield from self._link_actions()
        yield from self._process_actions()

    def _can_pause(self, manager: Manager) -> bool:
        """Return whether a pause makes a difference: only where a renewal can move a source's deadline."""
        return self.scope.slow_offers and any(
            room.phase is Phase.EXPECTED and room.timer is not None and room.timer.at - manager.now > PAUSE_S
            for room in manager.rooms
        )

    def _engine_actions(self, index: int, manager: Manager) -> Iterator[Action]:
        for owner in manager.resolving if self._ranks_linked(index) else ():
            if not any(owner_of(room) == owner and room.phase not in TERMINAL for room in manager.rooms):
                yield ("ask", index, owner, self._resolved())
        room = manager.uncleared()
        if room is None:
            once_more = self.scope.reopens == ("source" if is_source(manager.me) else "sink")
            if manager.opened < self.scope.openings + once_more:
                yield ("open", index)
            return
        if self.scope.aborts and room.phase not in GIVEN_UP and room.phase not in (Phase.LANDED, Phase.SENT):
            yield ("ask", index, owner_of(room), asked.GiveUp(detail="the engine's wish"))
        yield ("ask", index, owner_of(room), asked.Clear())
        if isinstance(room, Sink):
            yield from self._sink_wishes(index, room)
        elif isinstance(room, Source):
            yield from self._source_wishes(index, room)

    def _source_wishes(self, index: int, room: Source) -> Iterator[Action]:
        """Yield the inputs that the prefill engine may give. It may not have noticed that the room failed."""
        n = len(room.chunks)
        if room.identity is None:
            yield ("ask", index, owner_of(room), asked.Identify(identity=REQUEST))
        elif n < self.scope.chunks and room.phase is not Phase.SENT:
            yield (
                "ask",
                index,
                owner_of(room),
                asked.SendPages(pages=(n,), stop=n + 1, last=n + 1 == self.scope.chunks),
            )
        if room.phase not in GIVEN_UP:
            for delivery in room.deliveries:
                if delivery.stage is Stage.SUMMING:
                    yield ("ask", index, owner_of(room), asked.Checksummed(value=1, peer=delivery.peer))

    def _sink_wishes(self, index: int, room: Sink) -> Iterator[Action]:
        """Yield the inputs that the decode engine and its resolver may give. They may not have noticed a failure."""
        chunks = self.scope.chunks
        if room.phase is Phase.OPENED and room.offer is None:
            pages = tuple(range(4, 4 + chunks))
            grant = b"leave to write" if self.scope.enforcing else b""
            offer = asked.OfferPages(
                pages=pages,
                start=0,
                stop=chunks,
                nbytes=chunks * self.scope.sources,
                grant=grant,
                checksum=self.scope.checksum,
            )
            yield ("ask", index, owner_of(room), offer)
        if room.phase is Phase.OPENED and not room.sources and self._ranks_linked(index):
            yield ("ask", index, owner_of(room), self._resolved())
        if room.phase is Phase.VERIFYING:
            yield ("ask", index, owner_of(room), asked.Verified(error=None))
            yield ("ask", index, owner_of(room), asked.Verified(error="1 is not 2"))

    def _ranks_linked(self, index: int) -> bool:
        return all(self.linked(index, rank) for rank in range(self.scope.sources))

    def _resolved(self) -> asked.Resolved:
        ranks = tuple(self.peer_at(rank) for rank in range(self.scope.sources))
        share = asked.Share(sinks=self.scope.sinks if self.scope.together else 1)
        return asked.Resolved(sources=ranks, shares=(share,) * len(ranks))

    def _wire_actions(self, index: int, manager: Manager) -> Iterator[Action]:
        for peer in sorted(manager.linked):
            for envelope in self.wire.get((peer, index), ()):
                yield ("deliver", peer, index, envelope, False)
                if self.scope.drops:
                    yield ("drop", peer, index, envelope)
                if self.scope.repeats:
                    # A repeat that the table would ignore as not newer leads to the same world as the delivery above.
                    heard, _ = self.registry.step(manager, ("hear", peer, envelope.seq, envelope.message))
                    if not heard.table.overtaken(peer, envelope.seq):
                        yield ("deliver", peer, index, envelope, True)

    def _link_actions(self) -> Iterator[Action]:
        for a, b in self._pairs():
            if self.linked(a, b) and self.linked(b, a):
                if self.losses < self.scope.losses:
                    if self.scope.apart:
                        yield ("break_link", a, b)
                        yield ("break_link", b, a)
                    else:
                        yield ("break_link", a, b, True)
            elif self.managers[a] is not None and self.managers[b] is not None:
                yield ("connect", a, b)
        for index, peer in self.unnoticed():
            yield ("notice", index, peer)
        for index, peer in sorted(self.fencing):
            yield ("fence", index, peer)

    def unnoticed(self) -> list[tuple[int, Peer]]:
        """Return (index, peer) for each manager that has not noticed yet that its link with this peer is gone."""
        return [
            (index, peer)
            for index, manager in enumerate(self.managers)
            for peer in (sorted(manager.linked) if manager else ())
            if not self.alive(peer) or not self.linked(self.index_of(peer), index)
        ]

    def _process_actions(self) -> Iterator[Action]:
        for index, manager in enumerate(self.managers):
            if manager is None:
                yield ("restart", index)
            elif self.crashes < self.scope.crashes:
                yield ("crash", index)

    # -- actions --------------------------------------------------------------------------------------------------

    def open(self, index: int) -> None:
        self.happen(index, ("open",))

    def ask(self, index: int, owner: int, what: asked.Input) -> None:
        self.happen(index, ("ask", owner, what))

    def deliver(self, peer: Peer, index: int, envelope: Envelope, keep: bool) -> None:
        if not keep:
            self.drop(peer, index, envelope)
        self.happen(index, ("hear", peer, envelope.seq, envelope.message))
        manager = self.managers[index]
        assert manager is not None  # it has just received a message
        left = [envelope for envelope in self.wire[peer, index] if not manager.table.overtaken(peer, envelope.seq)]
        self.wire[peer, index] = tuple(left)

    def drop(self, peer: Peer, index: int, envelope: Envelope) -> None:
        self.wire[peer, index] = tuple(other for other in self.wire[peer, index] if other != envelope)

    def expire(self, index: int) -> None:
        self.expired = tuple(count + (i == index) for i, count in enumerate(self.expired))
        self.happen(index, ("expire",))

    def pause(self, index: int) -> None:
        self.happen(index, ("pause",))

    def land(self, flight: Flight) -> None:
        self.flights -= {flight}
        self.landed |= {(flight.generation, flight.source, token) for token in range(flight.start, flight.stop)}
        if self.alive(flight.source):
            what = asked.Landed(transfer=flight.transfer, nbytes=flight.stop - flight.start)
            self.happen(self.index_of(flight.source), ("transfer", flight.generation, what))

    def break_off(self, flight: Flight) -> None:
        self.flights -= {flight}
        what = asked.Broke(transfer=flight.transfer, detail="the transport's words", revoked=self._revoked(flight))
        self.happen(self.index_of(flight.source), ("transfer", flight.generation, what))

    def break_link(self, a: int, b: int, both: bool = False) -> None:
        """Lose the link of two managers: a notices it now, and b does too if `both` is set, else later."""
        self.losses += 1
        theirs, mine = self.peer_at(b), self.peer_at(a)
        self.notice(a, theirs)
        if both:
            self.notice(b, mine)

    def notice(self, index: int, peer: Peer) -> None:
        """Take down this manager's end of the link with this peer. Messages in flight from that peer are lost."""
        self.wire.pop((peer, index), None)
        self.happen(index, ("lost", peer))
        self._ask_fence(index, peer)

    def connect(self, a: int, b: int) -> None:
        """Bring a link up. An end that has not noticed the loss of the earlier link notices it first."""
        for index, other in ((a, b), (b, a)):
            manager = self.managers[index]
            assert manager is not None  # the action is possible only for living managers
            for peer in sorted(peer for peer in manager.linked if self.index_of(peer) == other):
                self.notice(index, peer)
        for index, other in ((a, b), (b, a)):
            peer = self.peer_at(other)
            self.fencing -= {(index, peer)}  # the link that is up now replaces this proof: the peer itself can answer
            self.numbers[peer, index] = 0
            self.wire.pop((peer, index), None)
        self.happen(a, ("up", self.peer_at(b)))
        self.happen(b, ("up", self.peer_at(a)))

    def fence(self, index: int, peer: Peer) -> None:
        """Give the proof: the transport has cut this peer off, or its process is gone."""
        self.fencing -= {(index, peer)}
        mine = {flight for flight in self.flights if flight.source == peer and self._sink_of(flight) == index}
        self.flights -= mine
        if self.alive(peer):
            self.flights |= {flight._replace(cut=True) for flight in mine}
        self.happen(index, ("fenced", peer))

    def crash(self, index: int) -> None:
        """End the process. Messages that it sent can still arrive, and transfers that it started can still land."""
        self.crashes += 1
        self.managers = (*self.managers[:index], None, *self.managers[index + 1 :])
        self.wire = {way: items for way, items in self.wire.items() if way[1] != index}
        self.fencing = frozenset(item for item in self.fencing if item[0] != index)

    def restart(self, index: int) -> None:
        """Start the process again, as a new incarnation without any room."""
        self.lives = tuple(life + (i == index) for i, life in enumerate(self.lives))
        manager = self.registry.new(self.peer_at(index))
        self.managers = (*self.managers[:index], manager, *self.managers[index + 1 :])

    # -- effects of an action -------------------------------------------------------------------------------------

    def happen(self, index: int, event: Event) -> None:
        manager = self.managers[index]
        assert manager is not None  # no event reaches a process that is gone
        manager, wishes = self.registry.step(manager, event)
        self.managers = (*self.managers[:index], manager, *self.managers[index + 1 :])
        for wish in wishes:
            getattr(self, "_wish_" + wish.kind)(index, manager, wish)

    def _wish_send(self, index: int, manager: Manager, wish: Wish) -> None:  # noqa: ARG002 - all these methods have one signature
        """Put a message on the wire; it is lost if the link is down at either end."""
        peer, message = wish.peer, wish.message
        assert peer is not None
        assert message is not None
        to = self.index_of(peer)
        receiver = self.managers[to]
        if peer in manager.linked and receiver is not None and receiver.me == peer and manager.me in receiver.linked:
            way = manager.me, to
            self.numbers[way] = self.numbers.get(way, 0) + 1
            envelope = Envelope(self.numbers[way], message, message_key(message))
            self.wire[way] = (*self.wire.get(way, ()), envelope)

    def _wish_submit(self, index: int, manager: Manager, wish: Wish) -> None:  # noqa: ARG002
        assert wish.generation is not None
        if self.scope.differs:
            raise LawBroken("law 8: a source writes the KV cache of another request than the sink asked for")
        self.flights |= {Flight(manager.me, wish.generation, wish.transfer, wish.start, wish.stop)}

    def _wish_fence(self, index: int, manager: Manager, wish: Wish) -> None:
        if wish.peer is not None and wish.peer not in manager.linked:
            self._ask_fence(index, wish.peer)

    def _wish_released(self, index: int, manager: Manager, wish: Wish) -> None:  # noqa: ARG002
        if not is_source(manager.me):
            self.landed = frozenset(item for item in self.landed if item[0] != wish.generation)  # never looked up again
        elif any(flight.generation == wish.generation and flight.source == manager.me for flight in self.flights):
            raise LawBroken("law 6: the source releases pages that a transfer still reads")

    def _wish_landed(self, index: int, manager: Manager, wish: Wish) -> None:  # noqa: ARG002
        tokens = range(self.scope.chunks)
        if not all((wish.generation, source, token) in self.landed for source in wish.sources for token in tokens):
            raise LawBroken("law 8: the sink reports success, and tokens are missing")
        if len(wish.sources) != self.scope.sources:
            raise LawBroken("law 8: the sink reports success without all ranks")
        if self.scope.checksum:
            self.agreed |= {wish.generation}

    def _wish_sent(self, index: int, manager: Manager, wish: Wish) -> None:  # noqa: ARG002
        if self.scope.checksum and wish.generation not in self.agreed:
            raise LawBroken("law 8: a source reports success, and the sink has not compared the checksums")

    def _ask_fence(self, index: int, peer: Peer) -> None:
        """Note the proof or the redial that a sink waits for.

        A source needs neither: its transfers report their ends.
        """
        manager = self.managers[index]
        assert manager is not None
        if is_source(manager.me):
            return
        if self.scope.enforcing or not self.alive(peer):
            self.fencing |= {(index, peer)}
        else:
            self.redials |= {(index, peer)}

    def _sink_of(self, flight: Flight) -> int:
        return flight.generation // 1000 - 1

    def _sink(self, flight: Flight) -> Manager | None:
        """Return the process that the flight writes into, or None if that no longer runs."""
        manager = self.managers[self._sink_of(flight)]
        return manager if manager is not None and manager.me.incarnation == flight.generation // 100 else None

    def _revoked(self, flight: Flight) -> bool:
        sink = self._sink(flight)
        return self.scope.enforcing and sink is not None and flight.generation % 100 not in sink.granted

    def can_write(self, flight: Flight) -> bool:
        """Return whether bytes of this transfer can still reach memory."""
        return not flight.cut and self._sink(flight) is not None and not self._revoked(flight)

    def check_flights(self) -> None:
        for flight in self.flights:
            sink = self._sink(flight)
            if sink is not None and flight.generation % 100 in sink.released and self.can_write(flight):
                raise LawBroken(f"law 6: the sink released pages that {flight.source} still writes")
