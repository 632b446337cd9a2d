"""The options of an explored world, and the named worlds: those of CI, and larger ones to run by hand."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from kvroom.core.identity import KVIdentity
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.core.table import RoomTable
from kvroom.runtime.fences import Fences

REQUEST, OTHER_REQUEST = KVIdentity.of([1, 2]), KVIdentity.of([1, 3])


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """The events of a world and the limits on them. A limit is for the whole world unless its comment names another."""

    sources: int = 1  # ranks of the prefill side; each writes its own share of every token
    sinks: int = 1  # decode workers; a second one offers the same room number
    together: bool = False  # the sinks are ranks of one decode worker, and each source serves all of them
    enforcing: bool = False  # the sink's transport does the writing, so revoking a grant and fencing are proof (`tcp`)
    checksum: bool = False  # the sink requests one
    chunks: int = 2  # sent by the prefill engine, each of one token
    openings: int = 1  # times that each manager may open the room, each time after the earlier one was cleared
    reopens: str = ""  # "source" or "sink": this side may open once more, while the room of the other side goes on
    expiries: int = 2  # deadlines that may expire at each manager
    losses: int = 1  # links that may be lost
    apart: bool = False  # the two ends of a broken link notice it at different times
    crashes: int = 0  # processes that may die; each may be started again, as a new incarnation
    repeats: bool = True  # of messages; matters only for a table that accepts a message older than one that it has had
    drops: bool = True  # of messages, in addition to those that a lost link drops
    late_links: bool = False  # a sink's room may end, and leave the table, before its links are up
    slow_offers: bool = False  # decode engines are slow: sinks renew, and time passes at sources before their deadline
    states_late: bool = False  # the prefill engine states the identity of its request after it has opened the room
    differs: bool = False  # the decode engine requests another request than the one that the prefill engine computes
    aborts: bool = True  # by the engines, in addition to clearing, which aborts too

    @property
    def asked_for(self) -> KVIdentity:
        """Return the request that the decode engine wants; the prefill engine computes `REQUEST`."""
        return OTHER_REQUEST if self.differs else REQUEST


class Deaths(msgspec.Struct, frozen=True, kw_only=True):
    """A sink and the end of its source on another machine (see `deaths`): what can prove it, and limits on the events.

    A place is "here", on the machine of the source, or "there", on another one; "" means that there is no such process.
    """

    sink_here: bool = False  # the sink runs on the source's machine, so that its transport sees the source's end
    witness: Literal["", "here", "there"] = ""  # where a manager runs that is linked with the sink from the beginning
    newcomer: Literal["", "here", "there"] = (
        ""  # where a process runs that takes the source's address once its link is lost
    )
    operator: bool = False  # an operator may state that the source's address is gone
    losses: int = 1  # times that the link of a living source may be lost
    expiries: int = 0  # deadlines of the sink that may expire


class Machines(NamedTuple):
    """The code under test; a planted bug replaces one of these."""

    table: type[RoomTable] = RoomTable
    source: type[Source] = Source
    sink: type[Sink] = Sink
    fences: type[Fences] = Fences


def _brief(**settings: Any) -> Scope:
    """Return a small scope: one token, messages lost only with their link, aborts only by clearing, and `settings`."""
    return Scope(**{"chunks": 1, "expiries": 0, "losses": 0, "drops": False, "aborts": False, **settings})


SCOPES: dict[str, Scope | Deaths] = {
    "two chunks": Scope(expiries=1, losses=0),
    "a link is lost": Scope(chunks=1, expiries=1, apart=True),
    "a link is lost, the sink writes": Scope(chunks=1, expiries=1, apart=True, enforcing=True),
    "a process dies": _brief(expiries=1, crashes=1, apart=True, drops=True),
    "a process dies, the sink writes": _brief(expiries=1, crashes=1, apart=True, enforcing=True),
    "checksums": Scope(chunks=1, expiries=1, checksum=True),
    "used twice": _brief(openings=2, losses=1),
    "used twice, links come late": _brief(openings=2, losses=1, late_links=True),
    "two decode workers": _brief(sinks=2, losses=1),
    "two ranks": _brief(sources=2, losses=1, apart=True),
    "two ranks, the sink writes": _brief(sources=2, losses=1, enforcing=True),
    "two ranks, checksums": _brief(sources=2, checksum=True),
    "two ranks, a process dies": _brief(sources=2, crashes=1),
    "slow offers": _brief(expiries=3, slow_offers=True, drops=True),
    "slow offers, a source opens twice": _brief(reopens="source", expiries=2, slow_offers=True, drops=True),
    "slow offers, a sink opens twice": _brief(reopens="sink", expiries=1, slow_offers=True),
    "two requests": _brief(states_late=True, differs=True, drops=True, losses=1, expiries=1),
    "two decode ranks": _brief(sinks=2, together=True, losses=1),
    "two decode ranks, checksums": _brief(sinks=2, together=True, checksum=True),
    "a death, a witness": Deaths(witness="here"),
    "a death, a witness elsewhere": Deaths(witness="there", newcomer="there"),
    "a death, a newcomer": Deaths(newcomer="here"),
    "a death, an operator": Deaths(operator=True, losses=2),
    "a death, an operator and a newcomer": Deaths(operator=True, newcomer="there"),
    "a death, seen here": Deaths(sink_here=True, witness="here"),
}
"""The scopes of every test run."""

LARGER: dict[str, Scope | Deaths] = {
    "two chunks, a link is lost": Scope(expiries=1, apart=True),
    "two chunks, a link is lost, checksums": Scope(expiries=1, apart=True, checksum=True),
    "two deaths": _brief(expiries=1, crashes=2),
    "a process and a link": _brief(expiries=1, losses=1, crashes=1, apart=True, drops=True),
    "used twice, a process dies": _brief(openings=2, crashes=1),
    "used twice, with deadlines": _brief(openings=2, losses=1, expiries=1),
    "two decode workers, used twice": _brief(sinks=2, openings=2),
    "two ranks, two chunks": _brief(sources=2, chunks=2, losses=1),
    "two ranks, a process dies, apart": _brief(sources=2, crashes=1, apart=True),
    "two ranks, a process dies, checksums": _brief(sources=2, crashes=1, checksum=True),
    "two ranks, with deadlines": _brief(sources=2, expiries=1),
    "two decode ranks, a process dies": _brief(sinks=2, together=True, crashes=1),
    "two decode ranks, the sink writes": _brief(sinks=2, together=True, losses=1, enforcing=True, apart=True),
    "two decode ranks, with deadlines": _brief(sinks=2, together=True, expiries=1),
    "two decode ranks, aborts": _brief(sinks=2, together=True, aborts=True, drops=True),
    "two ranks, slow offers": _brief(sources=2, expiries=1, slow_offers=True),
    "two decode ranks, slow offers": _brief(sinks=2, together=True, expiries=1, slow_offers=True),
    "two decode workers, slow offers": _brief(sinks=2, expiries=1, slow_offers=True),
    "two ranks, aborts": _brief(sources=2, losses=1, aborts=True, drops=True),
    "a death, with deadlines": Deaths(witness="here", expiries=1),
    "a death, a newcomer, with deadlines": Deaths(newcomer="here", operator=True, expiries=1),
    "a death, an operator, with deadlines": Deaths(operator=True, newcomer="there", losses=2, expiries=1),
}
"""The scopes that take minutes: `python -m kvroom_lab.explore --scope NAME`, or all of them with `--all`."""
