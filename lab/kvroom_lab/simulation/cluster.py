"""The prefill and decode workers of a run. Each has a place in the cluster, and one process after another in it."""

from __future__ import annotations

from collections import Counter

from kvroom.errors import LocalRoomError
from kvroom.runtime.manager import KVManager

from .fabric import Fabric, SimulatedTransport
from .jobs import DecodeJob, Engine, PrefillJob, Request
from .network import Network
from .node import SECRET, Settings, SimulatedLoop, surroundings
from .pages import Pages
from .world import Process, World


class Node:
    """One process, with its manager and its engine."""

    def __init__(
        self, cluster: Cluster, name: str, address: tuple[str, int], page_tokens: int, where: tuple[str, str]
    ) -> None:
        # Abstract only for typeshed: methods that nothing here calls raise NotImplementedError, as in asyncio.
        self.process = Process(cluster.world, cluster.network, name, address)  # type: ignore[abstract]
        self.process.machine, self.process.boot = where
        self.process.pid = len(cluster.nodes) + 1
        self.pages = Pages(cluster.pages, page_tokens)
        settings = cluster.settings
        self.loop = SimulatedLoop(self.process, settings)
        self.manager = KVManager(
            self.pages.pool.layout,
            host=address[0],
            port=address[1],
            transport=SimulatedTransport(cluster.fabric, self.process, self.pages),
            bootstrap_allow="any",
            secret=SECRET,
            timeouts=settings.timeouts,
            limits=settings.limits,
            link_limits=settings.link_limits,
            on_change=lambda: self.engine.changed(),
            surroundings=surroundings(self.process, cluster.fabric, settings, self.loop),
        )
        cluster.network.registered[address] = self.manager.me.incarnation
        self.engine = Engine(self.process, self.manager, self.pages, settings)


class Place:
    """The place of one worker: its address stays when its process is replaced."""

    def __init__(self, cluster: Cluster, kind: str, index: int) -> None:
        self.cluster, self.name = cluster, f"{kind}{index}"
        self.address = (f"10.0.{'pd'.index(kind[0])}.{index + 1}", 7000)
        self.page_tokens = cluster.world.random.choice((2, 4))
        self.runs = 0
        self.machines = 0  # machines of its own that it has had; the first one is shared with the workers of its kind
        self.node = self.start()

    def start(self) -> Node:
        """Start a process at this address, with a new incarnation."""
        self.runs += 1
        machine = f"{self.name} on {self.machines}" if self.machines else self.name.rstrip("0123456789")
        where = machine, f"{machine}, boot {self.cluster.boots[machine]}"
        self.node = Node(self.cluster, f"{self.name}.{self.runs}", self.address, self.page_tokens, where)
        self.cluster.nodes.append(self.node)
        self.cluster.world.say(self.node.process, "starts")
        return self.node


class Cluster:
    """All places, and the network and fabric between them."""

    def __init__(self, world: World, settings: Settings) -> None:
        self.world, self.settings = world, settings
        self.network = Network(world)
        self.fabric = Fabric(world, self.network)
        self.pages = 12
        """The number of pages of each pool."""
        self.nodes: list[Node] = []
        self.boots: Counter[str] = Counter()  # by machine: how many boots have ended
        self.prefills: list[Place] = []
        self.decodes: list[Place] = []

    def build(self, prefills: int, decodes: int) -> None:
        self.prefills = [Place(self, "prefill", i) for i in range(prefills)]
        self.decodes = [Place(self, "decode", i) for i in range(decodes)]

    @property
    def places(self) -> list[Place]:
        return self.prefills + self.decodes

    @property
    def alive(self) -> list[Node]:
        return [node for node in self.nodes if node.process.alive]

    def incarnations(self) -> dict[int, Node]:
        """Return the living processes by their incarnation."""
        return {node.manager.me.incarnation: node for node in self.alive}

    # -- requests -------------------------------------------------------------------------------------------------

    def schedule(self, request: Request) -> None:
        """Schedule the request at both engines. An engine whose process is dead at that time never receives it."""
        self.world.names.add(request.number)
        if request.source_at is not None:
            place, opens = self.prefills[request.prefill], request.source_at[0]
            self.world.at(opens, lambda: place.node.process.call_soon(self._prefill, place.node, request))
        if request.sink_at is not None:
            place2 = self.decodes[request.decode]
            self.world.at(request.sink_at[0], lambda: place2.node.process.call_soon(self._decode, place2.node, request))

    def _prefill(self, node: Node, request: Request) -> None:
        assert request.source_at is not None
        try:
            job = PrefillJob(node.engine, request)
        except LocalRoomError:
            return  # the manager was closed
        clock = node.process.time() - self.world.now
        for index, at in enumerate(request.source_at[1:]):
            node.process.call_at(clock + at, job.send, index)
        if request.source_ends is not None:
            how, at = request.source_ends
            node.process.call_at(clock + at, job.end, how)

    def _decode(self, node: Node, request: Request) -> None:
        assert request.sink_at is not None
        address = "{}:{}".format(*self.prefills[request.prefill].address)
        try:
            job = DecodeJob(node.engine, request, address)
        except LocalRoomError:
            return
        clock = node.process.time() - self.world.now
        node.process.call_at(clock + request.sink_at[1], job.offer)
        if request.sink_ends is not None:
            how, at = request.sink_ends
            node.process.call_at(clock + at, job.end, how)

    # -- faults of a worker ---------------------------------------------------------------------------------------

    def kill(self, node: Node, *, host: bool) -> None:
        self.world.say(node.process, "DIES{}", ", and its machine with it" if host else "")
        if node.process.alive:
            self.network.vanish(node.process, host=host)
        if host:
            self._boot_again(node)

    def _boot_again(self, node: Node) -> None:
        """Give the machine a new boot, because it has died.

        If other processes still live on it, the dead process counts as having run on a machine of its own, and its
        place gets a new one.
        """
        machine = node.process.machine
        shared = any(other.process.alive and other.process.machine == machine for other in self.nodes)
        self.boots[machine] += not shared
        for place in self.places:
            place.machines += shared and place.node is node

    def restart(self, place: Place) -> None:
        """Start a new process at this place. The old one is dead or cut off the network."""
        place.node.process.host_up = True
        place.start()

    def replace(self, place: Place) -> Node:
        """Cut the old process off the network without its notice, and start another at its address.

        Return the old one.
        """
        old = place.node
        self.world.say(old.process, "IS CUT OFF and replaced")
        old.process.cut = True
        self.network.listeners.pop(old.process.address, None)
        place.machines += 1
        place.start()
        return old
