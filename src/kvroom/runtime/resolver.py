"""Between bootstrap directories and links: a decode rank finds and links its sources, a prefill rank is findable."""

from __future__ import annotations

import asyncio
import logging

from kvroom.bootstrap import client
from kvroom.bootstrap.directory import RANK_TTL_S, NotReady, RankInfo
from kvroom.core.messages import Peer
from kvroom.errors import BootstrapError, KVRoomError, LinkError
from kvroom.plan import KVLayout
from kvroom.wire.address import parse_address

from .link import Links

logger = logging.getLogger(__name__)
MAX_KNOWN = 1024
RETRY_S = 0.2


class Resolver:
    """Answers from memory as long as the links it found are up; asks the directory again when one was lost."""

    def __init__(self, links: Links, secret: bytes, patience_s: float) -> None:
        self._links = links
        self._secret = secret
        self._patience_s = patience_s
        self._known: dict[str, tuple[Peer, ...]] = {}
        self._finding: dict[str, asyncio.Task[tuple[Peer, ...]]] = {}

    def known(self, bootstrap_addr: str) -> tuple[Peer, ...] | None:
        """The linked sources behind this directory, if that is known without asking anybody."""
        peers = self._known.get(bootstrap_addr)
        if peers is not None and self._links.peers.issuperset(peers):
            return peers
        return None

    async def find(self, bootstrap_addr: str) -> tuple[Peer, ...]:
        """Ask the directory and link all sources, once for many rooms. `KVRoomError` says what was in the way."""
        task = self._finding.get(bootstrap_addr)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._find(bootstrap_addr), name=f"find {bootstrap_addr}")
            self._finding[bootstrap_addr] = task
            task.add_done_callback(lambda done: self._found(bootstrap_addr, done))
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End every search."""
        tasks = list(self._finding.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _find(self, bootstrap_addr: str) -> tuple[Peer, ...]:
        """Try until the prefill side is there: it may be starting, and either side may come first.

        Ends in time also when a try hangs: the room's own deadline comes next and could not say who is silent.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self._patience_s
        fault: KVRoomError = LinkError(
            f"neither the directory at {bootstrap_addr} nor the prefill ranks that it lists answered within "
            f"{self._patience_s:g} s: is the worker up?"
        )
        while True:
            try:
                return await asyncio.wait_for(self._try(bootstrap_addr), end - loop.time())
            except asyncio.TimeoutError:
                raise fault from None
            except (NotReady, LinkError) as error:
                fault = error
            if loop.time() + RETRY_S >= end:
                raise fault
            await asyncio.sleep(RETRY_S)

    async def _try(self, bootstrap_addr: str) -> tuple[Peer, ...]:
        ranks = await client.lookup(bootstrap_addr, secret=self._secret)
        if len(ranks) != 1:
            raise BootstrapError(
                f"the directory at {bootstrap_addr} lists {len(ranks)} prefill ranks: "
                f"this version hands a room over from exactly one; start one prefill rank for each directory"
            )
        return tuple([await self._links.dial(rank.address) for rank in ranks])

    def _found(self, bootstrap_addr: str, task: asyncio.Task[tuple[Peer, ...]]) -> None:
        del self._finding[bootstrap_addr]
        if not task.cancelled() and task.exception() is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()  # it is only a memory: the directories are asked again
            self._known[bootstrap_addr] = task.result()


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


def rank_info(me: Peer, layout: KVLayout) -> RankInfo:
    """How a single prefill rank lists itself."""
    where = parse_address(me.address)
    return RankInfo(rank_ip=where.host, rank_port=where.port, page_size=layout.page_tokens, kv_cache_dtype=layout.dtype)
