"""Between bootstrap directories and links: a decode rank finds and links its sources, a prefill rank is findable."""

from __future__ import annotations

import asyncio
import logging
from typing import NamedTuple

from kvroom.bootstrap import client
from kvroom.bootstrap.directory import RANK_TTL_S, NotReady, RankInfo, ServerInfo
from kvroom.core.messages import Peer
from kvroom.errors import BootstrapError, KVRoomError, LinkError
from kvroom.plan import KVLayout, Parallel, Place, dp_rank_of, feeds
from kvroom.wire.address import parse_address

from .link import Links
from .routing import Routing
from .within import within

logger = logging.getLogger(__name__)
MAX_KNOWN = 1024
RETRY_S = 0.2
_Group = tuple[str, int | None]  # the address of a directory, and a data-parallel group behind it


class Found(NamedTuple):
    """The linked source ranks of a room, and of how many ranks of this side each gets an offer."""

    peers: tuple[Peer, ...]
    sinks: tuple[int, ...]


class Resolver:
    """Answers from memory as long as the links it found are up; asks the directory again when one was lost.

    `parallel` and `place`: how this engine splits its model, and which of its ranks this is. Which source ranks are
    linked follows from that and from what the directory says of the prefill server, as `plan.feeds` has it.
    """

    def __init__(self, links: Links, secret: bytes, patience_s: float, parallel: Parallel, place: Place) -> None:
        self._links = links
        self._secret = secret
        self._patience_s = patience_s
        self._parallel, self._place = parallel, place
        self._servers: dict[str, ServerInfo] = {}
        self._known: dict[_Group, Found] = {}
        self._finding: dict[_Group, asyncio.Task[Found]] = {}
        self._routing = Routing(secret, patience_s)

    def known(self, bootstrap_addr: str, room: int) -> Found | None:
        """The linked sources of this room, if they are known without asking anybody."""
        server = self._servers.get(bootstrap_addr)
        if server is None or (server.dp_size > 1 and not server.follow_bootstrap_room):
            return None
        return self._linked((bootstrap_addr, dp_rank_of(room, server.dp_size)))

    async def find(self, bootstrap_addr: str, room: int) -> Found:
        """Ask the directory and link all sources, once for many rooms. `KVRoomError` says what was in the way."""
        server = self._servers.get(bootstrap_addr)
        if server is None:
            first = await self._shared((bootstrap_addr, None))
            server = self._servers[bootstrap_addr]
            if server.dp_size == 1:
                return first
        dp = await self._routing.dp_rank(bootstrap_addr, server, room)
        return self._linked((bootstrap_addr, dp)) or await self._shared((bootstrap_addr, dp))

    async def close(self) -> None:
        """End every search."""
        tasks = list(self._finding.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._routing.close()

    def _linked(self, group: _Group) -> Found | None:
        found = self._known.get(group)
        return found if found is not None and self._links.peers.issuperset(found.peers) else None

    async def _shared(self, group: _Group) -> Found:
        """One search for all rooms that wait for it. Group `None`: any one, of a server that is not known yet."""
        task = self._finding.get(group)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._find(group), name=f"find {group[0]}")
            self._finding[group] = task
            task.add_done_callback(lambda done: self._found(group, done))
        return await asyncio.shield(task)

    async def _find(self, group: _Group) -> Found:
        """Try until the prefill side is there: it may be starting, and either side may come first.

        Ends in time also when a try hangs: the room's own deadline comes next and could not say who is silent.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self._patience_s
        fault: KVRoomError = LinkError(
            f"neither the directory at {group[0]} nor the prefill ranks that it lists answered within "
            f"{self._patience_s:g} s: is the worker up?"
        )
        while True:
            try:
                return await within(self._try(*group), end - loop.time())
            except asyncio.TimeoutError:
                raise fault from None
            except (NotReady, LinkError) as error:
                fault = error
            if loop.time() + RETRY_S >= end:
                raise fault
            await asyncio.sleep(RETRY_S)

    async def _try(self, bootstrap_addr: str, dp: int | None) -> Found:
        ranks = await client.lookup(bootstrap_addr, secret=self._secret)
        server = ranks[0].server
        if len(self._servers) >= MAX_KNOWN:
            self._servers.clear()  # it is only a memory: the directories are asked again
        self._servers[bootstrap_addr] = server
        if dp is None and server.dp_size > 1:
            return Found((), ())  # which group is asked next, for each room
        places, sinks = self._places(server.parallel, dp or 0)
        at = {rank.place: rank.address for rank in ranks}
        if missing := [place for place in places if place not in at]:
            raise BootstrapError(f"the directory at {bootstrap_addr} lists no prefill rank at {missing[0]}")
        return Found(tuple(await asyncio.gather(*[self._links.dial(at[place]) for place in places])), sinks)

    def _places(self, source: Parallel, dp: int) -> tuple[tuple[Place, ...], tuple[int, ...]]:
        """Where our sources stand in their engine, and how many ranks of ours offer to each."""
        if source.group == self._parallel.group == 1:
            return (Place(dp, 0, 0, 0),), (1,)
        links = feeds(source, self._parallel)
        places = links.sources(self._place, dp)
        return places, tuple(links.offers(place) for place in places)

    def _found(self, group: _Group, task: asyncio.Task[Found]) -> None:
        del self._finding[group]
        if not task.cancelled() and task.exception() is None and (found := task.result()).peers:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[group[0], group[1] or 0] = found


class Registration:
    """Keeps one prefill rank listed in its directory, whose entries expire."""

    def __init__(self, bootstrap_addr: str, rank: RankInfo, secret: bytes) -> None:
        self._secret = secret
        self._bootstrap_addr = bootstrap_addr
        self._rank = rank
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Register now (`BootstrapError` if that is refused or nobody answers) and refresh from then on."""
        await client.register(self._bootstrap_addr, self._rank, secret=self._secret)
        self._task = asyncio.get_running_loop().create_task(self._refresh(), name="refresh the registration")

    async def close(self) -> None:
        """Refresh no more; the entry expires by itself."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(RANK_TTL_S / 3)
            try:
                await client.register(self._bootstrap_addr, self._rank, secret=self._secret)
            except KVRoomError as error:
                logger.warning("not listed in the directory at %s for now: %s", self._bootstrap_addr, error)


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
    )
