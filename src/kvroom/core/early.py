"""Early arrivals: messages of sinks about rooms that the prefill engine has not opened yet.

They are bounded in number, in bytes and in time, for each peer and for all peers together.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from .causes import Cause
from .messages import Abort, Decline, Offer, Peer
from .settings import Limits, Timeouts


class Early(NamedTuple):
    """A message for a room that the prefill engine has not opened yet, and the time at which it expires."""

    peer: Peer
    message: Offer | Decline
    until: float


_Key = tuple[int, Peer]


class EarlyArrivals:
    """Messages for rooms that are not open here yet: for each room the offers of its sinks, and one decline at most.

    Messages of one kind live equally long, so each queue is ordered by deadline. Offers over a limit are refused. A
    decline only saves its source a timeout: it is dropped when it expires or a newer one needs its place, and it never
    takes the place of an offer.
    """

    def __init__(self, timeouts: Timeouts, limits: Limits) -> None:
        self._timeouts, self._limits = timeouts, limits
        self._offers: OrderedDict[_Key, Early] = OrderedDict()
        self._declines: OrderedDict[int, Early] = OrderedDict()
        self._offering: dict[int, tuple[Peer, ...]] = {}  # room -> the peers that offered, in order of arrival
        self._bytes: dict[Peer, int] = {}  # memory of the kept offers of each peer; no value is 0
        self._all_bytes = 0
        self._numbers: dict[
            Peer, dict[type, set[int]]
        ] = {}  # room numbers by peer and type of message; no set is empty

    def __len__(self) -> int:
        return len(self._offers) + len(self._declines)

    def keep_offer(self, peer: Peer, offer: Offer, now: float) -> tuple[Cause, str] | None:
        """Keep an offer, or return the cause and the sentence with which it must be refused."""
        limits = self._limits
        if before := self._offering.get(offer.room, ()):
            first = self._offers[offer.room, before[0]].message
            matches = isinstance(first, Offer) and (first.sinks, first.length) == (offer.sinks, offer.length)
            # A room takes several offers if the first one has announced several sinks.
            if not matches or peer in before or len(before) >= offer.sinks:
                return (
                    Cause.IN_USE,
                    f"RoomInUse: another decode worker ({before[0]}) has offered pages for this room already",
                )
        if len(self._offers) >= limits.early_arrivals:
            return Cause.LIMIT, f"{limits.early_arrivals} early arrivals are waiting already (Limits.early_arrivals)"
        held = len(self._numbers.get(peer, {}).get(Offer, ()))
        if held >= limits.early_arrivals_per_peer:
            return Cause.LIMIT, f"{held} early arrivals of {peer} are waiting already (Limits.early_arrivals_per_peer)"
        for name, whose, held, limit in (
            ("early_bytes_per_peer", f" of {peer}", self._bytes.get(peer, 0), limits.early_bytes_per_peer),
            ("early_bytes", "", self._all_bytes, limits.early_bytes),
        ):
            if held + offer.kept_bytes > limit:
                return Cause.LIMIT, (
                    f"this offer takes {offer.kept_bytes} bytes beside {held} bytes of early offers{whose}, "
                    f"and the limit is {limit} (Limits.{name})"
                )
        self._forget_decline(offer.room)
        self._offers[offer.room, peer] = Early(peer, offer, now + self._timeouts.bootstrap_s)
        self._offering[offer.room] = (*before, peer)
        self._note(peer, Offer, offer.room)
        self._count_bytes(peer, offer.kept_bytes)
        return None

    def _count_bytes(self, peer: Peer, nbytes: int) -> None:
        self._all_bytes += nbytes
        kept = self._bytes.get(peer, 0) + nbytes
        if kept:
            self._bytes[peer] = kept
        else:
            del self._bytes[peer]

    def miscounted_bytes(self) -> int:
        """Recount the memory of the offers. Return the sum of the differences in bytes, 0 if the counts are right."""
        found: Counter[Peer] = Counter()
        for early in self._offers.values():
            found[early.peer] += early.message.kept_bytes if isinstance(early.message, Offer) else 0
        found.subtract(self._bytes)
        return sum(map(abs, found.values())) + abs(self._all_bytes - sum(self._bytes.values()))

    def keep_decline(self, peer: Peer, decline: Decline, now: float) -> None:
        """Keep a decline. It replaces an older one for the same number, or the oldest one when the limit is reached."""
        self._forget_decline(decline.room)
        if len(self._declines) >= self._limits.early_arrivals:
            self._forget_decline(next(iter(self._declines)))
        self._declines[decline.room] = Early(peer, decline, now + self._timeouts.decline_s)
        self._note(peer, Decline, decline.room)

    def take(self, number: int) -> list[Early]:
        """Remove and return the messages that waited for this number, the offers first."""
        offers = [self._forget_offer(number, peer) for peer in self._offering.get(number, ())]
        return [early for early in (*offers, self._forget_decline(number)) if early is not None]

    def take_back(self, peer: Peer, abort: Abort, now: float) -> None:
        """Replace an offer that its peer has aborted by a decline, which gives the cause to a later prefill request."""
        early = self._offers.get((abort.room, peer))
        if early is not None and early.message.generation == abort.generation:
            self._forget_offer(abort.room, peer)
            self.keep_decline(peer, Decline(room=abort.room, generation=abort.generation, failure=abort.failure), now)

    def forget_peer(self, peer: Peer) -> None:
        kinds = self._numbers.get(peer, {})
        for number in list(kinds.get(Offer, ())):
            self._forget_offer(number, peer)
        for number in list(kinds.get(Decline, ())):
            self._forget_decline(number)

    def concerns(self, peer: Peer) -> bool:
        return peer in self._numbers

    def deadline(self) -> float | None:
        queues: tuple[Mapping[_Key, Early] | Mapping[int, Early], ...] = (self._offers, self._declines)
        return min([next(iter(queue.values())).until for queue in queues if queue], default=None)

    def expire(self, now: float) -> list[Early]:
        """Remove and return the messages that have expired."""
        old = []
        while self._offers and (key := next(iter(self._offers))) and self._offers[key].until <= now:
            old.append(self._forget_offer(*key))
        while self._declines and self._declines[number := next(iter(self._declines))].until <= now:
            old.append(self._forget_decline(number))
        return [early for early in old if early is not None]

    def messages(self) -> tuple[Offer | Decline, ...]:
        return tuple(early.message for early in (*self._offers.values(), *self._declines.values()))

    def copy(self) -> EarlyArrivals:
        twin = EarlyArrivals(self._timeouts, self._limits)
        twin._offers, twin._declines = self._offers.copy(), self._declines.copy()
        twin._offering = self._offering.copy()
        twin._bytes, twin._all_bytes = self._bytes.copy(), self._all_bytes
        twin._numbers = {
            peer: {kind: set(numbers) for kind, numbers in kinds.items()} for peer, kinds in self._numbers.items()
        }
        return twin

    def _note(self, peer: Peer, kind: type, number: int) -> None:
        self._numbers.setdefault(peer, {}).setdefault(kind, set()).add(number)

    def _forget_offer(self, number: int, peer: Peer) -> Early | None:
        early = self._offers.pop((number, peer), None)
        if early is not None:
            assert isinstance(early.message, Offer)  # keep_offer stores nothing else
            self._strike(peer, Offer, number)
            self._count_bytes(peer, -early.message.kept_bytes)
            others = tuple(other for other in self._offering.pop(number) if other != peer)
            if others:
                self._offering[number] = others
        return early

    def _forget_decline(self, number: int) -> Early | None:
        early = self._declines.pop(number, None)
        if early is not None:
            self._strike(early.peer, Decline, number)
        return early

    def _strike(self, peer: Peer, kind: type, number: int) -> None:
        kinds = self._numbers[peer]
        kinds[kind].discard(number)
        if not kinds[kind]:
            del kinds[kind]
        if not kinds:
            del self._numbers[peer]
