"""One run: all planned events of a seed, then healing and clearing, after which nothing may be left."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import types
from collections import Counter
from collections.abc import Iterator

import msgspec
import numpy as np

from kvroom.core.phases import TERMINAL
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.runtime.handles import KVReceiver, KVSender
from kvroom.runtime.manager import KVManager

from .cluster import Cluster, Node
from .fabric import Fabric, SimulatedTransport
from .jobs import Engine, Request
from .network import Listener, Network, Socket
from .node import Settings
from .scenario import BUSY_S, Plan, draw
from .world import LawBroken, Process, World

RELEASE_S = 7.0
"""The largest time, after everything was healed and cleared, until nothing is left."""
CLOSING_S = 2.0
PUNCTUAL_S = 0.05
MESSAGE_BYTES = 700
"""An upper limit on the size of a message of these requests."""
_ROOMS = {Source, Sink, KVSender, KVReceiver}
_NOT_OURS = {
    Process, World, Engine, Fabric, Network, Listener, Socket, types.ModuleType, logging.Logger,
    str, bytes, bytearray, float, bool, type(None), np.ndarray,
}  # fmt: skip
"""Types at which the walk over a manager's objects ends: the rest of the simulation, and types without referents."""


class Outcome(msgspec.Struct, frozen=True):
    """The result of one seed."""

    seed: int
    broken: str | None
    events: int
    tally: Counter[str]
    trace: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Return a digest of the trace: equal digests mean equal traces."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()


def run(seed: int, *, tracing: bool = False) -> Outcome:
    """Run one seed. A broken law is reported in the outcome and raises nothing."""
    world = World(seed, tracing=tracing)
    cluster = Cluster(world, Settings())
    broken = None
    with _listening(world):
        try:
            _play(world, cluster)
        except LawBroken as law:
            broken = str(law)
    for node in cluster.nodes:
        node.process.kill()  # closes the tasks that are left
    return Outcome(seed, broken, world.events, world.tally, tuple(world.trace))


def _play(world: World, cluster: Cluster) -> None:
    plan = draw(cluster)
    for quarter in range(1, int(BUSY_S * 4) + 1):
        world.run(quarter / 4)
        for node in cluster.alive:
            _check_books(node, cluster)
            _check_published(node)
    _heal(world, cluster)
    world.run(world.now + (3.0 if plan.calm else world.random.choice((0.0, 0.5, 5.0))))
    if plan.calm:
        _check_calm(plan, world)
    for node in cluster.alive:
        node.process.call_soon(node.engine.wind_up)
    world.say("everybody", "clears")
    world.run(world.now + RELEASE_S)
    for node in cluster.alive:
        _check_clean(node, cluster)
    for node in cluster.alive:
        node.process.call_soon(node.manager.close)
    world.run(world.now + CLOSING_S)
    for node in cluster.alive:
        _check_closed(node, cluster)


def _heal(world: World, cluster: Cluster) -> None:
    """Remove all faults. Dead processes stay dead."""
    world.say("everybody", "is healed")
    settings, fabric = cluster.settings, cluster.fabric
    settings.drops = settings.repeats = settings.delays = 0.0
    settings.work_s = min(settings.work_s, 0.05)
    fabric.failing = fabric.refusing = fabric.spoiling = 0.0
    fabric.sees_deaths = True
    fabric.step_s = min(fabric.step_s, 0.02)
    for node in cluster.alive:
        node.process.go_on()
    cluster.network.heal()


# -- checks of the laws -----------------------------------------------------------------------------------------------


def _check_books(node: Node, cluster: Cluster) -> None:
    """Check, at any time, that the table's indexes and counters agree with its rooms."""
    who, table = node.process, node.manager.driver.table
    audit = table.audit()
    _require(not audit.inconsistent, f"law 1: the table of {who} disagrees with its rooms: {audit}")
    for room in table:
        waits = room.timer is not None or room.phase in TERMINAL
        _require(waits, f"law 7: room {room.number} of {who} waits in {room.phase.name} without a deadline")
    due = table.deadline()
    in_time = due is None or who.stopped or node.loop.finishing or who.time() - due < PUNCTUAL_S
    _require(in_time, f"law 7: {who} does not act on a deadline")
    for socket in cluster.network.sockets_of(who):
        waiting, most = socket.get_write_buffer_size(), cluster.settings.link_limits.queue_bytes + MESSAGE_BYTES
        _require(waiting <= most or not socket.open, f"law 9: {waiting} bytes wait in {who} for a slow reader")


def _check_published(node: Node) -> None:
    """Check, at any time, that a handle has published the state of its room: engines never read the room itself."""
    for job in node.engine.jobs:
        said: object
        known: object
        if isinstance(job.handle, KVSender):
            source = job.handle._source  # noqa: SLF001 - what is published is compared with it, and so below
            said, known = (
                (job.handle.decode_prefix_len, job.handle.answered),
                (source.decode_prefix_len, source.answered),
            )
        else:
            assert isinstance(job.handle, KVReceiver)
            said, known = job.handle.aux, job.handle._sink.aux  # noqa: SLF001
        _require(said == known, f"law 5: the handle of {job.name} has published {said!r}, and its room has {known!r}")


def _check_calm(plan: Plan, world: World) -> None:
    """Check that without faults every request which no engine ended has succeeded, on both sides."""
    numbers = Counter(request.number for request in plan.requests)
    expected = sum(request.undisturbed and numbers[request.number] == 1 for request in plan.requests)
    for side in ("source", "sink"):
        have = world.tally[f"success: {side}"]
        _require(have >= expected, f"law 7: {have} rooms succeeded on the {side} side, expected at least {expected}")
    for request in plan.requests:
        if numbers[request.number] == 1 and (request.source_ends is None) != (request.sink_ends is None):
            _check_same_end(request, world)


def _check_same_end(request: Request, world: World) -> None:
    """Check that both sides end within 0.5 s and with the same sentence if one side aborts after they have met."""
    ends = [world.ends[request.label, side] for side in ("source", "sink") if (request.label, side) in world.ends]
    if len(ends) < 2 or any(f"phase {phase}" in ends[0][0] for phase in ("EXPECTED", "OPENED")):
        return
    (one, at), (other, later) = ends
    _require(one == other, f"law 11: the sides of room {request.number} disagree: {one!r}, {other!r}")
    _require(abs(at - later) < 0.5, f"law 7: room {request.number} ended {later - at:.1f} s later on the other side")
    world.count("an abort reached the other side")


def _check_clean(node: Node, cluster: Cluster) -> None:
    """Check, after the end of all rooms, that no room, page, timer or other thing that belongs to a room is left."""
    who, driver = node.process, node.manager.driver
    audit = driver.table.audit()
    _require(audit.empty, f"law 2: {who} keeps {audit}")
    _require(not node.engine.jobs, f"law 6: {who} waits for the pages of {[job.name for job in node.engine.jobs]}")
    _require(node.pages.whole, f"law 6: the pool of {who} is not whole: {sorted(node.pages.owner)} are missing")
    transport = driver.peers.transport
    assert isinstance(transport, SimulatedTransport)
    _require(not transport.grants, f"law 1: the transport of {who} keeps the grants {list(transport.grants)}")
    _require(not transport.flights, f"law 1: the transport of {who} has transfers in flight")
    idle = set(transport.peers.all()) - driver_handles(node)
    _require(not idle, f"law 1: the transport of {who} keeps the handles {idle} of peers that are lost")
    alive = cluster.incarnations()
    linked = node.manager._links.peers  # noqa: SLF001 - the peers that it considers linked, with their incarnations
    strangers = [peer for peer in linked if peer.incarnation not in alive]
    _require(not strangers, f"law 7: {who} keeps links with {strangers}, which are dead")
    left = list(remains(node.manager, cluster.world.names))
    _require(not left, f"law 1: {who} still keeps {left[:3]}")


def driver_handles(node: Node) -> set[int | None]:
    """Return the transport's handles of peers that are linked, or lost and not yet proven dead."""
    driver = node.manager.driver
    linked = {remote.handle for remote in driver.peers.remotes.values()}
    return linked | {lost.handle for lost in driver.peers.fences.lost.values()}


def _check_closed(node: Node, cluster: Cluster) -> None:
    """Check that a closed manager has no connection and no task."""
    _require(node.loop.finished, f"law 2: {node.process} does not end")
    open_ends = [socket for socket in cluster.network.sockets_of(node.process) if socket.open]
    _require(not open_ends, f"law 2: {node.process} is closed and has {len(open_ends)} open connections")


def _require(holds: bool, law: str) -> None:
    if not holds:
        raise LawBroken(law)


def remains(manager: KVManager, names: set[int]) -> Iterator[str]:
    """Walk everything that a manager refers to; yield each room, handle and room number or generation that is found."""
    seen: set[int] = set()
    todo: list[object] = list(vars(manager).values())
    while todo:
        thing = todo.pop()
        kind = type(thing)
        if kind in _NOT_OURS or id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        if kind in _ROOMS:
            yield repr(thing)
        elif kind is int:
            if thing in names:
                yield f"the number {thing}"
        elif kind is types.FunctionType:
            todo += thing.__closure__ or ()  # type: ignore[attr-defined]  # its globals are not the manager's
        else:
            todo += gc.get_referents(thing)


# -- logging ----------------------------------------------------------------------------------------------------------


class _Listener(logging.Handler):
    """Adds log lines to the trace. A logged error is a violation by the code under test."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.DEBUG if world.tracing else logging.ERROR)
        self.world = world

    def emit(self, record: logging.LogRecord) -> None:
        error = f": {record.exc_info[1]!r}" if record.exc_info else ""
        self.world.say("log", "{}", record.getMessage() + error)
        if record.levelno >= logging.ERROR:
            self.world.violate(f"logged as an error: {record.getMessage()}{error}")


@contextlib.contextmanager
def _listening(world: World) -> Iterator[None]:
    logger, listener = logging.getLogger("kvroom"), _Listener(world)
    level, passed_on = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(listener.level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = passed_on
