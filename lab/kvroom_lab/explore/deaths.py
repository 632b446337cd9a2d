"""One sink whose source is lost on another machine: everything that can prove the source's end, or seem to.

The sink has a real driver, with its table and its fences. Around it are a source that has a transfer under way, a
witness, perhaps a process that takes the source's address over, and an operator. The transport is a one-sided one: it
sees processes of its own machine, and of others it can only tell that the last bytes of a dead one have been taken in.
Witnesses say the truth, but also what nobody has asked them; one on another machine says that the source is gone, for
it has a process of that number which is. The operator says the truth of a source that is dead, and may also name an
address that is linked.

A driver cannot be copied, so that a world is made anew for each sequence of actions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Hashable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar, NamedTuple, TypeVar

import msgspec

from kvroom.core import inputs as asked
from kvroom.core.messages import Abort, Message, Peer, Quiesced
from kvroom.core.room import Room
from kvroom.core.settings import Timeouts
from kvroom.errors import InvalidRequest, LinkError, TransportError
from kvroom.plan import Blocks, KVLayout, MemoryRange, array_regions
from kvroom.runtime.driver import Driver
from kvroom.runtime.fences import LostPeer, question_of
from kvroom.runtime.peers import Peers
from kvroom.runtime.remote import PeerProfile
from kvroom.transports import Transfer, Transport
from kvroom.transports.kit import claims
from kvroom.transports.kit.machine import Fate, Process
from kvroom.wire.address import parse_address
from kvroom.wire.frames import AskFate, Inquiry, TellFate
from kvroom.wire.keys import SigningKey

from .frozen import alike, alike_message
from .managers import ROOM, LawBroken
from .scopes import REQUEST, Deaths, Machines

T = TypeVar("T")
SINK, SOURCE = Peer("10.0.0.1:7000", 1), Peer("10.0.0.2:7000", 2)
WITNESS, NEWCOMER = Peer("10.0.0.3:7000", 3), Peer(SOURCE.address, 4)
NAMES = {SINK: "the sink", SOURCE: "the source", WITNESS: "the witness", NEWCOMER: "the newcomer"}
WRITER = Process("boot of the source's machine", 11, 70, 900, 0)
EARLIER = msgspec.structs.replace(WRITER, started=800)
"""A process that had the source's pid before it, and ended then."""
_BOOTS = {"here": "boot of the source's machine", "there": "boot of another machine"}
_ROUNDS = 4
_REGIONS = array_regions(1 << 20, (1, 2, 8, 1, 1, 16), (256, 128, 16, 16, 16, 1), "LCPTHD", itemsize=1, layers=range(1))
_LAYOUT = KVLayout(_REGIONS, dtype="uint8")
Action = tuple[Any, ...]
"""What happens: the name of a method of `Deathbed`, and its arguments."""


class Letter(NamedTuple):
    """A message on its way."""

    sender: Peer
    receiver: Peer
    message: Message | Inquiry

    @property
    def alike(self) -> Hashable:
        """All that its receiver's rules read of it."""
        inquiry = isinstance(self.message, AskFate | TellFate)
        return self.sender, self.receiver, self.message if inquiry else alike_message(self.message)  # type: ignore[arg-type]


class Work(NamedTuple):
    """A call of the transport that may take long: what for, and what it was told when it began."""

    call: Callable[[], Any]
    future: Future[Any]
    fences: bool
    began_with: object


class _Description(msgspec.Struct):
    endpoint: bytes
    address: str


class _Memory(Transport):
    """The sink's transport, see the module. A handle is for one connection; it is forgotten with the proof."""

    name: ClassVar[str] = "explored"

    def __init__(self, world: Deathbed) -> None:
        self._world = world
        self.connected: dict[int, str] = {}
        self._handles = 0

    def register(self, memory: Sequence[MemoryRange]) -> None:
        raise NotImplementedError

    def describe(self) -> bytes:
        raise NotImplementedError

    def connect(self, description: bytes) -> int:
        self._handles += 1
        self.connected[self._handles] = msgspec.msgpack.decode(description, type=_Description).address
        return self._handles

    def _move(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:  # noqa: ARG002 - a sink submits nothing
        raise TransportError("a sink writes nothing")

    def fence(self, peer: int) -> bool:
        return self._end(peer, believing=False)

    def fence_dead(self, peer: int) -> bool:
        return self._end(peer, believing=not self._world.scope.sink_here)

    def _end(self, peer: int, *, believing: bool) -> bool:
        """Without the word of others, the end of a process is only seen on our own machine."""
        world, who = self._world, self.connected.get(peer)
        if who is None:
            return True
        seen = world.scope.sink_here and who == SOURCE.address and not world.alive
        proven = (believing or seen) and (world.alive or not world.writing)
        if proven:
            del self.connected[peer]
        return proven

    def close(self) -> None:
        raise NotImplementedError


def _claim(peer: Peer) -> bytes:
    """Return what a peer says of its transport."""
    key = SigningKey()
    description = msgspec.msgpack.encode(_Description(key.public, peer.address))
    return claims.signed(description, key, _Memory.name, claims.run_owner(peer.incarnation))


_CLAIMS = {peer: _claim(peer) for peer in NAMES}


class _Engine:
    """Has the pages of the one room; that of each world stands for the same room."""

    def __init__(self) -> None:
        self.returned = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Engine)

    def __hash__(self) -> int:
        return ROOM

    def update(self, room: Room) -> None: ...

    def release(self, pages: tuple[int, ...]) -> None:  # noqa: ARG002 - a room has its pages at once or not at all
        self.returned += 1


class Deathbed:
    """See the module. The loop of the sink's driver, its machine, and its links."""

    def __init__(self, scope: Deaths, machines: Machines) -> None:
        self.scope = scope
        self.alive = self.writing = True  # the source; after its death, `writing` until its last bytes are taken in
        self.came = self.said = self.declared = False
        self.losses = self.expiries = 0
        self.time, self._seq = 0.0, 0
        self.letters: list[Letter] = []
        self.works: list[Work] = []
        self.engine = _Engine()
        self.memory = _Memory(self)
        timeouts = Timeouts(**dict.fromkeys(Timeouts.__struct_fields__, 1.0))
        self.table = machines.table(timeouts)
        peers = Peers(self, self.table, _LAYOUT, transport=self.memory, machine=self)
        self.fences = peers.fences = machines.fences(peers, self, self)
        peers.links = self
        self.driver = Driver(self, self.table, _LAYOUT, peers)
        self._link(SOURCE, WRITER)
        if scope.witness:
            self._link(WITNESS, self._process_at(scope.witness, 71))
        room = machines.sink(timeouts, self.engine, REQUEST)
        self.driver.open(room, ROOM, 1)
        self.driver.resolved(room, (SOURCE,), (1,))
        self.driver.feed(room, asked.OfferPages(pages=(4,), start=0, stop=1, nbytes=1))
        self.room = room

    def after(self, action: Action) -> None:
        """Let this happen. `LawBroken` if it must not."""
        getattr(self, "_" + action[0])(*action[1:])
        if self.engine.returned > 1:
            raise LawBroken("law 6: the sink releases the pages of a room twice")
        if self.engine.returned and self.writing:
            state = "lives" if self.alive else "is dead, and its last bytes are under way"
            raise LawBroken(f"law 6: the sink released pages that the source still writes: it {state}")

    def rest(self) -> Hashable:
        """The world around the driver. Of two with this and `kind` alike, the same may happen from here on."""
        return self.came, self.said, self.declared, self.losses, self.expiries, self.alive, self.writing

    def kind(self) -> Hashable:
        """Equal for drivers that behave alike."""
        fences, remotes = self.fences, self.driver.peers.remotes
        letters = sorted((letter.alike for letter in self.letters), key=repr)
        return (
            alike(self.table, self.time),
            self.engine.returned,
            frozenset((peer, one.handle, one.witness, frozenset(one.asked)) for peer, one in fences.lost.items()),
            frozenset(fences._fencing),  # noqa: SLF001 - it decides what is asked, and nobody else needs it
            frozenset((peer, remote.handle) for peer, remote in remotes.items()),
            frozenset(self.memory.connected),
            tuple(letters),
            tuple((work.fences, self._is_current(work), self._word(work)) for work in self.works),
        )

    # -- what may happen next -------------------------------------------------------------------------------------

    def actions(self) -> Iterator[Action]:
        linked = SOURCE in self.driver.peers.remotes
        yield from ((("hear", letter)) for letter in dict.fromkeys(self.letters))
        yield from ((("work", number, work.fences)) for number, work in enumerate(self.works))
        if linked and (not self.alive or self.losses < self.scope.losses):
            yield ("lose",)
        if self.alive:
            yield ("die",)
            if not linked:
                yield ("link_again",)
        elif self.writing:
            yield ("take_in",)
        if self.scope.newcomer and not self.came and not linked:
            yield ("come",)
        if self.scope.witness and not self.said:
            yield ("say",)
        if self.scope.operator and not self.declared and (linked or not self.alive):
            yield ("declare",)
        if self.expiries < self.scope.expiries and self.table.deadline() is not None:
            yield ("expire",)

    # -- what happens ---------------------------------------------------------------------------------------------

    def _lose(self) -> None:
        """The sink notices that its link with the source is lost; what was on its way over it does not come."""
        self.losses += self.alive
        self.letters = [letter for letter in self.letters if SOURCE not in letter[:2]]
        self.driver.on_lost(SOURCE, "the connection closed")

    def _die(self) -> None:
        self.alive = False

    def _take_in(self) -> None:
        self.writing = False

    def _link_again(self) -> None:
        self._link(SOURCE, WRITER, connects=False)

    def _come(self) -> None:
        self.came = True
        self._link(NEWCOMER, self._process_at(self.scope.newcomer, 72))

    def _say(self) -> None:
        """The witness says what nobody has asked: of another process if it is on the machine, else of the source."""
        self.said = True
        about = question_of(EARLIER if self.scope.witness == "here" else WRITER)
        assert about is not None  # these are processes as they are
        self.letters.append(Letter(WITNESS, SINK, TellFate(about=about, fate="gone")))

    def _hear(self, letter: Letter) -> None:
        self.letters.remove(letter)
        sender, receiver, message = letter
        if receiver == SINK:
            self._seq += 1
            self.driver.on_message(sender, self._seq, message)
        elif isinstance(message, AskFate):
            fate = Fate.RUNNING if self.alive else Fate.GONE
            self.letters.append(Letter(receiver, SINK, TellFate(about=message, fate=fate.value)))
        elif isinstance(message, Abort) and self.alive:
            self.writing = False
            quiet = Quiesced(room=message.room, generation=message.generation, failure=message.failure)
            self.letters.append(Letter(receiver, SINK, quiet))

    def _work(self, number: int, fences: bool) -> None:  # noqa: ARG002 - the words of a trace name it
        """A call that blocked has ended, and the driver is told."""
        work = self.works.pop(number)
        work.future.set_result(work.call())

    def _declare(self) -> None:
        """The operator says that what was lost at the source's address is gone. Refused where that is linked."""
        self.declared = True
        with contextlib.suppress(InvalidRequest):
            self.fences.declare_gone(parse_address(SOURCE.address))

    def _expire(self) -> None:
        self.expiries += 1
        self._let_time_pass()

    # -- the clean end --------------------------------------------------------------------------------------------

    def proofs(self) -> tuple[str, ...]:
        """The proofs that the end of this world's source can still have, each enough by itself."""
        if self.alive:
            return ("the source's word",)
        scope = self.scope
        named = {
            "the transport": scope.sink_here,
            "the witness's word": scope.witness == "here" and not scope.sink_here,
            "the newcomer's word": scope.newcomer == "here" and not scope.sink_here,
            "the operator's word": scope.operator,
        }
        return tuple(name for name, possible in named.items() if possible)

    def wind_up(self, proof: str) -> None:
        """Let this proof be given, everything under way end, and deadlines pass: the pages come back, once (law 2)."""
        if proof == "the source's word" and SOURCE not in self.driver.peers.remotes:
            self.after(("link_again",))
        if not self.alive:
            self._end_source(proof)
        for _ in range(_ROUNDS):
            while self.letters or self.works:
                self.after(("hear", self.letters[0]) if self.letters else ("work", 0, True))
            self.driver.feed(self.room, asked.Clear())
            self._let_time_pass()
        if self.engine.returned != 1 or len(self.table) or not self.table.audit().empty:
            raise LawBroken(f"law 2: the pages of a source that writes no more do not come back, in spite of {proof}")

    def _end_source(self, proof: str) -> None:
        if self.writing:
            self.after(("take_in",))
        if SOURCE in self.driver.peers.remotes:
            self.after(("lose",))
        if proof == "the newcomer's word" and not self.came:
            self.after(("come",))
        if proof == "the operator's word" and SOURCE in self.fences.lost:
            self.after(("declare",))

    def _let_time_pass(self) -> None:
        deadline = self.table.deadline()
        if deadline is not None:
            self.time = max(self.time, deadline)
            self.driver.handle_timer()

    # -- the driver's loop, machine and links ---------------------------------------------------------------------

    def now(self) -> float:
        return self.time

    def post(self, call: Callable[[], None]) -> bool:
        call()
        return True

    def run_blocking(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        fences = SOURCE in self.fences._fencing and not any(work.fences for work in self.works)  # noqa: SLF001
        began_with = self.fences.lost.get(SOURCE) if fences else self.driver.peers.remotes.get(SOURCE)
        self.works.append(Work(call, future, fences, began_with))
        return future

    def call(self, call: Callable[[], T]) -> T:
        return call()

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Callable[[], None]:  # noqa: ARG002
        """A deadline is an action."""
        return lambda: None

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:  # noqa: ARG002
        """A source that lives may link again at any time anyway."""
        work.close()

    async def dial(self, address: str) -> Peer:
        raise LinkError(f"{address} links when it is its turn")

    def process(self) -> Process:
        return self._process_at("here" if self.scope.sink_here else "sink", 73)

    def look_up(self, process: Process) -> Fate:  # noqa: ARG002 - nobody asks the sink
        return Fate.UNKNOWN

    def host_of(self, peer: Peer) -> str:
        return parse_address(peer.address).host

    def send(self, peer: Peer, message: Message | Inquiry, *, again: bool = False) -> bool:  # noqa: ARG002
        """Keep what somebody answers, and each such message once."""
        letter = Letter(SINK, peer, message)
        if isinstance(message, Abort | AskFate) and letter not in self.letters:
            self.letters.append(letter)
        return True

    def drop(self, peer: Peer, detail: str) -> None:
        raise LawBroken(f"law 11: {NAMES[peer]} did nothing wrong and is cut off: {detail}")

    # -- how it is done -------------------------------------------------------------------------------------------

    def _link(self, peer: Peer, process: Process, *, connects: bool = True) -> None:
        before = len(self.works)
        identity = PeerProfile(_LAYOUT, self.memory.name, _CLAIMS[peer], process)
        self.driver.on_up(peer, msgspec.msgpack.encode(identity))
        if connects:  # at once: only when the transport connects to the source again is of interest
            connecting = next(number for number in range(before, len(self.works)) if not self.works[number].fences)
            self.after(("work", connecting, False))

    def _process_at(self, where: str, pid: int) -> Process:
        return Process(_BOOTS.get(where, "boot of the sink's machine"), 11, pid, 950, 0)

    def _is_current(self, work: Work) -> bool:
        now = self.fences.lost.get(SOURCE) if work.fences else self.driver.peers.remotes.get(SOURCE)
        return work.began_with is now

    def _word(self, work: Work) -> str:
        return work.began_with.witness if isinstance(work.began_with, LostPeer) else ""


def line(action: Action) -> str:
    """One line of a trace."""
    kind, *what = action
    if kind == "hear":
        sender, receiver, message = what[0]
        return f"{NAMES[receiver]} hears from {NAMES[sender]}: {message}"
    if kind == "work":
        return f"the transport has {'looked for proof' if what[1] else 'connected'}"
    return {
        "lose": "the sink's link with the source is lost",
        "die": "the source dies",
        "take_in": "the last bytes of the source are taken in",
        "link_again": "the source links again",
        "come": "another process links, from the source's address",
        "say": "the witness says what nobody asked",
        "declare": "the operator says that the source's address is gone",
        "expire": "the sink runs into a deadline",
    }[str(kind)]
