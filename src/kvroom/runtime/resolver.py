"""Between bootstrap directories and links: a decode rank finds and links its sources, a prefill rank is findable.

A decode rank remembers the list of each directory, and the ranks of it that were linked, so that a room costs no
question. But a name may come to stand for another prefill server while the old one still lives and its links are up (a
rolling update behind a service): links alone do not show that the memory is out of date. So it is never older than a
few seconds, and is not believed once a room has failed:

    asked less than `FRESH_S` ago                  the memory answers
    asked less than `STALE_S` ago                  the memory answers, and the directory is asked meanwhile
    longer ago; or a room failed; or a link of     the directory is asked first; if it does not answer, the memory
    the room's group is lost                       stands for as long as its links do

Both times are short beside the minutes of a rolling update, and long beside the rate of rooms: under load a directory
answers one question in `FRESH_S` of each decode rank. A list replaces the whole memory: the shape of the server, and
every group of which a rank is not listed as it was.
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
RETRY_S = 0.2
FRESH_S, STALE_S = 2.0, 4.0
ASK_S = 1.0
"""The time that a room waits for a directory of which there is a memory."""
TIMEOUT_S = 5.0
"""The time beyond a lease that a newcomer waits for it to end."""
MAX_TOLD = 64
"""Ranks that one rank of ours links to only in order to tell them that a room has failed here."""
MAX_SOURCES = 256
"""Ranks that one rank of ours links to for a room. The directory's answer says how many, so they have a bound."""
DIALS_AT_ONCE = 32
_OWN = frozenset({Cause.ABORTED, Cause.CLEARED, Cause.CLOSED, Cause.IN_USE, Cause.LIMIT, Cause.MISUSE})
"""Failures that say nothing of where a room's sources are."""
_Group = tuple[
    str, int | None
]  # the address of a directory, and a data-parallel group behind it; None: all that it lists


class LinkedSources(NamedTuple):
    """The linked source ranks of a room, and of how many ranks of this side each gets an offer."""

    peers: tuple[Peer, ...]
    sinks: tuple[int, ...]


class Unresolved(KVRoomError):
    """The sources of a room could not be found or linked.

    `cause` is what is counted. `waiting` are addresses of prefill ranks that may wait for the room; to tell those is
    this rank's part of telling all of them.
    """

    def __init__(self, error: KVRoomError, waiting: tuple[str, ...]) -> None:
        super().__init__(str(error))
        self.cause = cause_of(error, otherwise=Cause.UNREACHABLE)
        self.waiting = waiting


class _Reshaped(Exception):
    """The server behind a directory has another number of data-parallel groups than when a room's was chosen."""


class _Linked(NamedTuple):
    """A group that was linked, and the ranks that were listed for it then."""

    found: LinkedSources
    ranks: frozenset[RankInfo]


class _DirectoryMemory:
    """A directory's list of ranks, and the groups of it that were linked."""

    def __init__(self) -> None:
        self.latest: tuple[RankInfo, ...] = ()
        """As it was listed last, whole or not."""
        self.whole: tuple[RankInfo, ...] = ()
        """As it was listed last with no rank missing. A directory that was restarted learns its ranks one by one."""
        self.groups: dict[int, _Linked] = {}
        """Of `whole`, the data-parallel groups that were linked."""
        self.asked_s = self.tried_s = 0.0
        """Times of its last answer, and of the last question that was only to keep the memory young."""
        self.in_doubt = True

    def renew(self, ranks: list[RankInfo], now_s: float) -> None:
        """Take over the list that the directory has just given."""
        self.latest = tuple(ranks)
        if ranks and len(ranks) == ranks[0].server.ranks:
            self.whole = self.latest
            listed = frozenset(ranks)
            self.groups = {dp: group for dp, group in self.groups.items() if group.ranks <= listed}
        self.trust(now_s)

    def trust(self, now_s: float) -> None:
        """Let it answer, as if it had been listed just now."""
        self.asked_s, self.in_doubt = now_s, False

    @property
    def server(self) -> ServerInfo | None:
        """The whole server; None before all of its ranks were listed."""
        return self.whole[0].server if self.whole else None


class Resolver:
    """Answers from memory, see the module, or asks the directory and links what it lists.

    `parallel` and `place`: how this engine splits its model, and which of its ranks this is. Which source ranks are
    linked follows from that and from what the directory says of the prefill server, as `plan.feeds` has it. `allowed`:
    the directories that may be asked; None: all. `listed` asks one.
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
        """The linked sources of this room, if they are known without asking anybody."""
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
        """Find and link all sources of a room, once for many rooms. `Unresolved` says what was in the way."""
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
                if memory.groups.pop(dp, None) is not None:  # a link was lost: the server may have another shape now
                    memory.in_doubt = True
                    continue
                with contextlib.suppress(_Reshaped):
                    found = await self._shared((bootstrap_addr, dp), end)
                    assert found is not None  # a group was named
                    return found
        except KVRoomError as error:
            raise Unresolved(error, self._waiting(bootstrap_addr, dp)) from None
        except Exception as error:  # a supervisor: a directory chose its answer, and only rooms that it serves may end
            logger.exception("the ranks that %s lists cannot be used", bootstrap_addr)
            detail = f"the ranks that {bootstrap_addr} lists cannot be used: {type(error).__name__}: {error}"
            raise Unresolved(BootstrapError(detail), ()) from None

    def note_failure(self, bootstrap_addr: str, failure: Failure) -> None:
        """Note that a room with sources from there has failed. The next one asks the directory, unless this side's own
        engine has ended it.
        """
        memory = self._memories.get(bootstrap_addr)
        if memory is not None and failure.cause not in _OWN:
            memory.in_doubt = True

    async def close(self) -> None:
        """End every search."""
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
        """Return the server as the directory lists it now, or as it did last if it does not answer."""
        while (memory := self._memories.get(bootstrap_addr)) is None or memory.server is None:
            await self._shared((bootstrap_addr, None), end)
        if self._is_stale(memory):
            with contextlib.suppress(asyncio.TimeoutError, KVRoomError):
                await within(asyncio.shield(self._ask(bootstrap_addr)), ASK_S)
            memory.trust(asyncio.get_running_loop().time())
        return memory.server

    def _ask(self, bootstrap_addr: str) -> asyncio.Task[_DirectoryMemory]:
        """Ask the directory, once for all that want to know, and remember what it lists."""
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
            self._memories.popitem(last=False)  # it is only a memory: the directory is asked again
        return memory

    async def _shared(self, group: _Group, end: float) -> LinkedSources | None:
        """One search for all rooms that wait for it, for as long as the first of them waits."""
        task = self._finding.get(group)
        if task is None:
            task = self._finding[group] = self._begin(self._find(*group, end), f"find {group[0]}")
            task.add_done_callback(lambda _: self._finding.pop(group))
        return await asyncio.shield(task)

    def _begin(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        # Its exception is taken note of: those that wait for the task get it, and none may be left.
        task = asyncio.get_running_loop().create_task(work, name=name)
        task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        return task

    async def _find(self, bootstrap_addr: str, dp: int | None, end: float) -> LinkedSources | None:
        """Try until the prefill side is there: it may be starting, and either side may come first.

        Ends in time also when a try hangs: the room's own deadline comes next and could not say who is silent.
        """
        loop = asyncio.get_running_loop()
        last: KVRoomError = LinkError(
            f"neither the directory at {bootstrap_addr} nor the prefill ranks that it lists answered within "
            f"{self._patience_s:g} s: is the worker up?"
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
        """Link the ranks of group `dp` that this one needs; with None only see that the directory lists all ranks."""
        memory = self._memories.get(bootstrap_addr)
        if memory is None or memory.in_doubt or self._age_s(memory) >= RETRY_S:  # else it was asked for this very room
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
        # The first rank is dialled alone and the others a few at a time. A list may be wrong, and the search that it is
        # for tries again and again. Where the first rank is not there, one connection a try was opened, and not as many
        # as the list has ranks.
        peers: list[Peer] = []
        while len(peers) < len(ranks):
            batch = ranks[len(peers) : len(peers) + DIALS_AT_ONCE] if peers else ranks[:1]
            peers += await asyncio.gather(*[self._links.dial(rank.address) for rank in batch])
        found = LinkedSources(tuple(peers), sinks)
        if frozenset(ranks).issubset(memory.whole):  # and not listed otherwise meanwhile
            memory.groups[dp] = _Linked(found, frozenset(ranks))
        return found

    def _places(self, source: Parallel, dp: int) -> tuple[tuple[Place, ...], tuple[int, ...]]:
        """Where our sources stand in their engine, and how many ranks of ours offer to each."""
        if source.group == self._parallel.group == 1:
            return (Place(dp, 0, 0, 0),), (1,)
        links = match_ranks(source, self._parallel)
        places = links.sources(self._place, dp)
        if len(places) > MAX_SOURCES:
            raise PlanError(
                f"this rank would link with {len(places)} prefill ranks for one room, at most {MAX_SOURCES} are "
                f"possible: split the decode engine over more ranks, or the prefill engine (cp {source.cp} x tp "
                f"{source.tp} x pp {source.pp}) over fewer"
            )
        return places, tuple(links.offers(place) for place in places)

    def _waiting(self, bootstrap_addr: str, dp: int | None) -> tuple[str, ...]:
        """The ranks that this rank tells of a failure: together the ranks of this engine tell all that were listed.

        `dp` None: the room's group is not known, and each of them may wait for it.
        """
        memory = self._memories.get(bootstrap_addr)
        ranks = [rank.address for rank in memory.latest if dp in (None, rank.place.dp)] if memory is not None else []
        if not ranks:
            return ()
        ours, theirs = self._parallel.group, len(ranks)
        mine = (self._place.cp * self._parallel.tp + self._place.tp) * self._parallel.pp + self._place.pp
        return tuple(ranks[mine % theirs :: ours][:MAX_TOLD])


class Registration:
    """Keeps one prefill rank listed in its directory, whose entries expire."""

    def __init__(self, bootstrap_addr: str, rank: RankInfo, secret: bytes) -> None:
        self._secret = secret
        self._bootstrap_addr = bootstrap_addr
        self._rank = rank
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Register now and refresh from then on. `BootstrapError` if that is refused or nobody answers.

        Where the rank of an earlier run has the place and does not answer, wait for its lease to end.
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
                    logger.warning("waits for a place in the directory at %s: %s", self._bootstrap_addr, error)
                    told = True
            await asyncio.sleep(ASK_S)
        self._task = loop.create_task(self._refresh(), name="refresh the registration")

    async def close(self) -> None:
        """Refresh no more, and end the registration; where the directory does not answer it expires by itself."""
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
                logger.warning("not listed in the directory at %s for now: %s", self._bootstrap_addr, error)
                continue
            if refused:
                logger.warning(
                    "another prefill engine, at %s, wanted to register in the directory at %s and was refused: one "
                    "directory belongs to one prefill engine, give that one a directory of its own",
                    refused,
                    self._bootstrap_addr,
                )


def rank_info(me: Peer, layout: KVLayout, parallel: Parallel, place: Place) -> RankInfo:
    """How a prefill rank lists itself."""
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
