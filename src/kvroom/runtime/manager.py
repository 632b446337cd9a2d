"""`KVManager`: one per engine rank. It owns the rooms, the links and the transport, in one thread with one loop.

Engine threads never run in that thread: they post calls to it, and read the state that it publishes in their handles.
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
from kvroom.core.trace import RequestTrace
from kvroom.dialling.allowed import allow_list
from kvroom.errors import ConfigurationError, InvalidRequest
from kvroom.listening.repeats import Repeats
from kvroom.plan import KVLayout, Parallel, Place
from kvroom.transports import Transport, create
from kvroom.wire.address import HostPort, parse_address, read_host
from kvroom.wire.auth import check_secret
from kvroom.wire.keys import RunKey

from .arguments import as_place, check_directory
from .callbacks import OnRelease
from .driver import Driver
from .fences import Declared
from .handles import KVReceiver, KVSender
from .link import LinkLimits, Links
from .measure import Metrics
from .peers import Peers
from .resolver import Registration, Resolver, rank_info
from .sources import Sources
from .surroundings import Surroundings
from .views import RoomView, view_of

logger = logging.getLogger(__name__)
_VIEWED_AT_ONCE = 256
_FENCE_S = 10.0
"""Time limit of `KVManager.fence` for the transport's proof that the last bytes of the declared peers have arrived."""


class FencedPeer(msgspec.Struct, frozen=True):
    """A lost peer that the operator has declared to be gone."""

    peer: str
    """Its address, `host:port`."""
    pages: int
    """Pages of rooms here that waited for its end."""
    proven: bool
    """True if their drain is proven. False: bytes that the peer had sent are still arriving, or this machine sees that
    its process runs. The rooms ask again after their next `drain_s`."""


class KVManager:
    """Hand rooms over for one engine rank. Every method may be called from any thread.

    The environment variable `KVROOM_MACHINE_ID` may identify the machine, see `kvroom.load_machine`.

    Args:
        layout: the rank's KV pool, memory of this process that must stay allocated until `close` returns.
        host: where peers link; beyond loopback a `secret` is required.
        port: where peers link; 0 takes any free port.
        advertise_host: the host that peers dial, if it differs from `host`.
        transport: a name for `kvroom.transports.create`, or an instance, which the manager then owns and closes.
        transport_options: further arguments for `create`.
        trusted_fabric: the operator trusts every process that reaches the ports or the fabric of the transport's
            engine. Without it, an engine that can be reached from more than `host` is refused.
        bootstrap_allow: the directories that receivers may name, besides `register_with`: one text or several, each
            with commas between entries; the form of an entry is that of `--bootstrap-allow`. Without it: loopback
            addresses, `host` and `advertise_host`.
        secret: the shared secret of all managers and directories.
        register_with: for a prefill rank, the `host:port` of its bootstrap directory.
        parallel: how the engine splits the model; the same on all of its ranks.
        place: the coordinates of this rank in that split.
        timeouts: the deadlines of rooms.
        limits: the numbers of rooms and early arrivals.
        link_limits: times and sizes of links.
        checksum: rooms received here ask for a checksum unless `KVReceiver.send_metadata` sets another value.
        on_change: called in the loop thread whenever the state of a handle has changed. It must not block.
        surroundings: for simulations, which replace loop, network and clock.

    Raises:
        ConfigurationError: a setting is invalid.
        BootstrapError: the directory refuses the registration or does not answer.
        TransportError: the transport cannot use the layout's memory, or cannot start.

    After an exception of the constructor nothing is left running.
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
        self._error_logger = Repeats(logger)  # limits the log if a peer finds a way to cause an internal error
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
                around.handler(self.driver),
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
            # Expires before `bootstrap_s`, so that the failure names the unreachable directory or rank and not only the
            # deadline.
            patience_s = self.timeouts.bootstrap_s * 0.9
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
            undo.pop_all()  # from here on `close` undoes it

    # -- for engines ----------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """The `host:port` where peers link, with the advertised host."""
        return self.me.address

    def sender(
        self,
        bootstrap_room: int | None = None,
        *,
        identity: KVIdentity | None = None,
        on_release: OnRelease | None = None,
        trace: RequestTrace | None = None,
    ) -> KVSender:
        """Open the prefill side of a room.

        Args:
            bootstrap_room: the room's number; without it, `KVSender.init` assigns one later.
            identity: the identity of the request; `KVSender.identify` may state it later, before the first `send`.
            on_release: called once as `on_release(pages)`, in the loop thread, when no transfer reads the sent pages
                any longer.
            trace: the id of the request and its `traceparent`, for log records and `RoomView`.

        Raises:
            LocalRoomError: the number, the identity or the trace is invalid, or the manager is closed. There is no room
                then. A number that is in use does not raise here: it fails the room with `RoomInUse`.
        """
        handle = KVSender(self.driver, on_release, on_change=self._on_change, identity=identity, trace=trace)
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
        trace: RequestTrace | None = None,
    ) -> KVReceiver:
        """Open the decode side of a room whose prefill ranks are listed in the directory at `bootstrap_addr`.

        Args:
            bootstrap_addr: the `host:port` of the directory.
            bootstrap_room: the room's number; without it, `KVReceiver.init` assigns one later.
            identity: the identity of the request; `KVReceiver.identify` may state it later, before `send_metadata`.
            on_release: called once as `on_release(pages)`, in the loop thread, when no peer can write into the offered
                pages any longer.
            trace: the id of the request and its `traceparent`, for log records and `RoomView`.

        Raises:
            AddressNotAllowed: the directory is not on the list, see `bootstrap_allow`. A host name whose addresses are
                not on the list fails the room instead, with the same error, because it is looked up later.
            LocalRoomError: the address, the number, the identity or the trace is invalid, or the manager is closed.

        After an exception there is no room.
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
            trace=trace,
        )
        if bootstrap_room is not None:
            handle.init(bootstrap_room)
        return handle

    def audit(self) -> Audit:
        """Recount what is kept now. All numbers are zero when every room was cleared and drained."""
        return self.loop.call(self.driver.table.audit)

    def counters(self) -> Counters:
        """Return the number of events since the start: rooms opened, refused and ended, messages ignored."""
        return self.loop.call(self._counters)

    def metrics(self) -> Metrics:
        """Return all counts and gauges in one frozen copy. Its cost does not depend on the number of open rooms."""
        return self.loop.call(self._metrics)

    def rooms(self, oldest: int | None = None) -> list[RoomView]:
        """Return a view of each room that is kept.

        Rooms are copied 256 at a time, so that a long list does not hold up the loop thread. Each view is therefore of
        its own moment, and a room that is gone by then is left out.

        Args:
            oldest: return at most this number of rooms, those that were opened first. None: all.
        """
        kept = self.loop.call(lambda: list(islice(self.driver.table, oldest)))
        parts = [kept[begin : begin + _VIEWED_AT_ONCE] for begin in range(0, len(kept), _VIEWED_AT_ONCE)]
        return [view for part in parts for view in self.loop.call(partial(self._views, part))]

    def room(self, number: int) -> list[RoomView]:
        """Return the rooms with this number: both sides, and earlier uses that still drain.

        The list is empty if there is none: a room that was cleared and drained is forgotten.
        """
        return self.loop.call(lambda: self._views(self.driver.table.namesakes(number)))

    def peers(self) -> dict[str, str]:
        """Return the linked peers by address, each with the transport that reaches it and why it was chosen."""
        return self.loop.call(lambda: {str(peer): self.driver.peers.how(peer) for peer in self._links.peers})

    def fence(self, where: str) -> list[FencedPeer]:
        """Declare, as the operator, that the processes of all lost peers at an address have ended.

        Declare only processes that were seen to end, or a machine that is off: the pages that wait for their end go to
        other requests, and a process that is still alive would write into those. A linked peer is never fenced. Pages
        come back only when the transport has taken in all bytes that the peer had sent. Blocks for up to 10 s.

        Args:
            where: a host, which means every port of it, or `host:port`.

        Returns:
            The declared peers, each with whether its drain is proven by now.

        Raises:
            ConfigurationError: `where` is not a host or address.
            InvalidRequest: no lost peer is at that address; nothing has changed.
        """
        place: HostPort | str
        try:
            place = read_host(where)
        except ConfigurationError:
            place = parse_address(where)

        def declare() -> list[Declared] | InvalidRequest:
            try:
                return self.driver.peers.fences.declare_gone(place)
            except InvalidRequest as error:  # returned, because the loop's supervisor ends all rooms for what is raised
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
        """Block until no room and no early arrival is left. Return False if some are left after `timeout_s` seconds."""
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

        Pages whose drain is not proven by then are not released: `on_release` is never called for them, and the pool's
        memory must stay allocated until the process ends, because a peer may still write there.
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
        """End every room with the cause `internal`, because an exception in the loop leaves their state unknown."""
        self._error_logger.exception("internal error in the loop thread; every open room fails")
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
        self.loop.end_calls()  # runs what the closed transport has reported and what engines have posted until now
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
        return [view_of(room, self.loop.now()) for room in rooms if not room.gone]
