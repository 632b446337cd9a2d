"""All managers, the messages between them, the transfers under way, and what may happen next.

A world never changes either: `after` makes the next one. The environment is the one that the driver and the links
provide (`runtime/driver.py`, `runtime/link.py`): each end notices for itself that a link is lost; its `lost` comes
before the `up` of a link that replaces it; a lost writer is fenced, and a fence proves something if the writer's
process is gone or if the sink's transport enforces; else only the writer, linked again, can say that it is quiet.
What a dead process had begun to write may land until the fence: a network card may have it.
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

from .frozen import alike_message
from .managers import PAUSE_S, Event, LawBroken, Manager, Managers, Wish, is_source, owner_of
from .scopes import REQUEST

Action = tuple[Any, ...]
"""What happens: the name of a method of `World`, and its arguments."""


class Said(NamedTuple):
    """A message on the wire: its number, itself, and what of it a receiver's rules read."""

    seq: int
    message: Message
    alike: Hashable


class Flight(NamedTuple):
    """A transfer under way: this source writes its share of tokens [start, stop) of this generation's offer."""

    source: Peer
    generation: int
    transfer: int
    start: int
    stop: int
    cut: bool = False  # the transport has cut it off: it can only end


class World:
    """See the module. Managers are known by their index: the sources' ranks first, then the sinks."""

    __slots__ = ("agreed", "came", "crashes", "expired", "fencing", "flights", "landed", "lives", "losses", "managers",
                 "numbers", "redials", "registry", "scope", "wire")  # fmt: skip

    def __init__(self, registry: Managers) -> None:
        self.registry, self.scope = registry, registry.scope
        n = self.scope.sources + self.scope.sinks
        self.lives: tuple[int, ...] = (0,) * n
        self.managers: tuple[Manager | None, ...] = tuple(registry.new(self.peer_at(i)) for i in range(n))
        self.wire: dict[tuple[Peer, int], tuple[Said, ...]] = {}  # from whom, to whom
        self.numbers: dict[tuple[Peer, int], int] = {}  # of the last message
        self.flights: frozenset[Flight] = frozenset()
        self.landed: frozenset[tuple[int, Peer, int]] = frozenset()  # generation, source, token
        self.agreed: frozenset[int | None] = frozenset()  # generations of which the sink found all checksums alike
        self.fencing: frozenset[tuple[int, Peer]] = frozenset()  # sinks, and peers of which proof will come
        self.expired: tuple[int, ...] = (0,) * n
        self.redials: frozenset[tuple[int, Peer]] = frozenset()  # asked for; any link may come up at any time anyway
        self.losses = self.crashes = 0
        self.came = 0  # how: an index of the search
        for source, sink in self._pairs():
            self.connect(source, sink)

    def twin(self) -> World:
        twin = object.__new__(World)
        for name in World.__slots__:
            setattr(twin, name, getattr(self, name))
        twin.wire, twin.numbers = self.wire.copy(), self.numbers.copy()
        return twin

    def after(self, action: Action) -> World:
        """The world in which this has happened. `LawBroken` if it must not happen."""
        twin = self.twin()
        getattr(twin, action[0])(*action[1:])
        twin.check_flights()
        return twin

    def key(self) -> Hashable:
        """Equal for worlds in which the same may happen from here on."""
        return (self.state(), self.expired, self.losses, self.crashes)

    def state(self) -> Hashable:
        """The same, without what only limits the search."""
        wire = tuple((way, tuple(said.alike for said in items)) for way, items in sorted(self.wire.items()) if items)
        managers = tuple(-1 if manager is None else manager.alike for manager in self.managers)
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
        """Whether a believes that its link with the present incarnation of b is up."""
        mine, theirs = self.managers[a], self.managers[b]
        return mine is not None and theirs is not None and theirs.me in mine.linked

    # -- what may happen next -------------------------------------------------------------------------------------

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
        """Time matters where a deadline can be put off: at a source that waits for an offer."""
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
        """What the prefill engine may ask, that its room has failed unknown to it or not; and what its checksum is."""
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
        """What the decode engine and its resolver may ask; that the room has failed may be unknown to them yet."""
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
            for said in self.wire.get((peer, index), ()):
                yield ("deliver", peer, index, said, False)
                if self.scope.drops:
                    yield ("drop", peer, index, said)
                if self.scope.repeats:
                    # A table that knows it as overtaken ignores the second one: that world is the one above.
                    heard, _ = self.registry.step(manager, ("hear", peer, said.seq, said.message))
                    if not heard.table.overtaken(peer, said.seq):
                        yield ("deliver", peer, index, said, True)

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
        """Who has not noticed that its link with whom is gone."""
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

    # -- what happens ---------------------------------------------------------------------------------------------

    def open(self, index: int) -> None:
        self.happen(index, ("open",))

    def ask(self, index: int, owner: int, what: asked.Input) -> None:
        self.happen(index, ("ask", owner, what))

    def deliver(self, peer: Peer, index: int, said: Said, keep: bool) -> None:
        if not keep:
            self.drop(peer, index, said)
        self.happen(index, ("hear", peer, said.seq, said.message))
        manager = self.managers[index]
        assert manager is not None  # it has just heard
        left = [said for said in self.wire[peer, index] if not manager.table.overtaken(peer, said.seq)]
        self.wire[peer, index] = tuple(left)

    def drop(self, peer: Peer, index: int, said: Said) -> None:
        self.wire[peer, index] = tuple(other for other in self.wire[peer, index] if other != said)

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
        """a notices that its link with b is lost; b may not have noticed yet."""
        self.losses += 1
        theirs, mine = self.peer_at(b), self.peer_at(a)
        self.notice(a, theirs)
        if both:
            self.notice(b, mine)

    def notice(self, index: int, peer: Peer) -> None:
        """The link with this peer is down, for this manager. What is under way from there does not come any more."""
        self.wire.pop((peer, index), None)
        self.happen(index, ("lost", peer))
        self._ask_fence(index, peer)

    def connect(self, a: int, b: int) -> None:
        """A link comes up; an end that has not noticed the loss of the earlier one does so first."""
        for index, other in ((a, b), (b, a)):
            manager = self.managers[index]
            assert manager is not None  # the action is offered only then
            for peer in sorted(peer for peer in manager.linked if self.index_of(peer) == other):
                self.notice(index, peer)
        for index, other in ((a, b), (b, a)):
            peer = self.peer_at(other)
            self.fencing -= {(index, peer)}  # from now on the peer answers for itself
            self.numbers[peer, index] = 0
            self.wire.pop((peer, index), None)
        self.happen(a, ("up", self.peer_at(b)))
        self.happen(b, ("up", self.peer_at(a)))

    def fence(self, index: int, peer: Peer) -> None:
        """The proof comes: the transport has cut this peer off, or has found its process gone."""
        self.fencing -= {(index, peer)}
        mine = {flight for flight in self.flights if flight.source == peer and self._sink_of(flight) == index}
        self.flights -= mine
        if self.alive(peer):
            self.flights |= {flight._replace(cut=True) for flight in mine}
        self.happen(index, ("fenced", peer))

    def crash(self, index: int) -> None:
        """The process is gone. What it had said may still be heard; what it had begun to write may still land."""
        self.crashes += 1
        self.managers = (*self.managers[:index], None, *self.managers[index + 1 :])
        self.wire = {way: items for way, items in self.wire.items() if way[1] != index}
        self.fencing = frozenset(item for item in self.fencing if item[0] != index)

    def restart(self, index: int) -> None:
        """It runs again, as a new incarnation that knows of nothing."""
        self.lives = tuple(life + (i == index) for i, life in enumerate(self.lives))
        manager = self.registry.new(self.peer_at(index))
        self.managers = (*self.managers[:index], manager, *self.managers[index + 1 :])

    # -- how it is done -------------------------------------------------------------------------------------------

    def happen(self, index: int, event: Event) -> None:
        manager = self.managers[index]
        assert manager is not None  # nothing happens to a process that is gone
        manager, wishes = self.registry.step(manager, event)
        self.managers = (*self.managers[:index], manager, *self.managers[index + 1 :])
        for wish in wishes:
            getattr(self, "_wish_" + wish.kind)(index, manager, wish)

    def _wish_send(self, index: int, manager: Manager, wish: Wish) -> None:  # noqa: ARG002 - one shape for all wishes
        """Lost if the link is down, for us or for the other end."""
        peer, message = wish.peer, wish.message
        assert peer is not None
        assert message is not None
        to = self.index_of(peer)
        receiver = self.managers[to]
        if peer in manager.linked and receiver is not None and receiver.me == peer and manager.me in receiver.linked:
            way = manager.me, to
            self.numbers[way] = self.numbers.get(way, 0) + 1
            said = Said(self.numbers[way], message, alike_message(message))
            self.wire[way] = (*self.wire.get(way, ()), said)

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
            self.landed = frozenset(item for item in self.landed if item[0] != wish.generation)  # nobody asks any more
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
        """Sinks are given proof if there can be one; that a source's own transfers ended is told one by one."""
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
        """The process that the flight writes into, if it still runs."""
        manager = self.managers[self._sink_of(flight)]
        return manager if manager is not None and manager.me.incarnation == flight.generation // 100 else None

    def _revoked(self, flight: Flight) -> bool:
        sink = self._sink(flight)
        return self.scope.enforcing and sink is not None and flight.generation % 100 not in sink.granted

    def can_write(self, flight: Flight) -> bool:
        """Whether bytes of this transfer may still reach memory."""
        return not flight.cut and self._sink(flight) is not None and not self._revoked(flight)

    def check_flights(self) -> None:
        for flight in self.flights:
            sink = self._sink(flight)
            if sink is not None and flight.generation % 100 in sink.released and self.can_write(flight):
                raise LawBroken(f"law 6: the sink released pages that {flight.source} still writes")
