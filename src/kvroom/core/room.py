"""One request's hand-off as a pure state machine: the base class of `Source` and `Sink`.

Nothing here does I/O, reads a clock or starts a thread. An input and the time come in through `handle` and `receive`;
effects and one deadline come out, and for a sink that waits for pages the time of its next renewal. One owner calls a
room: the table, in the driver's thread.

All of it serves one property: pages are released (`ReleasePages`) only on entry to LANDED, SENT and RELEASED, and a
room enters these only when no peer can write its pages (sink) and no transfer reads them (source).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from kvroom.errors import LocalRoomError

from . import effects as do
from . import inputs as asked
from .causes import TIMED_OUT, Cause
from .identity import KVIdentity
from .messages import Failure, Message, Peer, RoomUse, fitting
from .phases import GIVEN_UP, SUCCEEDED, TERMINAL, Event, KVPoll, Phase, Side, Table
from .settings import Timeouts, Wait
from .trace import RequestTrace

RoomT = TypeVar("RoomT", bound="Room")
Handlers = Mapping[type, Callable[[Any, Any, float], None]]


class Hearing(NamedTuple):
    """The handling of one type of message by one side: the method that takes it, and the rule that finds its room.

    `take` returns False, having changed nothing, if the message is late or this peer may not send it. `is_for` is
    called only for rooms with the message's number.
    """

    take: Callable[[Any, Peer, Any, float], bool | None]
    is_for: Callable[[Any, Any], bool] = lambda room, message: room.knows(message.generation)


class Timer(NamedTuple):
    """A wait of a room, and the time at which it times out, on the clock of `now`."""

    wait: Wait
    at: float


class Step(NamedTuple):
    """One entry of a room's history: the phase that it entered, and the time."""

    phase: Phase
    at: float


class IndexEntry(NamedTuple):
    """The entries of a room in the indexes of `RoomTable`. Stored on the room, so that they cannot outlive it."""

    peers: frozenset[Peer] = frozenset()
    timer: Timer | None = None
    phase: Phase | None = None  # None: not counted
    quarantined_pages: int = 0
    renewal: Timer | None = None


class RoomListener(Protocol):
    """The engine's handle of a room, which the driver calls and `core` never does. Its methods must not block."""

    def update(self, room: Room, /) -> None: ...
    def release(self, pages: tuple[int, ...], /) -> None: ...


class Room(ABC):
    """The state that both sides have: number, generation, phase, deadline, failure, outbox.

    `timer` is the one deadline. When it runs out, the room fails, or, if it is draining, quarantines its pages.
    `renewal` neither ends the room nor moves its deadline.
    """

    side: ClassVar[Side]
    table: ClassVar[Table]
    handlers: ClassVar[Handlers]
    hears: ClassVar[Mapping[type, Hearing]]

    def __init__(
        self, timeouts: Timeouts, listener: RoomListener | None = None, identity: KVIdentity | None = None
    ) -> None:
        self.timeouts = timeouts
        self.listener = listener
        self.identity = identity  # stated by this side's engine; None: not stated yet
        self.number: int | None = None
        self.generation: int | None = None
        self.phase = Phase.NEW
        self.timer: Timer | None = None
        self.renewal: Timer | None = None
        self.failure: Failure | None = None
        self.cleared = False
        self.nbytes = 0  # reported as landed, by this side's transfers (source) or by `Done` (sink)
        self.took_s = 0.0  # see messages.Done
        self.history: tuple[Step, ...] = ()
        self.index_entry = IndexEntry()
        self.trace: RequestTrace | None = None  # for logs and views; no transition reads it
        self.outbox: list[do.Effect] = []

    @property
    def status(self) -> KVPoll:
        """Return the room's state as the engine's `poll()` reports it. Reading it changes nothing."""
        if self.phase in SUCCEEDED:
            return KVPoll.Success
        return KVPoll.Failed if self.phase in GIVEN_UP else self._status()

    def knows(self, generation: int) -> bool:
        """Return True if messages of this generation are about this room."""
        return self.generation == generation

    def is_meant_by(self, message: Message) -> bool:
        """Return True if a message with this room's number is about this room, and `receive` must get it."""
        hearing = self.hears.get(type(message))
        return hearing is not None and hearing.is_for(self, message)

    @property
    @abstractmethod
    def peer_identity(self) -> KVIdentity | None:
        """Return the identity that the other side has stated, or None before it has."""

    @property
    def gone(self) -> bool:
        """Return True if the engine has cleared the room and its pages are released. No trace of it may then remain."""
        return self.cleared and self.phase in TERMINAL

    @property
    def held_pages(self) -> tuple[int, ...]:
        """Return the pages that the engine must not reuse yet because of this room."""
        return () if self.phase in TERMINAL else self._pages()

    def admit(self, number: int, generation: int | None, now: float) -> None:
        """Take the room number. A sink brings its own generation; a source takes it later, from its first offer."""
        self._fire(Event.ADMIT)
        self.number, self.generation = number, generation
        self._wait(Wait.BOOTSTRAP, now)

    def handle(self, what: asked.Input, now: float) -> None:
        """Take one input. Raises `LocalRoomError`, and changes nothing, if this side or phase does not allow it."""
        handler = self.handlers.get(type(what))
        if handler is None:
            raise LocalRoomError(f"{type(what).__name__} is not an input of the {self.side.value} side")
        handler(self, what, now)

    def receive(self, peer: Peer, message: Message, now: float) -> bool:
        """Take one message. Return False, having changed nothing, if it is late or this peer may not send it."""
        hearing = self.hears.get(type(message))
        return hearing is not None and hearing.take(self, peer, message, now) is not False

    def expire(self, now: float) -> None:
        """Act on the deadline if it is due, else change nothing. An undrained room is quarantined, never released."""
        if self.timer is None or now < self.timer.at:
            return
        if self.phase in GIVEN_UP:
            again = self.phase is Phase.QUARANTINED
            self._fire(Event.OVERDUE)
            self.outbox += [do.Quarantine(pages=self._pages(), again=again), do.Report()]
            self._ask_again()
            self._wait(Wait.DRAIN, now)
        else:
            wait = self.timer.wait
            after = f"{self.timeouts.of(wait):g} s ({wait.value})"
            self._fail_locally(TIMED_OUT[wait], f"timed out after {after} waiting for {self._awaited()}", now)

    def note(self, now: float) -> None:
        """Append the phase to the history if it is a new one. A phase that was left in the same call has no entry."""
        if not self.history or self.history[-1].phase is not self.phase:
            self.history += (Step(self.phase, now),)

    @property
    def awaited(self) -> str | None:
        """Return the event and the peers that the room waits for, or None if it only waits for the engine's `Clear`."""
        return self._awaited() if self.timer else None

    def take_effects(self) -> list[do.Effect]:
        """Return the effects to carry out, in order, and empty the outbox."""
        outbox, self.outbox = self.outbox, []
        return outbox

    def copy(self: RoomT) -> RoomT:
        """Return an independent copy, for the explorer, which visits every state of small worlds."""
        twin = copy.copy(self)
        twin.outbox = list(self.outbox)
        return twin

    @abstractmethod
    def involved(self) -> frozenset[Peer]:
        """Return the peers whose loss concerns this room: a lost link to one of them fails it."""

    @abstractmethod
    def _status(self) -> KVPoll: ...

    @abstractmethod
    def _pages(self) -> tuple[int, ...]: ...

    @abstractmethod
    def _awaited(self) -> str:
        """Return the end of the sentence "timed out after 5 s waiting for ..."."""

    @abstractmethod
    def _start_draining(self, failure: Failure, now: float) -> None:
        """Give up: enter DRAINING, or RELEASED if there is nothing to drain. Called once at most."""

    @abstractmethod
    def _ask_again(self) -> None:
        """Ask the peers and the transport again for proof of the drain; called each time that `drain_s` runs out."""

    def _fire(self, event: Event) -> None:
        try:
            self.phase = self.table[self.phase][event]
        except KeyError:
            where = f"on the {self.side.value} side in phase {self.phase.name}"
            raise LocalRoomError(f"room {self.number}: {event.name} is not allowed {where}") from None

    def _wait(self, wait: Wait, now: float) -> None:
        self.timer = Timer(wait, now + self.timeouts.of(wait))

    def _fail_locally(self, cause: Cause, detail: str, now: float, by: Peer | None = None) -> None:
        """Give up for a cause that this side noticed. Does nothing if the room has ended already.

        The failure names the peer `by` that caused it; without one, all peers that are involved.
        """
        peers = ", ".join(sorted(map(str, {by} if by else self.involved()))) or self._other_side()
        phase, said = self.phase.name, fitting(detail)
        self._fail_with(Failure(side=self.side, phase=phase, peer=fitting(peers), cause=cause, detail=said), now)

    def _other_side(self) -> str:
        """Return the text that a failure has in place of a peer while no peer is involved."""
        return "none yet"

    def _fail_with(self, failure: Failure, now: float) -> None:
        if self.phase not in TERMINAL and self.phase not in GIVEN_UP:
            self.failure = failure
            self._start_draining(failure, now)

    def _about(self) -> RoomUse:
        """Return the fields that every message of this room has."""
        assert self.number is not None
        assert self.generation is not None  # a sink was admitted with it, a source took it from its first offer
        return {"room": self.number, "generation": self.generation}

    def _enter_terminal(self, event: Event) -> None:
        """Enter a terminal phase: release the pages to the engine, and end all waits."""
        pages = self._pages()
        self._fire(event)
        self.timer = self.renewal = None
        self.outbox += [do.ReleasePages(pages), do.Report()]

    def _stated(self) -> KVIdentity:
        """Return this side's identity. Raises `LocalRoomError` if the engine has not stated it."""
        if self.identity is None:
            raise LocalRoomError(f"room {self.number}: state the identity of the request first (KVIdentity.of(tokens))")
        return self.identity

    def _identify(self, what: asked.Identify, now: float) -> None:  # noqa: ARG002 - one shape for all handlers
        if not what.identity:
            raise LocalRoomError(
                f"room {self.number}: the identity of the request has no tokens; make it with KVIdentity.of(tokens)"
            )
        if self.identity not in (None, what.identity):
            raise LocalRoomError(f"room {self.number}: another identity was stated already, and a room has one request")
        self.identity = what.identity

    def _asked_to_give_up(self, what: asked.GiveUp, now: float) -> None:
        self._fail_locally(what.cause, what.detail, now)

    def _asked_to_clear(self, what: asked.Clear, now: float) -> None:  # noqa: ARG002 - one shape for all handlers
        self.cleared = True
        self._fail_locally(Cause.CLEARED, "cleared before the hand-off was complete", now)

    common_handlers: ClassVar[Handlers] = {
        asked.Identify: _identify,
        asked.GiveUp: _asked_to_give_up,
        asked.Clear: _asked_to_clear,
    }
