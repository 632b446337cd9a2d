"""`KVManager`: one per engine rank. It owns the rooms, the links and the transport, in one thread with one loop.

Engine threads never enter that thread: they post calls to it and read what it has published in their handles.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any

import msgspec

from kvroom.core.causes import Cause
from kvroom.core.counts import Audit, Counters
from kvroom.core.identity import KVIdentity
from kvroom.core.messages import Peer
from kvroom.core.room import Room
from kvroom.core.settings import Limits, Timeouts
from kvroom.core.table import RoomTable
from kvroom.dialling.allowed import allow_list
from kvroom.errors import ConfigurationError, InvalidRequest
from kvroom.listening.repeats import Repeats
from kvroom.plan import KVLayout, Parallel, Place
from kvroom.transports import Transport, create
from kvroom.wire.address import HostPort, parse_address, read_host
from kvroom.wire.auth import check_secret
from kvroom.wire.keys import RunKey

from .arguments import as_place
from .driver import Driver
from .fences import Declared
from .handles import KVReceiver, KVSender, OnRelease, check_directory
from .link import LinkLimits, Links
from .measure import Metrics
from .peers import Peers
from .resolver import Registration, Resolver, rank_info
from .sources import Sources
from .surroundings import Surroundings

logger = logging.getLogger(__name__)
_VIEWED_AT_ONCE = 256
_FENCE_S = 10.0
"""How long the operator's word waits for the transport's proof that the last bytes are here."""


class RoomView(msgspec.Struct, frozen=True):
    """One room as it stood when it was asked for."""

    room: int
    generation: int | None
    side: str
    phase: str
    status: str
    peers: tuple[str, ...]
    pages: int
    nbytes: int
    cleared: bool
    waits_for: str | None
    waits_until_s: float | None  # from now until its deadline
    failure: str | None
    cause: str | None  # of that failure, one of `core.causes.Cause`
    identity: dict[str, str]  # of the request, as this side states it: digests by name
    peer_identity: dict[str, str]  # as the other side states it; empty before it has
    timeline: tuple[tuple[str, float], ...]  # each phase it came to, and how many seconds ago


class FencedPeer(msgspec.Struct, frozen=True):
    """A lost peer that the operator has declared to be gone, and the pages of rooms here that waited for its end.

    `proven` False: not yet, because bytes that it has sent are still being taken in, or because this machine sees that
    its process runs. It is tried again with the rooms' next `drain_s`.
    """

    peer: str
    pages: int
    proven: bool


class KVManager:
    """Hands rooms over for one rank whose KV pool `layout` describes (memory of this process).

    `host`, `port` (0: any) are where peers link; beyond loopback a `secret` is required. `transport` is a name for
    `kvroom.transports.create`, which also takes the `transport_options`, or an instance, which the manager then owns.
    `trusted_fabric`: the operator trusts every process that reaches the ports or the fabric of the transport's engine;
    without it, an engine within reach of more than `host` is refused.
    `bootstrap_allow`: the directories that receivers may name, beside `register_with`: one text or several, with commas
    between entries, see `kvroom.dialling.allowed`. Without it: loopback addresses, `host` and `advertise_host`.
    A prefill rank gives `register_with`, the `host:port` of its bootstrap directory. A rank of several says how its
    engine splits the model (`parallel`, the same on all of its ranks) and where it stands (`place`). `checksum`: rooms
    that are received here ask for one unless told otherwise (see `KVReceiver.send_metadata`). `on_change` is called in
    the loop thread whenever a handle has changed. The environment may identify the machine, see `runtime.machine_id`.
    `surroundings`: of a simulation, see `runtime.surroundings`.

    Raises `ConfigurationError`, `BootstrapError` or `TransportError` from the constructor; nothing is left running.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise_host: str | None = None,
        transport: str | Transport = "auto",
        transport_options: Mapping[str, Any] | None = None,
        trusted_fabric: bool = False,
        bootstrap_allow: str | Sequence[str] | None = None,
        secret: bytes | None = None,
        register_with: str | None = None,
        parallel: Parallel | None = None,
        place: Place | None = None,
        timeouts: Timeouts | None = None,
        limits: Limits | None = None,
        link_limits: LinkLimits | None = None,
        checksum: bool = False,
        on_change: Callable[[], None] | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        around = surroundings or Surroundings()
        self.layout = layout
        self.parallel = parallel or Parallel()
        self.place = Place(0, 0, 0, 0) if place is None else as_place(place)
        self.parallel.check(self.place)
        self.checksum = checksum
        self.trusted_fabric = trusted_fabric
        self.timeouts = timeouts or Timeouts()
        self._on_change = on_change
        self._registration: Registration | None = None
        self._secret = secret or b""
        self.machine = around.machine()
        self._closed = False
        self._error_logger = Repeats(logger)  # of faults that a peer may have found a way to cause again and again
        with contextlib.ExitStack() as undo:
            check_secret(self._secret)
            self.allowed = allow_list(bootstrap_allow, host, advertise_host, register_with)
            if isinstance(transport, str):
                chosen = {"trusted_fabric": trusted_fabric, **(transport_options or {})}
                transport = create(transport, host=host, advertise=advertise_host, **chosen)
            self.transport = transport
            undo.callback(self.transport.close)
            self.transport.register(layout.memory())
            if warning := self.transport.warning():
                logger.warning("%s", warning)
            self.loop = around.loop()
            undo.callback(self.loop.close)
            table = RoomTable(self.timeouts, limits)
            peers = Peers(self.loop, table, layout, transport=self.transport, machine=self.machine)
            self.driver = Driver(self.loop, table, layout, peers)
            self.loop.on_error = self._on_error
            key, incarnation = None, around.incarnation
            if incarnation is None:
                key = RunKey()
                incarnation = key.incarnation
            self._links = Links(
                around.hearing(self.driver),
                identity=peers.describe(incarnation),
                key=key,
                incarnation=incarnation,
                host=host,
                port=port,
                advertise_host=advertise_host,
                secret=self._secret,
                limits=link_limits,
                listening=around.listening,
            )
            peers.links = self._links
            patience_s = self.timeouts.bootstrap_s * 0.9  # speaks before the rooms do
            self._resolver = Resolver(
                self._links,
                self._secret,
                patience_s,
                self.parallel,
                self.place,
                allowed=self.allowed,
                listed=around.listed,
            )
            self._sources = Sources(
                self.loop, self.driver, self._links, resolver=self._resolver, generations=around.generations()
            )
            undo.callback(lambda: self.loop.run(self._stop()))
            self.me = self.loop.run(self._start(register_with))
            undo.pop_all()  # `close` does it

    # -- for engines ----------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where peers link, `host:port`."""
        return self.me.address

    def sender(
        self,
        bootstrap_room: int | None = None,
        *,
        identity: KVIdentity | None = None,
        on_release: OnRelease | None = None,
    ) -> KVSender:
        """Open the prefill side of a room; without a number now, `init` gives it one later.

        `identity` says which request it is; it may also be stated later, by `identify`, and must be before `send`.
        `on_release(pages)` is called once, in the loop thread, when nobody reads the pages that were sent any more.
        """
        handle = KVSender(self.driver, on_release, on_change=self._on_change, identity=identity)
        if bootstrap_room is not None:
            handle.init(bootstrap_room)
        return handle

    def receiver(
        self,
        bootstrap_addr: str,
        bootstrap_room: int | None = None,
        *,
        identity: KVIdentity | None = None,
        on_release: OnRelease | None = None,
    ) -> KVReceiver:
        """Open the decode side of a room whose prefill ranks are known to the directory at `bootstrap_addr`.

        `identity` says which request it is; it may also be stated later, by `identify`, and must be before
        `send_metadata`.
        `on_release(pages)` is called once, in the loop thread, when nobody can write into the offered pages any more.
        Raises `AddressNotAllowed` for an address that is not on the list, see `bootstrap_allow`; there is no room then.
        A name that can only be judged when it has been looked up fails the room, with the same error.
        """
        check_directory(bootstrap_addr, self.allowed)
        handle = KVReceiver(
            self.driver,
            bootstrap_addr,
            on_release,
            sources=self._sources,
            checksum=self.checksum,
            on_change=self._on_change,
            identity=identity,
        )
        if bootstrap_room is not None:
            handle.init(bootstrap_room)
        return handle

    def audit(self) -> Audit:
        """What is kept now, recounted. All zeros when every room was cleared and drained."""
        return self.loop.call(self.driver.table.audit)

    def counters(self) -> Counters:
        """What happened since the start."""
        return self.loop.call(self._counters)

    def metrics(self) -> Metrics:
        """Every number that a monitor wants, in one frozen copy. Costs the same whatever is open."""
        return self.loop.call(self._metrics)

    def rooms(self, oldest: int | None = None) -> list[RoomView]:
        """Every room that was kept when this was called and still is, each as it stands when it is looked at.

        `oldest`: only so many, those that were opened first. They are looked at a few at a time, so that the loop
        thread is not held up by whoever wants to see many.
        """
        kept = self.loop.call(lambda: list(islice(self.driver.table, oldest)))
        parts = [kept[begin : begin + _VIEWED_AT_ONCE] for begin in range(0, len(kept), _VIEWED_AT_ONCE)]
        return [view for part in parts for view in self.loop.call(partial(self._views, part))]

    def room(self, number: int) -> list[RoomView]:
        """The rooms with this number, of both sides and with those that drain. None: empty, nothing is remembered."""
        return self.loop.call(lambda: self._views(self.driver.table.namesakes(number)))

    def peers(self) -> dict[str, str]:
        """The linked peers by address, each with the transport that reaches it and why."""
        return self.loop.call(lambda: {str(peer): self.driver.peers.how(peer) for peer in self._links.peers})

    def fence(self, where: str) -> list[FencedPeer]:
        """Take the operator's word that the processes of every lost peer at a host, or at `host:port`, have ended.

        Say so only of processes that were seen to end, or of a machine that is off: the pages that wait for their end
        are given to other requests, and a process that lives after all would write into those. Bytes that the peer had
        sent are awaited all the same; a peer that is linked is never fenced. Blocks for 10 seconds at most.
        `ConfigurationError` for a text that is no host, `InvalidRequest` if no lost peer is there.
        """
        place: HostPort | str
        try:
            place = read_host(where)
        except ConfigurationError:
            place = parse_address(where)

        def declare() -> list[Declared] | InvalidRequest:
            try:
                return self.driver.peers.fences.declare_gone(place)
            except InvalidRequest as error:  # the caller's, and no fault of the driver
                return error

        declared = self.loop.call(declare)
        if isinstance(declared, InvalidRequest):
            raise declared
        end_s = self.loop.now() + _FENCE_S
        found = []
        for peer, pages, proven in declared:
            try:
                found.append(FencedPeer(str(peer), pages, proven.result(max(0.0, end_s - self.loop.now()))))
            except FutureTimeoutError:
                found.append(FencedPeer(str(peer), pages, proven=False))
        return found

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no room and no early arrival is left; whether that was so within the time."""
        waiter: Future[None] = Future()
        self.loop.post(lambda: self.driver.wait_for_idle(waiter))
        try:
            waiter.result(timeout_s)
        except FutureTimeoutError:
            self.loop.post(lambda: self.driver.forget_waiter(waiter))
            return False
        return True

    def close(self) -> None:
        """End every room, tell the peers, stop the thread and close the transport. Idempotent.

        Pages whose drain could not be proven by then are not released: free the pool only with the process.
        """
        if not self._closed:
            self._closed = True
            self.loop.finish(self._stop())

    def __enter__(self) -> KVManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- in the loop thread ---------------------------------------------------------------------------------------

    def _on_error(self, error: Exception) -> None:
        """The driver's supervisor: a fault of ours ends the rooms, with words."""
        self._error_logger.exception("a fault in the driver; every open room is given up")
        self.driver.give_up_all(Cause.INTERNAL, f"internal error, {type(error).__name__}: {error}")

    async def _start(self, register_with: str | None) -> Peer:
        me = await self._links.start()
        if register_with is not None:
            self._registration = Registration(
                register_with, rank_info(me, self.layout, self.parallel, self.place), self._secret
            )
            await self._registration.start()
        return me

    async def _stop(self) -> None:
        try:
            if self._registration is not None:
                await self._registration.close()
            await self.loop.end_tasks()
            self.driver.give_up_all(Cause.CLOSED, "the manager was closed")
            await self._links.close()
            await self._resolver.close()
        finally:
            await asyncio.wrap_future(self.loop.run_blocking(self.transport.close))
        self.loop.end_calls()  # what the closed transport has reported, and what engines have posted meanwhile
        self.driver.give_up_all(Cause.CLOSED, "the manager was closed")
        await self.loop.end_tasks()
        self.driver.close()

    def _counters(self) -> Counters:
        counters = self.driver.table.counters
        return msgspec.structs.replace(counters, ended=dict(counters.ended))

    def _metrics(self) -> Metrics:
        return Metrics(
            census=self.driver.table.census(),
            counters=self._counters(),
            hand_offs={side.value: sums.copy() for side, sums in self.driver.hand_offs.items()},
            links=self.driver.peers.links_now(),
            links_lost=self.driver.peers.links_lost,
            connections_refused=self._links.refused,
            staging_slots=self.transport.staging_slots(),
            fenced=dict(self.driver.peers.fences.proofs),
        )

    def _views(self, rooms: Sequence[Room]) -> list[RoomView]:
        return [self._view(room) for room in rooms if not room.gone]

    def _view(self, room: Room) -> RoomView:
        assert room.number is not None  # it is in the table
        return RoomView(
            room=room.number,
            generation=room.generation,
            side=room.side.value,
            phase=room.phase.name,
            status=room.status.name,
            peers=tuple(sorted(str(peer) for peer in room.involved())),
            pages=len(room.held_pages),
            nbytes=room.nbytes,
            cleared=room.cleared,
            waits_for=room.awaited,
            waits_until_s=room.timer.at - self.loop.now() if room.timer else None,
            failure=room.failure.sentence(room.number) if room.failure else None,
            cause=room.failure.cause.value if room.failure else None,
            identity=dict(room.identity.fields) if room.identity else {},
            peer_identity=dict(room.peer_identity.fields) if room.peer_identity else {},
            timeline=tuple((step.phase.name, self.loop.now() - step.at) for step in room.history),
        )
