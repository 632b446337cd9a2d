"""From bootstrap directories to links: a decode rank finds and links its sources, a prefill rank stays registered.

A decode rank keeps the list of each directory and the ranks of it that were linked, so that most rooms send no query.
However, a name may come to stand for another prefill server while the old one still runs and its links are up (a
rolling update behind a service), so open links do not show that the list is still right. Therefore the list is used for
a few seconds only, and not after a room has failed:

    asked less than `FRESH_S` ago                  the list is used
    asked less than `STALE_S` ago                  the list is used, and the directory is queried in the background
    longer ago; or a room failed; or a link of     the directory is queried first; if it does not answer, the list is
    the room's group is lost                       used for as long as its links are open

Both times are short compared with the minutes of a rolling update, and long compared with the interval between rooms:
under load, a directory answers one query of each decode rank in `FRESH_S`. A new list replaces everything that was
kept: the server's description, and every group with a rank that is no longer listed as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any, NamedTuple, TypeVar

from kvroom.bootstrap import client
from kvroom.bootstrap.directory import RANK_TTL_S, NotReady, RankInfo, ServerInfo, Undecided
from kvroom.core.causes import Cause
from kvroom.core.messages import Failure, Peer
from kvroom.dialling.allowed import AllowList
from kvroom.errors import BootstrapError, KVRoomError, LinkError, PlanError
from kvroom.plan import KVLayout, Parallel, Place, dp_rank_of, match_ranks
from kvroom.wire.address import parse_address

from .causes import cause_of
from .link import Links
from .routing import Routing
from .surroundings import Listed
from .within import within

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_KNOWN = 1024
"""Directories whose lists are kept."""
RETRY_S = 0.2
"""Pause between two attempts to find and link the sources of a room."""
FRESH_S, STALE_S = 2.0, 4.0
"""Ages of a list; see the module."""
ASK_S = 1.0
"""Limit for a query to a directory whose list is kept, after which that list is used."""
TIMEOUT_S = 5.0
"""Time beyond the lease of an earlier registration that a prefill rank waits for that lease to end."""
MAX_TOLD = 64
"""Ranks that one decode rank links only to tell them that a room has failed here."""
MAX_SOURCES = 256
"""Ranks that one decode rank links for a room. The directory's answer determines them, so they need a limit."""
DIALS_AT_ONCE = 32
"""Dials in flight for one room."""
_OWN = frozenset({Cause.ABORTED, Cause.CLEARED, Cause.CLOSED, Cause.IN_USE, Cause.LIMIT, Cause.MISUSE})
"""Causes of this side's own engine, which do not put the list of the sources in doubt."""
_Group = tuple[
    str, int | None
]  # the address of a directory, and a data-parallel group behind it; None: all that it lists


class LinkedSources(NamedTuple):
    """The linked source ranks of a room."""

    peers: tuple[Peer, ...]
    """The sources."""
    sinks: tuple[int, ...]
    """For each source, the number of ranks of this side that offer to it."""


class Unresolved(KVRoomError):
    """The sources of a room could not be found or linked.

    `cause` is the cause of the room's failure. `waiting` are addresses of prefill ranks that may wait for the room and
    that this rank has to tell; the other ranks of its engine tell the rest.
    """

    def __init__(self, error: KVRoomError, waiting: tuple[str, ...]) -> None:
        super().__init__(str(error))
        self.cause = cause_of(error, otherwise=Cause.UNREACHABLE)
        self.waiting = waiting


class _Reshaped(Exception):
    """The server has fewer data-parallel groups than when the room's group was determined: determine it again."""


class _Linked(NamedTuple):
    """A data-parallel group that was linked, and the ranks that were listed for it at that time."""

    found: LinkedSources
    ranks: frozenset[RankInfo]


class _DirectoryMemory:
    """A directory's list of ranks, and the groups of it that were linked."""

    def __init__(self) -> None:
        self.latest: tuple[RankInfo, ...] = ()
        """The last list, complete or not."""
        self.whole: tuple[RankInfo, ...] = ()
        """The last complete list. A directory that was restarted gets its ranks back one by one."""
        self.groups: dict[int, _Linked] = {}
        """The data-parallel groups of `whole` that were linked."""
        self.asked_s = self.tried_s = 0.0
        """Times of its last answer, and of the last query in the background."""
        self.in_doubt = True
        """True after a failure: the directory is queried before the list is used again."""

    def renew(self, ranks: list[RankInfo], now_s: float) -> None:
        """Replace the list by the one that the directory has just sent."""
        self.latest = tuple(ranks)
        if ranks and len(ranks) == ranks[0].server.ranks:
            self.whole = self.latest
            listed = frozenset(ranks)
            self.groups = {dp: group for dp, group in self.groups.items() if group.ranks <= listed}
        self.trust(now_s)

    def trust(self, now_s: float) -> None:
        """Use the list as if it had been received now."""
        self.asked_s, self.in_doubt = now_s, False

    @property
    def server(self) -> ServerInfo | None:
        """The description of the whole server; None before all of its ranks were listed."""
        return self.whole[0].server if self.whole else None


class Resolver:
    """Finds the sources of rooms in kept lists, see the module, or queries the directory and links the ranks it lists.

    Args:
        links: dial the ranks.
        secret: the shared secret, which signs queries and answers.
        patience_s: limit for finding and linking the sources of one room.
        parallel: how this engine splits its model. Together with the directory's description of the prefill server it
            determines the source ranks, see `plan.match_ranks`.
        place: the coordinates of this rank in that split.
        allowed: the directories that may be queried; None: all.
        listed: queries a directory for its ranks.
    """

    def __init__(
        self,
        links: Links,
        secret: bytes,
        patience_s: float,
        parallel: Parallel,
        place: Place,
        *,
        allowed: AllowList | None = None,
        listed: Listed = client.listed,
    ) -> None:
        self._allowed, self._listed = allowed, listed
        self._links = links
        self._secret = secret
        self._patience_s = patience_s
        self._parallel, self._place = parallel, place
        self._memories: OrderedDict[str, _DirectoryMemory] = OrderedDict()
        self._asking: dict[str, asyncio.Task[_DirectoryMemory]] = {}
        self._finding: dict[_Group, asyncio.Task[LinkedSources | None]] = {}
        self._routing = Routing(secret, patience_s, allowed)

    def known(self, bootstrap_addr: str, room: int) -> LinkedSources | None:
        """Return the linked sources of this room from the kept list; None if the directory has to be queried."""
        memory = self._memories.get(bootstrap_addr)
        if memory is None or (server := memory.server) is None or self._is_stale(memory):
            return None
        if server.dp_size > 1 and not server.follow_bootstrap_room:
            return None
        found = self._linked(memory, dp_rank_of(room, server.dp_size))
        now_s = asyncio.get_running_loop().time()
        if found is not None and self._age_s(memory) > FRESH_S and now_s > memory.tried_s + FRESH_S:
            memory.tried_s = now_s
            self._ask(bootstrap_addr)
        return found

    async def find(self, bootstrap_addr: str, room: int) -> LinkedSources:
        """Find and link all sources of a room. Rooms of one group that wait at the same time share the search.

        Raises:
            Unresolved: no answer, no link or no valid list within `patience_s`; the text is the last error.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self._patience_s
        dp: int | None = None
        try:
            while True:
                server = await self._server(bootstrap_addr, end)
                dp = await self._routing.dp_rank(bootstrap_addr, server, room, end - loop.time())
                memory = self._memories.get(bootstrap_addr)
                if memory is None or memory.server != server:
                    continue
                found = self._linked(memory, dp)
                if found is not None:
                    return found
                if memory.groups.pop(dp, None) is not None:  # a link was lost: the server may have other ranks now
                    memory.in_doubt = True
                    continue
                with contextlib.suppress(_Reshaped):
                    found = await self._shared((bootstrap_addr, dp), end)
                    assert found is not None  # a group was named
                    return found
        except KVRoomError as error:
            raise Unresolved(error, self._waiting(bootstrap_addr, dp)) from None
        except (
            Exception
        ) as error:  # a supervisor: the directory chose these bytes, and only rooms that it serves may end
            logger.exception("invalid list of ranks from the directory at %s", bootstrap_addr)
            detail = f"invalid list of ranks from the directory at {bootstrap_addr}: {type(error).__name__}: {error}"
            raise Unresolved(BootstrapError(detail), ()) from None

    def note_failure(self, bootstrap_addr: str, failure: Failure) -> None:
        """Note that a room with sources from this directory has failed, so that the next room queries it first.

        A room that this side's own engine has ended changes nothing.
        """
        memory = self._memories.get(bootstrap_addr)
        if memory is not None and failure.cause not in _OWN:
            memory.in_doubt = True

    async def close(self) -> None:
        """End every search; the callers of `find` get `CancelledError`."""
        tasks = [*self._asking.values(), *self._finding.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._routing.close()

    def _age_s(self, memory: _DirectoryMemory) -> float:
        return asyncio.get_running_loop().time() - memory.asked_s

    def _is_stale(self, memory: _DirectoryMemory) -> bool:
        return memory.in_doubt or self._age_s(memory) > STALE_S

    def _linked(self, memory: _DirectoryMemory, dp: int) -> LinkedSources | None:
        group = memory.groups.get(dp)
        return group.found if group is not None and self._links.peers.issuperset(group.found.peers) else None

    async def _server(self, bootstrap_addr: str, end: float) -> ServerInfo:
        """Return the server as the directory lists it now, or as listed before if it does not answer within `ASK_S`."""
        while (memory := self._memories.get(bootstrap_addr)) is None or memory.server is None:
            await self._shared((bootstrap_addr, None), end)
        if self._is_stale(memory):
            with contextlib.suppress(asyncio.TimeoutError, KVRoomError):
                await within(asyncio.shield(self._ask(bootstrap_addr)), ASK_S)
            memory.trust(asyncio.get_running_loop().time())
        return memory.server

    def _ask(self, bootstrap_addr: str) -> asyncio.Task[_DirectoryMemory]:
        """Query the directory and keep its list. Callers at the same time share one query."""
        task = self._asking.get(bootstrap_addr)
        if task is None:
            task = self._begin(self._renewed(bootstrap_addr), f"ask {bootstrap_addr}")
            self._asking[bootstrap_addr] = task
            task.add_done_callback(lambda _: self._asking.pop(bootstrap_addr))
        return task

    async def _renewed(self, bootstrap_addr: str) -> _DirectoryMemory:
        ranks = await self._listed(bootstrap_addr, secret=self._secret, allowed=self._allowed)
        memory = self._memories.setdefault(bootstrap_addr, _DirectoryMemory())
        memory.renew(ranks, asyncio.get_running_loop().time())
        if len(self._memories) > MAX_KNOWN:
            self._memories.popitem(last=False)  # its next room queries the directory again
        return memory

    async def _shared(self, group: _Group, end: float) -> LinkedSources | None:
        """Join or start the search for a group. It ends with the patience of the room that started it."""
        task = self._finding.get(group)
        if task is None:
            task = self._finding[group] = self._begin(self._find(*group, end), f"find {group[0]}")
            task.add_done_callback(lambda _: self._finding.pop(group))
        return await asyncio.shield(task)

    def _begin(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        # Retrieve the exception: the waiting rooms get it, and asyncio would log it if all of them were cancelled.
        task = asyncio.get_running_loop().create_task(work, name=name)
        task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        return task

    async def _find(self, bootstrap_addr: str, dp: int | None, end: float) -> LinkedSources | None:
        """Try until the prefill side is up: either side may be started first.

        A try that hangs is cancelled at `end`, so that the failure names the directory or rank that is silent. The
        room's own deadline, which comes next, names neither.
        """
        loop = asyncio.get_running_loop()
        last: KVRoomError = LinkError(
            f"timed out after {self._patience_s:g} s: neither the directory at {bootstrap_addr} nor the prefill ranks "
            f"that it lists answered: is the worker up?"
        )
        while True:
            try:
                return await within(self._try(bootstrap_addr, dp), end - loop.time())
            except asyncio.TimeoutError:
                raise last from None
            except (NotReady, LinkError) as error:
                last = error
            if loop.time() + RETRY_S >= end:
                raise last
            await asyncio.sleep(RETRY_S)

    async def _try(self, bootstrap_addr: str, dp: int | None) -> LinkedSources | None:
        """Link the ranks of group `dp` that this rank needs. With None only check that the list is complete."""
        memory = self._memories.get(bootstrap_addr)
        # A younger list is the answer to this search's own query.
        if memory is None or memory.in_doubt or self._age_s(memory) >= RETRY_S:
            memory = await asyncio.shield(self._ask(bootstrap_addr))
        client.check_complete(bootstrap_addr, memory.latest)
        if dp is None:
            return None
        listed = memory.whole
        source = listed[0].parallel
        if dp >= source.dp:
            raise _Reshaped
        places, sinks = self._places(source, dp)
        at = {rank.place: rank for rank in listed}
        if missing := [place for place in places if place not in at]:
            raise BootstrapError(f"the directory at {bootstrap_addr} lists no prefill rank at {missing[0]}")
        ranks = [at[place] for place in places]
        # The first rank is dialled alone, the others `DIALS_AT_ONCE` at a time. A list may be wrong or false, and the
        # search repeats. If the first rank cannot be linked, each try has opened one connection and not one for each
        # listed rank.
        peers: list[Peer] = []
        while len(peers) < len(ranks):
            batch = ranks[len(peers) : len(peers) + DIALS_AT_ONCE] if peers else ranks[:1]
            peers += await asyncio.gather(*[self._links.dial(rank.address) for rank in batch])
        found = LinkedSources(tuple(peers), sinks)
        if frozenset(ranks).issubset(memory.whole):  # a query during the dials may have replaced the list
            memory.groups[dp] = _Linked(found, frozenset(ranks))
        return found

    def _places(self, source: Parallel, dp: int) -> tuple[tuple[Place, ...], tuple[int, ...]]:
        """Return the places of this rank's sources, and for each the number of ranks of this side that offer to it."""
        if source.group == self._parallel.group == 1:
            return (Place(dp, 0, 0, 0),), (1,)
        links = match_ranks(source, self._parallel)
        places = links.sources(self._place, dp)
        if len(places) > MAX_SOURCES:
            raise PlanError(
                f"a room of this rank would need links with {len(places)} prefill ranks, and the limit is "
                f"{MAX_SOURCES}: split the decode engine over more ranks, or the prefill engine (cp {source.cp} x tp "
                f"{source.tp} x pp {source.pp}) over fewer"
            )
        return places, tuple(links.offers(place) for place in places)

    def _waiting(self, bootstrap_addr: str, dp: int | None) -> tuple[str, ...]:
        """Return the ranks that this rank tells of a failure. The ranks of this engine together tell all listed ones.

        With `dp` None the room's group is not known, and any listed rank may wait for the room.
        """
        memory = self._memories.get(bootstrap_addr)
        ranks = [rank.address for rank in memory.latest if dp in (None, rank.place.dp)] if memory is not None else []
        if not ranks:
            return ()
        ours, theirs = self._parallel.group, len(ranks)
        mine = (self._place.cp * self._parallel.tp + self._place.tp) * self._parallel.pp + self._place.pp
        return tuple(ranks[mine % theirs :: ours][:MAX_TOLD])


class Registration:
    """Keeps one prefill rank registered in its directory, where registrations expire."""

    def __init__(self, bootstrap_addr: str, rank: RankInfo, secret: bytes) -> None:
        self._secret = secret
        self._bootstrap_addr = bootstrap_addr
        self._rank = rank
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Register, and refresh the registration until `close`.

        If an earlier run holds the place and does not answer, this waits for its lease to end.

        Raises:
            BootstrapError: the directory refuses the registration or does not answer; nothing is refreshed then.
        """
        loop = asyncio.get_running_loop()
        end, told = loop.time() + RANK_TTL_S + TIMEOUT_S, False
        while True:
            try:
                await client.register(self._bootstrap_addr, self._rank, secret=self._secret)
                break
            except Undecided as error:
                if loop.time() >= end:
                    raise
                if not told:
                    logger.warning("waiting for a place in the directory at %s: %s", self._bootstrap_addr, error)
                    told = True
            await asyncio.sleep(ASK_S)
        self._task = loop.create_task(self._refresh(), name="refresh the registration")

    async def close(self) -> None:
        """End the refreshing and the registration. If the directory does not answer, the registration expires."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(KVRoomError):
            await client.deregister(self._bootstrap_addr, self._rank, secret=self._secret, timeout_s=ASK_S)

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(RANK_TTL_S / 3)
            try:
                refused = await client.register(self._bootstrap_addr, self._rank, secret=self._secret)
            except KVRoomError as error:
                logger.warning("cannot refresh the registration at %s: %s", self._bootstrap_addr, error)
                continue
            if refused:
                logger.warning(
                    "another prefill engine, at %s, was refused by the directory at %s: a directory serves one prefill "
                    "engine, so start another directory for that one",
                    refused,
                    self._bootstrap_addr,
                )


def rank_info(me: Peer, layout: KVLayout, parallel: Parallel, place: Place) -> RankInfo:
    """Return the directory entry of a prefill rank."""
    where = parse_address(me.address)
    return RankInfo(
        rank_ip=where.host,
        rank_port=where.port,
        attn_tp_size=parallel.tp,
        attn_tp_rank=place.tp,
        attn_cp_size=parallel.cp,
        attn_cp_rank=place.cp,
        pp_size=parallel.pp,
        pp_rank=place.pp,
        system_dp_size=parallel.dp,
        system_dp_rank=place.dp,
        page_size=layout.page_tokens,
        kv_cache_dtype=layout.dtype,
        kv_heads=parallel.kv_heads,
        stages=parallel.stages,
        interleave=parallel.interleave,
        incarnation=me.incarnation,
    )
