"""From a seed to a run: the size of the cluster, its requests, and its faults with their times."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from kvroom.core.settings import Limits
from kvroom.runtime.link import LinkLimits

from .cluster import Cluster, Place
from .jobs import Request

BUSY_S = 6.0
"""The time in which requests begin and faults happen; after it, everything is healed."""
SMALL_QUEUE_BYTES = 800
FIRST_NUMBER = 1 << 40
"""Room numbers begin here, so that no other number in a process equals one."""


class Planner:
    """Draws one run."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.world = cluster, cluster.world
        self.random = self.world.random
        self.requests: list[Request] = []
        self.calm = self.world.chance(0.08)
        """True if nothing goes wrong: every request that no engine ends on purpose must succeed."""

    def draw(self) -> None:
        """Build the cluster, then schedule all requests and faults."""
        self._draw_cluster()
        for _ in range(self.random.randint(3, 9)):
            self._draw_request()
        if not self.calm:
            self._draw_constant_faults()
            for _ in range(self.random.choice((0, 1, 1, 2, 2, 3, 5))):
                self._draw_fault()
            if self.cluster.settings.link_limits.queue_bytes == SMALL_QUEUE_BYTES:
                self._flood()
            elif self.world.chance(0.08):
                self._supersede()
        for request in self.requests:
            self.cluster.schedule(request)

    # -- the cluster ----------------------------------------------------------------------------------------------

    def _draw_cluster(self) -> None:
        cluster, random = self.cluster, self.random
        cluster.pages = 64 if self.calm else random.choice((6, 10, 16, 24))
        cluster.network.latency_s = self._between(0.0003, 0.02)
        cluster.fabric.enforcing = random.random() < 0.5
        cluster.fabric.by_cpu = random.random() < 0.5
        cluster.fabric.step_s = self._between(0.001, 0.03)
        if not self.calm and random.random() < 0.6:  # most faults need a transfer in flight to have an effect
            cluster.fabric.step_s = self._between(0.05, 0.3)
        cluster.settings.work_s = random.choice((0.001, 0.01, 0.05) if self.calm else (0.001, 0.01, 0.1, 0.6))
        if not self.calm:
            self._draw_limits()
        cluster.build(random.choice((1, 1, 1, 2, 2, 3)), random.choice((1, 1, 2, 2, 3)))

    def _draw_limits(self) -> None:
        settings, random = self.cluster.settings, self.random
        if random.random() < 0.15:
            settings.limits = Limits(early_arrivals=random.randint(1, 2))
        elif random.random() < 0.1:
            settings.limits = Limits(rooms=random.randint(2, 4))
        if random.random() < 0.25:
            self.cluster.network.window_bytes = 256
            settings.link_limits = LinkLimits(
                heartbeat_s=1.5, connect_s=0.8, handshake_s=0.8, linger_s=0.2, queue_bytes=SMALL_QUEUE_BYTES
            )

    # -- requests -------------------------------------------------------------------------------------------------

    def _draw_request(self) -> None:
        request = self._one(self.random.uniform(0.05, BUSY_S - 2.0), FIRST_NUMBER + self.random.randrange(60))
        kind = self.random.random()
        if kind < 0.65:
            self._add(request)
        elif kind < 0.72:
            self._add(request._replace(source_at=None))
        elif kind < 0.79:
            self._add(request._replace(sink_at=None))
        elif kind < 0.83:  # the two sides disagree about the length
            self._add(request._replace(source_at=None))
            longer = request.tokens + 2
            self._add(request._replace(sink_at=None, tokens=longer, chunks=(*request.chunks[:-1], longer)))
        else:  # the router sends it twice, or its number is used again when the first use may have ended
            self._add(request)
            again = self._one(self._start(request) + self.random.choice((0.0, 0.3, 1.5)), request.number)
            self._add(again._replace(prefill=request.prefill))

    def _one(self, start: float, number: int) -> Request:
        random = self.random
        tokens = random.choice((1, 3, 4, 7, 8, 12))
        borders = sorted(random.sample(range(1, tokens), min(tokens - 1, random.choice((0, 0, 1, 2)))))
        opens = start + random.uniform(0.0, 0.6)
        chunk_at = [opens + random.uniform(0.0, 0.3)]
        for _ in borders:
            chunk_at.append(chunk_at[-1] + random.uniform(0.0, 0.4))
        meets = start + random.uniform(0.0, 0.6)
        return Request(
            label=len(self.requests) + 1 + 100 * self.world.seed,
            number=number,
            prefill=random.randrange(len(self.cluster.prefills)),
            decode=random.randrange(len(self.cluster.decodes)),
            tokens=tokens,
            prefix=random.choice((0, 0, random.randrange(tokens + 1))),
            chunks=(*borders, tokens),
            checksum=random.random() < 0.3,
            source_at=(opens, *chunk_at),
            sink_at=(meets, meets + self._decode_is_busy_s()),
            source_ends=self._ending(start),
            sink_ends=self._ending(start),
            decodes_s=random.choice((0.0, random.uniform(0.0, 1.0))),
        )

    def _decode_is_busy_s(self) -> float:
        """Return how long the decode engine has no pages.

        Mostly not at all or briefly. At times longer than a prefill side would wait without renewals (`bootstrap_s`),
        and now and then longer than the decode side's own room lives.
        """
        random, times = self.random, self.cluster.settings.timeouts
        kind = random.random()
        if kind < 0.9:
            return random.choice((0.0, random.uniform(0.0, 0.4)))
        return random.uniform(times.bootstrap_s + 0.2, times.waiting_s - 0.05 if self.calm else times.waiting_s + 0.5)

    def _ending(self, start: float) -> tuple[str, float] | None:
        if self.random.random() < 0.8:
            return None
        return self.random.choice(("abort", "clear")), start + self.random.uniform(0.0, 1.5)

    def _add(self, request: Request) -> None:
        label = len(self.requests) + 1 + 100 * self.world.seed
        self.requests.append(request._replace(label=label))

    def _start(self, request: Request) -> float:
        assert request.source_at is not None  # requests are drawn with it
        return request.source_at[0]

    # -- faults ---------------------------------------------------------------------------------------------------

    def _draw_constant_faults(self) -> None:
        """Draw the faults that last for the whole run."""
        settings, fabric = self.cluster.settings, self.cluster.fabric
        settings.drops = self._sometimes(0.2)
        settings.repeats = self._sometimes(0.3)
        settings.delays = self._sometimes(0.3)
        fabric.failing = self._sometimes(0.2)
        fabric.refusing = self._sometimes(0.1)
        fabric.spoiling = self._sometimes(0.2)

    def _sometimes(self, probability: float) -> float:
        return self.random.uniform(0.05, 0.3) if self.random.random() < probability else 0.0

    def _draw_fault(self) -> None:
        """Draw one fault, mostly at a time when a request is running."""
        error = self.random.choice(
            (self._partition, self._partition, self._stop, self._stop, self._kill, self._kill, self._replace,
             self._break_link, self._break_link, self._shut_down, self._slow_network)
        )  # fmt: skip
        at = self.random.uniform(0.2, BUSY_S - 1.0)
        if self.requests and self.random.random() < 0.8:
            at = self._start_of(self.random.choice(self.requests)) + self.random.uniform(0.0, 1.5)
        error(min(at, BUSY_S - 0.5))

    def _start_of(self, request: Request) -> float:
        times = [at[0] for at in (request.source_at, request.sink_at) if at is not None]
        return min(times)

    def _at(self, when: float, what: str, call: Callable[[], None]) -> None:
        def happen() -> None:
            self.world.count(f"fault: {what}")
            call()

        self.world.at(min(when, BUSY_S), happen)

    def _pair(self) -> tuple[Place, Place]:
        return self.random.choice(self.cluster.prefills), self.random.choice(self.cluster.decodes)

    def _partition(self, at: float) -> None:
        a, b = self._pair()
        ways = self.random.choice(([(a, b)], [(b, a)], [(a, b), (b, a)], [(a, b), (b, a)]))
        network, lasts_s = self.cluster.network, self._between(0.05, 3.0)

        def begin() -> None:
            names = [(x.node.process.name, y.node.process.name) for x, y in ways]
            for way in names:
                self.world.say("network", "BLOCKS {} to {}", *way)
                network.block(*way)
            self.world.at(self.world.now + lasts_s, lambda: network.heal(*names))

        self._at(at, "partition", begin)

    def _stop(self, at: float) -> None:
        self._stop_one(self.random.choice(self.cluster.places), at, self._between(0.02, 2.5))

    def _stop_one(self, place: Place, at: float, lasts_s: float) -> None:
        def begin() -> None:
            process = place.node.process
            if process.stopped or not process.alive:
                return
            self.world.say(process, "STOPS")
            process.stop()
            self.world.at(min(self.world.now + lasts_s, BUSY_S), process.go_on)

        self._at(at, "process stops (slow consumer)", begin)

    def _flood(self) -> None:
        """Stop a prefill worker, and let its decode worker send more than the queue of its link takes."""
        prefill = self.random.randrange(len(self.cluster.prefills))
        decode = self.random.randrange(len(self.cluster.decodes))
        start = self.random.uniform(1.0, 3.0)
        self._stop_one(self.cluster.prefills[prefill], start + 1.0, 1.5)
        for i in range(21):  # the first one brings the link up
            number = FIRST_NUMBER + 1000 + i
            request = self._one(start, number)
            at = start + 1.05 + self.random.uniform(0.0, 0.1) if i else start
            self._add(request._replace(source_at=None, sink_at=(at, at), prefill=prefill, decode=decode))

    def _kill(self, at: float) -> None:
        place = self.random.choice(self.cluster.places)
        host = self.random.random() < 0.3
        back_s = self.random.choice((None, self._between(0.02, 1.0), self._between(0.02, 1.0)))

        def begin() -> None:
            if not place.node.process.alive:
                return
            self.cluster.kill(place.node, host=host)
            if back_s is not None:
                self._at(self.world.now + back_s, "restart", lambda: self._restart(place))

        self._at(at, "host dies" if host else "process crashes", begin)

    def _restart(self, place: Place) -> None:
        if not place.node.process.alive:
            self.cluster.restart(place)

    def _replace(self, at: float) -> None:
        self._replace_one(self.random.choice(self.cluster.places), at, self._between(0.1, 3.0))

    def _replace_one(self, place: Place, at: float, lives_s: float) -> None:
        def begin() -> None:
            if place.node.process.alive:
                old = self.cluster.replace(place)
                self.world.at(min(self.world.now + lives_s, BUSY_S), lambda: self.cluster.kill(old, host=False))

        self._at(at, "process replaced while it lives", begin)

    def _break_link(self, at: float) -> None:
        a, b = self._pair()
        self._at(at, "connection reset", lambda: self._reset(a, b))

    def _reset(self, a: Place, b: Place) -> None:
        for socket in self.cluster.network.sockets_of(a.node.process):
            if socket.open and socket.peer.process is b.node.process:
                self.world.say("network", "RESETS {} and {}", a.node.process, b.node.process)
                socket.reset_both()

    def _supersede(self) -> None:
        """Replace a prefill worker while a decode worker has rooms on a link that the prefill worker dialled.

        Such a link follows a broken one, because a prefill side dials where its transfers outlive the link. The decode
        worker finds out only by dialling the address itself, which reaches the new process, that its link leads to the
        old one.
        """
        prefill = self.random.randrange(len(self.cluster.prefills))
        decode = self.random.randrange(len(self.cluster.decodes))
        a, b = self.cluster.prefills[prefill], self.cluster.decodes[decode]
        start = self.random.uniform(0.5, 2.0)
        for i, after_s in enumerate((0.0, 1.0, 1.5, 2.05, 2.15, 2.3, 2.45)):  # the first one brings a link up
            request = self._one(start, FIRST_NUMBER + 2000 + i)
            at = start + after_s
            ends = ("abort", at + 0.4) if not i else None
            self._add(
                request._replace(source_at=None, sink_at=(at, at), sink_ends=ends, prefill=prefill, decode=decode)
            )

        def turn_round() -> None:
            self._reset(a, b)
            for node in (a.node, b.node):
                if not node.process.alive:
                    return
            a.node.process.call_soon(a.node.manager.driver.peers.redial, b.node.manager.me)

        self._at(start + 0.6, "connection reset", turn_round)
        self._replace_one(a, start + 1.8, 3.0)

    def _shut_down(self, at: float) -> None:
        place, back_s = self.random.choice(self.cluster.places), self._between(0.05, 1.0)

        def begin() -> None:
            node = place.node
            if not node.process.alive or node.process.stopped:
                return
            self.world.say(node.process, "SHUTS DOWN")
            node.process.call_soon(node.manager.close)
            self.world.at(self.world.now + 0.5, lambda: self._gone(place, back_s))

        self._at(at, "manager is closed", begin)

    def _gone(self, place: Place, back_s: float) -> None:
        if place.node.process.alive:
            self.cluster.kill(place.node, host=False)
            self.world.at(min(self.world.now + back_s, BUSY_S), lambda: self._restart(place))

    def _slow_network(self, at: float) -> None:
        network, lasts_s = self.cluster.network, self._between(0.05, 1.0)
        usual_s = network.latency_s

        def begin() -> None:
            network.latency_s = max(usual_s, 0.1)
            self.world.at(self.world.now + lasts_s, end)

        def end() -> None:
            network.latency_s = usual_s

        self._at(at, "network slows down", begin)

    def _between(self, low: float, high: float) -> float:
        """Draw a number whose logarithm is uniform, so that each order of magnitude is equally likely."""
        return math.exp(self.random.uniform(math.log(low), math.log(high)))


class Plan(msgspec.Struct, frozen=True):
    """The facts about a run that its checks need."""

    calm: bool
    requests: tuple[Request, ...]


def draw(cluster: Cluster) -> Plan:
    """Build the cluster and schedule everything as the seed of its world determines."""
    planner = Planner(cluster)
    planner.draw()
    cluster.fabric.sees_deaths = cluster.world.random.random() < 0.5
    return Plan(planner.calm, tuple(planner.requests))
