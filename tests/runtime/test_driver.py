"""The driver over a loop that a test moves by hand: a blocking call ends when the test ends it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import msgspec
import pytest

from identities import PROMPT
from kvroom.core import inputs as asked
from kvroom.core.messages import Message, Offer, Peer
from kvroom.core.phases import Phase
from kvroom.core.room import Room
from kvroom.core.settings import Timeouts
from kvroom.core.source import Source
from kvroom.core.table import RoomTable
from kvroom.errors import InvalidRequest, LinkError
from kvroom.plan import Blocks, MemoryRange
from kvroom.runtime.driver import Driver
from kvroom.runtime.fences import question_of
from kvroom.runtime.peers import Peers
from kvroom.runtime.remote import PeerProfile
from kvroom.transports import Transfer, Transport
from kvroom.transports.kit import claims
from kvroom.transports.kit.machine import Fate, Process
from kvroom.transports.kit.transfers import finished
from kvroom.wire.address import parse_address
from kvroom.wire.frames import AskFate, Inquiry, TellFate
from kvroom.wire.keys import SigningKey
from kvroom_lab.pools import TestPool

T = TypeVar("T")

PEER = Peer("10.0.0.2:7000", 2)


class Noted(Transport):
    """A transport that numbers its handles, returns `proof` from a fence, and completes every transfer immediately."""

    name: ClassVar[str] = "noted"

    def __init__(self) -> None:
        self.key = SigningKey()
        self.handles = 0
        self.fenced: list[int] = []
        self.buried: list[int] = []
        self.submitted: list[int] = []
        self.proof = True

    def register(self, memory: Sequence[MemoryRange]) -> None: ...

    def describe(self) -> bytes:
        return msgspec.msgpack.encode({"endpoint": self.key.public})

    def connect(self, description: bytes) -> int:
        self.handles += 1
        return self.handles

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        return self._move(peer, blocks, grant)  # without a check: there is no memory in which the blocks could lie

    def _move(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        self.submitted.append(peer)
        return finished(blocks.nbytes)

    def fence(self, peer: int) -> bool:
        self.fenced.append(peer)
        return self.proof

    def fence_dead(self, peer: int) -> bool:
        self.buried.append(peer)
        return True

    def close(self) -> None: ...


class Still:
    """A loop in which no blocking call ends before `finish`; also the machine, and the links, which send nothing."""

    def __init__(self) -> None:
        self.working: list[tuple[Callable[[], Any], Future[Any]]] = []
        self.said: list[tuple[Peer, Message | Inquiry]] = []
        self.machine = "0" * 32
        self.busy = False  # True: the link refuses messages that will be repeated

    def now(self) -> float:
        return 0.0

    def post(self, call: Callable[[], None]) -> bool:
        call()
        return True

    def run_blocking(self, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self.working.append((call, future))
        return future

    def finish(self) -> None:
        """Complete the oldest blocking call."""
        call, future = self.working.pop(0)
        future.set_result(call())

    def process(self) -> Process:
        return Process.current(self.machine)

    def look_up(self, process: Process) -> Fate:
        return Fate.UNKNOWN

    def call(self, call: Callable[[], T]) -> T:
        return call()

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Callable[[], None]:
        return lambda: None  # the time never comes

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        work.close()

    async def dial(self, address: str) -> Peer:
        raise LinkError(f"{address} is not there")

    def host_of(self, peer: Peer) -> str:
        return "10.0.0.2"

    def send(self, peer: Peer, message: Message | Inquiry, *, again: bool = False) -> bool:
        if not self.busy:
            self.said.append((peer, message))
        return not self.busy

    def drop(self, peer: Peer, detail: str) -> None: ...


class Owner:
    def __init__(self) -> None:
        self.released: list[tuple[int, ...]] = []

    def update(self, room: Room) -> None: ...

    def release(self, pages: tuple[int, ...]) -> None:
        self.released.append(pages)


class Setting:
    """A driver with its transport and its loop."""

    def __init__(self, pool: TestPool) -> None:
        self.transport, self.around = Noted(), Still()
        table = RoomTable()
        peers = Peers(self.around, table, pool.layout, transport=self.transport, machine=self.around)
        peers.links = self.around
        self.driver = Driver(self.around, table, pool.layout, peers)

    def link(self) -> None:
        self.driver.on_up(PEER, self.driver.peers.describe(PEER.incarnation))

    def lose(self) -> None:
        self.driver.on_lost(PEER, "the connection broke")


@pytest.fixture
def setting() -> Iterator[Setting]:
    pool = TestPool()
    yield Setting(pool)
    pool.close()


def test_a_transfer_that_waits_for_the_transport_ends_once_when_the_link_is_lost(setting: Setting) -> None:
    driver, owner = setting.driver, Owner()
    setting.link()
    room = Source(Timeouts(), owner, PROMPT)
    driver.open(room, 7, None)
    driver.on_message(PEER, 1, Offer(room=7, generation=1, start=0, stop=4, pages=(0,), identity=PROMPT))
    driver.feed(room, asked.SendPages(pages=(0,), stop=4, last=True))
    assert room.in_flight
    setting.lose()
    assert room.phase is Phase.RELEASED
    assert owner.released == [(0,)]
    setting.link()
    setting.around.finish()  # the transport of the first link
    setting.around.finish()  # that of the second
    assert setting.transport.submitted == []
    assert owner.released == [(0,)]


def test_the_proof_for_one_handle_is_none_for_the_next(setting: Setting) -> None:
    """Lost, linked again, and lost again before the transport is connected: the handle that arrives is fenced, too."""
    around = setting.around
    setting.link()
    around.finish()  # connected: handle 1
    setting.lose()
    setting.link()
    around.finish()  # handle 1 is fenced; linked again, so the transport connects
    setting.lose()
    around.finish()  # connected all the same: handle 2
    around.finish()  # handle 1 is fenced at the second request
    around.finish()
    assert setting.transport.fenced == [1, 1, 2]
    assert around.working == []


def test_what_could_not_be_proven_is_asked_again_when_somebody_links(setting: Setting) -> None:
    """No room waits for the proof, but the transport keeps a handle until there is one."""
    setting.transport.proof = False
    setting.link()
    setting.around.finish()  # connected: handle 1
    setting.lose()
    setting.around.finish()  # fenced, without proof
    assert setting.transport.fenced == [1]
    assert not setting.around.working
    setting.transport.proof = True
    again = Peer(PEER.address, PEER.incarnation + 1)
    for _ in range(2):
        setting.driver.on_up(again, setting.driver.peers.describe(again.incarnation))
        while setting.around.working:
            setting.around.finish()
        assert setting.transport.fenced == [1, 1]  # proven now, and not fenced a third time


def test_a_link_asks_for_a_few_of_those_that_no_room_waits_for_and_for_all_in_turn(setting: Setting) -> None:
    """Twenty runs of a worker come and go, and the end of none can be proven."""
    setting.transport.proof = False

    def link(run: int) -> None:
        peer = Peer(PEER.address, run)
        setting.driver.on_up(peer, setting.driver.peers.describe(run))
        while setting.around.working:
            setting.around.finish()
        setting.driver.on_lost(peer, "the connection broke")
        while setting.around.working:
            setting.around.finish()

    for run in range(100, 120):
        link(run)
    counts = []
    for run in range(200, 204):
        before = len(setting.transport.fenced)
        link(run)
        counts.append(setting.transport.fenced[before:])
    assert all(len(asked) == 9 for asked in counts)  # eight of them, and the last one to be lost
    assert {handle for asked in counts for handle in asked} >= set(range(1, 21))


# -- proof by a statement of others -----------------------------------------------------------------------------------

WITNESS = Peer("10.0.0.2:7000", 3)  # a new process at the old address


class Lost:
    """A peer that has ended on another machine, without proof from the transport, and a peer that links after that."""

    process = Process("boot of there", 11, 70, 900, 0, machine="a" * 32)

    def __init__(
        self, setting: Setting, stated: Process = process, beside: Mapping[Peer, Process] = MappingProxyType({})
    ) -> None:
        self.driver, self.around, self.transport = setting.driver, setting.around, setting.transport
        self.transport.proof = False
        self.stated = stated
        for peer, process in {**beside, PEER: stated}.items():
            self.link(peer, process)
        setting.lose()
        self.run()

    def link(self, peer: Peer, process: Process) -> None:
        self.driver.on_up(peer, self.stating(peer, process))
        self.run()

    def stating(self, peer: Peer, process: Process) -> bytes:
        """Return the identity message of this peer, with this process in it."""
        claim = claims.state(Noted(), claims.run_owner(peer.incarnation))
        return msgspec.msgpack.encode(PeerProfile(self.driver.layout, "noted", claim, process))

    def hear(self, message: Inquiry) -> None:
        self.driver.on_message(WITNESS, 1, message)
        self.run()

    def run(self) -> None:
        while self.around.working:
            self.around.finish()


@pytest.fixture
def lost(setting: Setting) -> Lost:
    return Lost(setting)


def question() -> AskFate:
    found = question_of(Lost.process)
    assert found is not None
    return found


def test_a_manager_of_the_same_machine_is_asked_and_its_word_is_proof(lost: Lost) -> None:
    lost.link(WITNESS, msgspec.structs.replace(Lost.process, pid=71, started=950))
    assert lost.around.said == [(WITNESS, question())]
    lost.hear(TellFate(about=question(), fate="gone"))
    assert lost.transport.buried == [1]
    assert lost.driver.peers.fences.lost == {}
    assert lost.driver.peers.fences.proofs == {"transport": 0, "machine": 1, "operator": 0}


@pytest.mark.parametrize("fate", ["running", "unknown"])
def test_a_process_that_ran_when_it_was_looked_up_is_no_proof(lost: Lost, fate: Any) -> None:
    lost.link(WITNESS, msgspec.structs.replace(Lost.process, pid=71, started=950))
    lost.hear(TellFate(about=question(), fate=fate))
    assert lost.transport.buried == []


@pytest.mark.parametrize(
    "other", [{"boot": "another boot", "machine": ""}, {"pid_namespace": 12}, {"time_namespace": 13}]
)
def test_another_machine_is_not_asked_and_not_believed(lost: Lost, other: dict[str, Any]) -> None:
    lost.link(WITNESS, msgspec.structs.replace(Lost.process, pid=71, started=950, **other))
    assert lost.around.said == []
    lost.hear(TellFate(about=question(), fate="gone"))
    assert lost.transport.buried == []


@pytest.mark.parametrize("other", [{"pid": 71}, {"started": 901}, {"boot": "another boot"}, {"pid_namespace": 12}])
def test_a_word_about_another_process_is_no_proof(lost: Lost, other: dict[str, Any]) -> None:
    lost.link(WITNESS, msgspec.structs.replace(Lost.process, pid=71, started=950))
    lost.hear(TellFate(about=msgspec.structs.replace(question(), **other), fate="gone"))
    assert lost.transport.buried == []


# -- the statement of a manager in a later boot -----------------------------------------------------------------------

LATER = Process("a later boot", 21, 5, 80, 0, machine=Lost.process.machine)


def changed(process: Process, **changes: Any) -> Process:
    return msgspec.structs.replace(process, **changes)


def test_a_manager_in_another_boot_of_the_machine_is_asked_and_its_word_is_proof(lost: Lost) -> None:
    lost.link(WITNESS, LATER)
    assert lost.around.said == [(WITNESS, question())]
    lost.hear(TellFate(about=question(), fate="gone"))
    assert lost.transport.buried == [1]
    assert lost.driver.peers.fences.lost == {}
    assert lost.driver.peers.fences.proofs == {"transport": 0, "machine": 1, "operator": 0}


@pytest.mark.parametrize("fate", ["running", "unknown"])
def test_a_manager_in_another_boot_that_cannot_tell_is_no_proof(lost: Lost, fate: Any) -> None:
    lost.link(WITNESS, LATER)
    lost.hear(TellFate(about=question(), fate=fate))
    assert lost.transport.buried == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"machine": "b" * 32}),
        ({}, {"machine": ""}),
        ({"machine": ""}, {}),
        ({"machine": ""}, {"machine": ""}),
        ({}, {"boot": Lost.process.boot}),
        ({}, {"boot": Lost.process.boot, "pid_namespace": 11, "time_namespace": 13}),
        ({}, {"boot": ""}),
        ({"boot": ""}, {}),
    ],
    ids=["another machine", "no machine", "lost without one", "neither has one", "another pid namespace",
         "another time namespace", "no boot", "lost without a boot"],
)  # fmt: skip
def test_what_does_not_show_a_later_boot_of_the_machine_is_no_proof(
    setting: Setting, before: dict[str, Any], after: dict[str, Any]
) -> None:
    lost = Lost(setting, changed(Lost.process, **before))
    lost.link(WITNESS, changed(LATER, **after))
    assert lost.around.said == []
    asked = question_of(lost.stated) or question()
    lost.hear(TellFate(about=asked, fate="gone"))
    assert lost.transport.buried == []


@pytest.mark.parametrize("process", [LATER, changed(Lost.process, pid=71, started=950)], ids=["later", "same boot"])
def test_an_answer_that_was_not_asked_for_is_no_proof(lost: Lost, process: Process) -> None:
    lost.around.busy = True  # the link refuses messages that can be repeated
    lost.link(WITNESS, process)
    lost.hear(TellFate(about=question(), fate="gone"))
    assert lost.transport.buried == []
    lost.around.busy = False
    lost.driver.peers.fences.ask_again()
    lost.run()
    lost.hear(TellFate(about=question(), fate="gone"))
    assert lost.transport.buried == [1]


def test_an_answer_over_a_link_that_was_not_asked_is_no_proof(lost: Lost) -> None:
    """The same manager links again while the transport is busy: no question has gone over the new link yet."""
    lost.link(WITNESS, LATER)
    lost.driver.on_lost(WITNESS, "the connection broke")
    lost.hear(TellFate(about=question(), fate="gone"))
    lost.driver.on_up(WITNESS, lost.stating(WITNESS, LATER))
    lost.driver.on_message(WITNESS, 1, TellFate(about=question(), fate="gone"))
    assert lost.driver.peers.fences.lost[PEER].witness == "transport"
    lost.run()
    lost.hear(TellFate(about=question(), fate="gone"))
    assert lost.transport.buried == [1]


@pytest.mark.parametrize("asked_first", [False, True])
def test_a_boot_from_which_a_peer_is_linked_has_not_ended(lost: Lost, asked_first: bool) -> None:
    """Two machines state the same id, or the lost link is half open: no proof until that link is lost as well."""
    neighbour = Peer("10.0.0.2:7005", 6)
    linking = [(neighbour, changed(Lost.process, pid_namespace=12, pid=9)), (WITNESS, LATER)]
    for peer, process in reversed(linking) if asked_first else linking:
        lost.link(peer, process)
    assert ((WITNESS, question()) in lost.around.said) == asked_first
    lost.hear(TellFate(about=question(), fate="gone"))
    assert lost.transport.buried == []
    lost.driver.on_lost(neighbour, "the connection broke")
    lost.run()
    lost.driver.peers.fences.ask_again()
    lost.run()
    lost.hear(TellFate(about=question(), fate="gone"))
    assert lost.transport.buried == [1]


def test_a_boot_that_was_linked_beside_the_lost_one_proves_nothing_later_either(setting: Setting) -> None:
    """Two machines with one id: the worker of the other one starts again after the loss."""
    setting.transport.proof = False
    neighbour = Peer("10.0.0.7:7000", 6)
    lost = Lost(setting, beside={neighbour: LATER})
    lost.driver.on_lost(neighbour, "it ends")
    lost.run()
    lost.link(WITNESS, changed(LATER, pid=6, started=200))
    lost.hear(TellFate(about=question(), fate="gone"))
    assert (WITNESS, question()) not in lost.around.said
    assert lost.transport.buried == []


def test_a_machine_that_this_side_states_as_well_has_no_boot_that_ended(setting: Setting) -> None:
    """All machines have the same id: an earlier boot of this machine could not have linked with this process."""
    setting.around.machine = Lost.process.machine
    lost = Lost(setting)
    lost.link(WITNESS, LATER)
    lost.hear(TellFate(about=question(), fate="gone"))
    assert lost.transport.buried == []


def test_a_late_word_about_the_boot_before_says_nothing_of_the_later_one(setting: Setting) -> None:
    """An answer about an earlier process of the lost peer's machine comes late.

    The lost peer is of the later boot. The link with a manager of the earlier boot is half open: it was asked about
    another process while it lived, and its answer arrives now.
    """
    setting.transport.proof = False
    lost = Lost(setting, LATER)
    lost.link(WITNESS, Lost.process)
    of_before = question_of(changed(Lost.process, pid=12))
    assert of_before is not None
    lost.hear(TellFate(about=of_before, fate="gone"))
    assert lost.transport.buried == []


def test_a_peer_that_links_again_takes_every_word_of_its_end_back(lost: Lost) -> None:
    """The peer is lost again before the transport was connected, so only its first loss is known."""
    lost.driver.peers.fences.declare_gone("10.0.0.2")
    lost.driver.on_up(PEER, lost.stating(PEER, Lost.process))
    lost.driver.on_lost(PEER, "the connection broke again")
    lost.run()
    assert lost.driver.peers.fences.proofs == {"transport": 0, "machine": 0, "operator": 0}


def test_a_peer_that_states_another_process_when_it_links_again_is_asked_about_that_one(lost: Lost) -> None:
    """The peer is lost again before the transport was connected. An answer about its first process proves nothing."""
    other = msgspec.structs.replace(Lost.process, pid=72, started=990)
    lost.driver.on_up(PEER, lost.stating(PEER, other))
    lost.driver.on_lost(PEER, "the connection broke again")
    lost.run()
    lost.link(WITNESS, msgspec.structs.replace(Lost.process, pid=71, started=950))
    assert lost.around.said == [(WITNESS, question_of(other))]
    lost.hear(TellFate(about=question(), fate="gone"))
    assert lost.driver.peers.fences.lost[PEER].witness == "transport"


@pytest.mark.parametrize("where", ["10.0.0.2", "10.0.0.2:7000"])
def test_the_operators_word_is_proof_for_the_lost_peers_there(lost: Lost, where: str) -> None:
    place = parse_address(where) if ":" in where else where
    (declared,) = lost.driver.peers.fences.declare_gone(place)
    lost.run()
    assert (declared.peer, declared.proven.result(0)) == (PEER, True)
    assert lost.driver.peers.fences.proofs["operator"] == 1


def test_nothing_that_is_linked_is_fenced_and_nothing_elsewhere(lost: Lost) -> None:
    lost.link(Peer("10.0.0.3:7000", 4), Lost.process)
    for where, words in (("10.0.0.3", "is linked now"), ("10.0.0.4", "lost peers: 10.0.0.2:7000")):
        with pytest.raises(InvalidRequest, match=words):
            lost.driver.peers.fences.declare_gone(where)
    assert lost.transport.buried == []


@pytest.mark.parametrize("odd", [{"pid": 2**31}, {"pid": -1}, {"boot": ""}, {"started": -5}])
def test_a_process_that_cannot_be_is_not_asked_about(odd: dict[str, Any]) -> None:
    """The question would be unreadable, and would end the link with a manager that broke no rule."""
    assert question_of(msgspec.structs.replace(Lost.process, **odd)) is None
