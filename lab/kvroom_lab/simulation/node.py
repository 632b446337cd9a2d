"""One simulated process: the real manager with its links, driver and handles, in surroundings of virtual time.

`SimulatedLoop` is the real loop over virtual time, without threads; no random number comes from the system. Between
the links and the driver sits `FaultyHandler`, which checks the promises of links, and loses, repeats and delays single
messages. No TCP connection would do that, but the table must be correct even then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from kvroom.bootstrap.directory import RankInfo
from kvroom.core.messages import Message, Peer
from kvroom.core.phases import GIVEN_UP
from kvroom.core.settings import Limits, Timeouts
from kvroom.dialling.allowed import AllowList
from kvroom.errors import KVRoomError
from kvroom.runtime.driver import Driver
from kvroom.runtime.link import LinkLimits
from kvroom.runtime.loop import EventLoop
from kvroom.runtime.surroundings import Surroundings
from kvroom.transports.kit import machine
from kvroom.wire.address import parse_address
from kvroom.wire.frames import AskFate, Inquiry, TellFate

from .fabric import Fabric
from .world import Process, World

T = TypeVar("T")
SECRET = b"known to every process of the simulation"


class Settings:
    """The settings of all managers of a run, and the faults of messages between links and drivers."""

    def __init__(self) -> None:
        self.timeouts = Timeouts(
            bootstrap_s=1.5, waiting_s=2.0, stall_s=1.0, drain_s=0.4, decline_s=1.0, offer_s=0.05, renew_s=0.4
        )
        self.limits = Limits()
        self.link_limits = LinkLimits(heartbeat_s=0.5, connect_s=0.8, handshake_s=0.8, linger_s=0.2)
        self.work_s = 0.002
        """The mean time that a worker thread takes for half of a call."""
        self.drops = self.repeats = self.delays = 0.0
        """The probabilities that a message is lost, is repeated, or is repeated later."""


class FaultyHandler:
    """The driver's `LinkHandler`, with faults between the links and the driver."""

    def __init__(self, process: Process, settings: Settings, driver: Driver) -> None:
        self.process, self.settings, self.driver = process, settings, driver
        self.world = process.world
        self._up: dict[Peer, int] = {}
        self._links = 0

    def on_up(self, peer: Peer, identity: bytes) -> None:
        if peer in self._up:
            self.world.violate(f"{self.process}: on_up of {peer} came twice")
        self._links += 1
        self._up[peer] = self._links
        self.world.say(self.process, "link with {} is up", peer)
        self.driver.on_up(peer, identity)

    def on_lost(self, peer: Peer, detail: str) -> None:
        if self._up.pop(peer, None) is None:
            self.world.violate(f"{self.process}: on_lost of {peer}, which was not up")
        self.world.say(self.process, "link with {} is lost: {}", peer, detail)
        self.driver.on_lost(peer, detail)
        for room in self.driver.table:
            if peer in room.involved() and room.phase not in GIVEN_UP:
                self.world.violate(f"law 7: {self.process} lost {peer}, and room {room.number} goes on")

    def on_message(self, peer: Peer, seq: int, message: Message | Inquiry) -> None:
        world, settings = self.world, self.settings
        if peer not in self._up:
            world.violate(f"{self.process}: a message of {peer}, which is not linked")
        if world.chance(settings.drops):
            world.count("fault: message lost")
            world.say(self.process, "LOSES {} {}", seq, message)
            return
        self._hear("receives", peer, seq, message)
        if world.chance(settings.repeats):
            world.count("fault: message repeated")
            self._hear("receives AGAIN", peer, seq, message)
        if world.chance(settings.delays):
            link = self._up.get(peer)
            delay_s = world.random.uniform(0.01, 1.0)
            self.process.call_later(delay_s, lambda: self._hear_late(peer, seq, message, link))

    def _hear_late(self, peer: Peer, seq: int, message: Message | Inquiry, link: int | None) -> None:
        """Deliver a late copy, unless the link that brought it is gone: a link delivers nothing after its end."""
        if link is not None and self._up.get(peer) == link:
            self.world.count("fault: message comes late")
            self._hear("receives LATE", peer, seq, message)

    def _hear(self, how: str, peer: Peer, seq: int, message: Message | Inquiry) -> None:
        self.world.say(self.process, "{} {} {}", how, seq, message)
        if isinstance(message, AskFate | TellFate):
            self.driver.on_message(peer, seq, message)
            return
        others = [
            (room, room.phase)
            for room in self.driver.table
            if room.number == message.room and room.generation not in (None, message.generation)
        ]
        self.driver.on_message(peer, seq, message)
        for room, phase in others:
            if room.phase is not phase:
                self.world.violate(f"law 3: {self.process} takes {message} for another use of room {room.number}")


class _Workers:
    """The pool of worker threads: a call runs after one delay, and its result is delivered after another."""

    def __init__(self, process: Process, settings: Settings) -> None:
        self._process, self._settings = process, settings

    def submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._process.call_later(self._pause(), self._work, call, future)
        return future

    def _work(self, call: Callable[[], T], future: Future[T]) -> None:
        try:
            result = call()
        except KVRoomError as error:
            self._process.call_later(self._pause(), future.set_exception, error)
        else:
            self._process.call_later(self._pause(), future.set_result, result)

    def _pause(self) -> float:
        return self._settings.work_s * self._process.world.random.uniform(0.1, 2.0)


class SimulatedLoop(EventLoop):
    """A manager's loop in a simulated process. There is one thread, so every caller is in it and none can wait."""

    def __init__(self, process: Process, settings: Settings) -> None:
        super().__init__(process, _Workers(process, settings))
        self._process = process
        self._last: asyncio.Task[None] | None = None

    def is_current(self) -> bool:
        return True

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`, which must not wait.

        A manager starts without waiting here, because no simulated port takes time to open.
        """
        try:
            work.send(None)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        raise AssertionError(f"{work} waits, but virtual time does not pass before it returns")

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Start `work`; `finished` becomes true when it has ended."""
        self._last = self._process.create_task(work, name="closing")

    def close(self) -> None:
        """Do nothing: the world ends the process."""

    @property
    def finishing(self) -> bool:
        """Return whether the manager was asked to close."""
        return self._last is not None

    @property
    def finished(self) -> bool:
        """Return whether the manager has closed."""
        return self._last is not None and self._last.done()


class SimulatedMachine:
    """The machine of a simulated process.

    It looks processes up among the endpoints of the fabric, dead ones included.
    """

    def __init__(self, process: Process, fabric: Fabric) -> None:
        self._process, self._fabric = process, fabric

    def process(self) -> machine.Process:
        pid, where = self._process.pid, machine.digest("simulated", self._process.machine)
        return machine.Process(self._process.boot, 1, pid, pid, 0, machine=where)

    def look_up(self, process: machine.Process) -> machine.Fate:
        """Return the fate of a process, by the rules of `machine.look_up`."""
        me = self.process()
        if not me.sees(process):
            return machine.Fate.GONE if process.outlived_by(me) else machine.Fate.UNKNOWN
        known = (end.process for end in self._fabric.endpoints.values())
        here = [one for one in known if (one.boot, one.pid) == (process.boot, process.pid)]
        return machine.Fate.RUNNING if any(one.alive for one in here) else machine.Fate.GONE


class _SeededTokens:
    """Generations that depend on the seed alone."""

    def __init__(self, world: World) -> None:
        self._world = world

    def next(self) -> bytes:
        generation = self._world.random.getrandbits(64)
        self._world.names.add(generation)
        return generation.to_bytes(8, "big")


def surroundings(process: Process, fabric: Fabric, settings: Settings, loop: SimulatedLoop) -> Surroundings:
    """Return the surroundings of the manager of this process."""

    async def listed(bootstrap_addr: str, /, *, secret: bytes, allowed: AllowList | None) -> list[RankInfo]:  # noqa: ARG001 - every directory answers the same way
        """List the prefill rank at the directory's address, with the incarnation that registered there last."""
        where = parse_address(bootstrap_addr)
        incarnation = process.network.registered.get((where.host, where.port), 0)
        return [RankInfo(rank_ip=where.host, rank_port=where.port, page_size=1, incarnation=incarnation)]

    return Surroundings(
        loop=lambda: loop,
        machine=lambda: SimulatedMachine(process, fabric),
        incarnation=process.world.random.getrandbits(64),
        generations=lambda: _SeededTokens(process.world),
        listening=process.listen,
        listed=listed,
        handler=lambda driver: FaultyHandler(process, settings, driver),
    )
