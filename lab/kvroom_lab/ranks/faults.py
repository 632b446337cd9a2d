"""One rank of several fails at a chosen moment; every other rank must end correctly.

The law: the end of a room on each rank follows from the links. Ranks that had ended before the fault stay as they are.
Of the others, the ranks linked with the faulty rank fail. A rank that a chain of links joins with it fails too, unless
it receives everything that it needs before the failure reaches it; each names the cause. The rest are not affected, and
succeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from itertools import product
from typing import Any, NamedTuple

import msgspec

from kvroom import Timeouts
from kvroom.plan.ranks import match_ranks

from .cases import Case, SideName
from .fleet import Fleet, Process, Processes, Rank, every
from .worker import Ended

TIMES = Timeouts(bootstrap_s=3, waiting_s=3, stall_s=5, drain_s=2, decline_s=1)
WITHIN_S = 15.0  # more than any chain of these deadlines
ROOM, NEXT_ROOM = 1, 2
FAULT_CASES = ("tp2-tp4", "pp2tp2-pp2tp1", "mla-tp4-tp1")
WHY = "the test aborts this rank"


class Fault(Enum):
    """The fault of one rank."""

    KILL_SOURCE = "kill a prefill rank"
    KILL_SINK = "kill a decode rank"
    ABORT_SOURCE = "a prefill rank aborts"
    ABORT_SINK = "a decode rank aborts"
    SILENT_SOURCE = "a prefill rank's engine stops sending"

    @property
    def side(self) -> SideName:
        return "sink" if self in (Fault.KILL_SINK, Fault.ABORT_SINK) else "source"

    @property
    def kills(self) -> bool:
        return self in (Fault.KILL_SOURCE, Fault.KILL_SINK)


class Moment(Enum):
    """The moment of the fault."""

    BEFORE_OFFER = "before any offer"
    AFTER_OFFER = "after all offers"
    MIDDLE = "when all ranks have sent the first part"
    ONE_DONE = "when one sink has everything"
    FLYING = "right after everything was submitted"


class Story(NamedTuple):
    """A fault in a case.

    With `last` it strikes the last rank of its side that has not ended, otherwise the first.
    """

    case: Case
    fault: Fault
    moment: Moment
    last: bool = True

    @property
    def name(self) -> str:
        which = "last" if self.last else "first"
        return f"{self.case.name}-{self.fault.name}-{self.moment.name}-{which}".lower().replace("_", "-")


def stories(case: Case) -> Iterator[Story]:
    """Yield the stories of a case.

    `ONE_DONE` needs a sink that does not need every source, so that it is done first.
    """
    links = match_ranks(case.source.parallel, case.sink.parallel)
    needs = [set(links.sources(sink)) for sink in case.sink.parallel.places()]
    apart = any(one < set().union(*needs) for one in needs)
    for fault, moment, last in product(Fault, Moment, (True, False)):
        has_more_to_send = moment in (Moment.AFTER_OFFER, Moment.MIDDLE)
        if (has_more_to_send or fault is not Fault.SILENT_SOURCE) and (apart or moment is not Moment.ONE_DONE):
            yield Story(case, fault, moment, last)


def run_story(story: Story, transport: str, processes: Processes, **options: Any) -> list[str]:
    """Play a story; all ranks but the faulty one go on as if nothing had happened. Return everything that is wrong."""
    processes.want(story.case.ranks + story.fault.kills)  # one more, to replace the killed process
    case = _in_parts(_larger(story.case) if story.moment is Moment.FLYING else story.case)
    with Fleet(case, transport, processes, timeouts=TIMES, **options) as fleet:
        play = _Play(story, fleet)
        play.begin()
        play.strike()
        play.let_it_spread()
        play.go_on()
        wrong = play.judge()
        wrong += fleet.wrong_bytes()
        wrong += fleet.clear(ROOM)
        wrong += fleet.leftovers()
        fleet.revive()
        fleet.hand_over(NEXT_ROOM, *case.requests[1])
        wrong += fleet.unsuccessful(NEXT_ROOM)
        wrong += fleet.wrong_bytes()  # including late bytes, and those of the new room
        wrong += fleet.clear(NEXT_ROOM)
        return wrong + fleet.leftovers()


def _in_parts(case: Case) -> Case:
    """Cut the request into two sends, so that the fault can come between them."""
    return msgspec.structs.replace(case, source=msgspec.structs.replace(case.source, chunks=(0.4,)))


def _larger(case: Case) -> Case:
    """Make the elements and the requests larger, so that transfers take a while."""
    kinds = tuple(msgspec.structs.replace(kind, head_bytes=16 * kind.head_bytes) for kind in case.kinds)
    return msgspec.structs.replace(case, kinds=kinds, requests=((1024, 0), (77, 0)))


class _Play:
    def __init__(self, story: Story, fleet: Fleet) -> None:
        self._story = story
        self._fleet = fleet
        case = fleet.case
        links = match_ranks(case.source.parallel, case.sink.parallel)
        self._sources_of = {place: links.sources(place) for place in case.sink.parallel.places()}
        self._links: set[tuple[Rank, Rank]] = {
            (("source", source), ("sink", sink)) for sink, sources in self._sources_of.items() for source in sources
        }
        self._done: set[Rank] = set()
        self._victim: Rank | None = None

    def begin(self) -> None:
        """Run up to the moment of the fault."""
        fleet, moment = self._fleet, self._story.moment
        tokens, prefix = fleet.case.requests[0]
        every(fleet.everyone, "open", room=ROOM, tokens=tokens, prefix=prefix)
        self._expect(fleet.sinks, "WaitingForInput")
        if moment is Moment.BEFORE_OFFER:
            return
        every(fleet.sinks, "offer", room=ROOM)
        self._expect(fleet.sources, "WaitingForInput")
        if moment is Moment.MIDDLE:
            every(fleet.sources, "send", room=ROOM, steps=1)
            self._expect(fleet.sinks, "Transferring")
        elif moment is Moment.ONE_DONE:
            self._complete_one_sink()
        elif moment is Moment.FLYING:
            every([one for one in fleet.sources if one is not self._silent()], "send", room=ROOM)

    def strike(self) -> None:
        """Let the fault happen."""
        fault, fleet = self._story.fault, self._fleet
        self._victim = self._choose()
        process = fleet.ranks[self._victim]
        if fault.kills:
            fleet.kill(self._victim)
        elif fault is not Fault.SILENT_SOURCE:
            process.ask("abort", room=ROOM, detail=WHY)

    def let_it_spread(self) -> None:
        """Wait until the fault has spread, where links carry it, so that no rank acts before it does."""
        if self._spreads():
            self._expect(self._ranks(self._concerned().__contains__), "Failed")

    def go_on(self) -> None:
        """Let all other ranks do what they would have done."""
        fleet = self._fleet
        if self._story.moment is Moment.BEFORE_OFFER:
            every(fleet.sinks, "offer", room=ROOM)
        every([one for one in fleet.sources if one is not self._silent()], "send", room=ROOM)

    def judge(self) -> list[str]:
        """Return the ranks that have not ended, or not as the links demand."""
        fleet = self._fleet
        ended = dict(zip(fleet.ranks, fleet.ended(fleet.everyone, ROOM, WITHIN_S), strict=True))
        may = self._concerned()
        must = may if self._spreads() else set() if self._story.moment is Moment.FLYING else self._near(self._struck())
        wrong = []
        for rank, end in ended.items():
            name = fleet.ranks[rank].name
            if end.status not in ("Failed", "Success"):
                wrong.append(f"{name} has not ended: it is {end.status}")
            elif end.status == "Failed" and rank not in may:
                wrong.append(f"{name} failed without a link to the faulty rank: {end.failure}")
            elif end.status == "Success" and rank in must:
                wrong.append(f"{name} succeeded although it is linked with the faulty rank")
            elif end.status == "Failed" and not self._says_why(end):
                wrong.append(f"{name} does not name the cause: {end.failure}")
        return wrong

    # -- choice of the rank -------------------------------------------------------------------------------------------

    def _choose(self) -> Rank:
        ranks = [rank for rank in self._fleet.ranks if rank[0] == self._story.fault.side and rank not in self._done]
        return ranks[-1 if self._story.last else 0]

    def _silent(self) -> Process | None:
        """Return the prefill rank whose engine stops sending, or None in other stories."""
        return self._fleet.ranks[self._choose()] if self._story.fault is Fault.SILENT_SOURCE else None

    def _complete_one_sink(self) -> None:
        """Let the sources of one sink send everything, and wait for all ranks that can end then.

        Others must be left.
        """
        fleet = self._fleet
        target = next(sink for sink, asked in self._sources_of.items() if set(asked) < set(fleet.places("source")))
        senders = set(self._sources_of[target])
        every(self._ranks(lambda rank: rank[0] == "source" and rank[1] in senders), "send", room=ROOM)
        self._done = {("source", place) for place in senders}
        self._done |= {("sink", sink) for sink, asked in self._sources_of.items() if senders.issuperset(asked)}
        self._expect(self._ranks(self._done.__contains__), "Success")

    def _spreads(self) -> bool:
        """Return whether links carry the fault to every rank concerned: all have offered, and peers notice it."""
        seen = self._story.fault is not Fault.SILENT_SOURCE
        return seen and self._story.moment not in (Moment.BEFORE_OFFER, Moment.FLYING)

    def _concerned(self) -> set[Rank]:
        """Return the faulty rank and the ranks that links join with it, through ranks that had not ended."""
        reached, new = {self._struck()}, [self._struck()]
        while new:
            fresh = self._near(new.pop()) - reached
            reached |= fresh
            new += fresh
        return reached

    def _near(self, rank: Rank) -> set[Rank]:
        """Return the ranks that are linked with this one and had not ended."""
        return {b if a == rank else a for a, b in self._links if rank in (a, b)} - self._done

    def _struck(self) -> Rank:
        assert self._victim is not None  # called after the fault only
        return self._victim

    # -- causes -------------------------------------------------------------------------------------------------------

    def _says_why(self, end: Ended) -> bool:
        detail = end.failure.partition("): ")[2]
        fault, where = self._story.fault, self._fleet.addresses[self._struck()]
        if fault is Fault.SILENT_SOURCE:
            return "the engine to send further pages" in detail or where in detail
        if not fault.kills:
            return WHY in detail
        # The ranks that wait for a decode rank cannot name it if it dies before it has offered.
        unknown = fault is Fault.KILL_SINK and self._story.moment is Moment.BEFORE_OFFER
        return where in detail or (unknown and "to offer pages" in detail)

    # -- calls --------------------------------------------------------------------------------------------------------

    def _ranks(self, which: Callable[[Rank], bool]) -> list[Process]:
        return [process for rank, process in self._fleet.ranks.items() if which(rank)]

    def _expect(self, ranks: list[Process], status: str) -> None:
        """Wait until all of these ranks have this status."""
        answers = every(ranks, "until", room=ROOM, status=status, timeout_s=WITHIN_S)
        late = [rank.name for rank, came in zip(ranks, answers, strict=True) if not came]
        if late:
            raise AssertionError(f"{', '.join(late)} did not reach {status}")
