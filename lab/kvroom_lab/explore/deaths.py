"""One sink whose source is lost on another machine, with everything that can prove the source's end or seem to.

The sink has a real driver, with its table and its fences. Around it are a source with a transfer in flight, a witness,
perhaps a process that takes over the source's address, and an operator. The transport is one-sided: it can look up
processes of its own machine; of a process elsewhere it can only tell, once that is known to be dead, whether its last
bytes have landed. Witnesses tell the truth, but also without being asked. A witness on another machine states that the
source is gone, because the process with that number on its own machine is. The operator tells the truth about a dead
source, and may also name an address that is linked.

A driver cannot be copied, so each sequence of actions builds its world again from the start.
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

from .frozen import behaviour_key, message_key
from .managers import ROOM, LawBroken
from .scopes import REQUEST, Deaths, Machines

T = TypeVar("T")
SINK, SOURCE = Peer("10.0.0.1:7000", 1), Peer("10.0.0.2:7000", 2)
WITNESS, NEWCOMER = Peer("10.0.0.3:7000", 3), Peer(SOURCE.address, 4)
NAMES = {SINK: "the sink", SOURCE: "the source", WITNESS: "the witness", NEWCOMER: "the newcomer"}
WRITER = Process("boot of the source's machine", 11, 70, 900, 0)
EARLIER = msgspec.structs.replace(WRITER, started=800)
"""A process that had the source's pid before it and has ended."""
_BOOTS = {"here": "boot of the source's machine", "there": "boot of another machine"}
_ROUNDS = 4
_REGIONS = array_regions(1 << 20, (1, 2, 8, 1, 1, 16), (256, 128, 16, 16, 16, 1), "LCPTHD", itemsize=1, layers=range(1))
_LAYOUT = KVLayout(_REGIONS, dtype="uint8")
Action = tuple[Any, ...]
"""An action of a world: the name of a method of `LossWorld`, and its arguments."""


class Letter(NamedTuple):
    """A message in flight."""

    sender: Peer
    receiver: Peer
    message: Message | Inquiry

    @property
    def key(self) -> Hashable:
        """Return a key of everything that the receiver's rules read of the message."""
        inquiry = isinstance(self.message, AskFate | TellFate)
        return self.sender, self.receiver, self.message if inquiry else message_key(self.message)  # type: ignore[arg-type]


class Work(NamedTuple):
    """A call of the transport that may take long, with the state that it started from.

    `fences` is true for a search for proof and false for connecting.
    """

    call: Callable[[], Any]
    future: Future[Any]
    fences: bool
    began_with: object


class _Description(msgspec.Struct):
    endpoint: bytes
    address: str


class _Memory(Transport):
    """The sink's transport (see the module). A handle is for one connection, and is dropped once its end is proven."""

    name: ClassVar[str] = "explored"

    def __init__(self, world: LossWorld) -> None:
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
        """Drop the handle if its end is proven.

        Unless `believing`, only a process of this machine can be proven dead.
        """
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
    """Return a peer's signed description of its transport."""
    key = SigningKey()
    description = msgspec.msgpack.encode(_Description(key.public, peer.address))
    return claims.signed(description, key, _Memory.name, claims.run_owner(peer.incarnation))


_CLAIMS = {peer: _claim(peer) for peer in NAMES}


class _Engine:
    """Counts releases of the pages of the one room. All objects are equal, since each world has the same room."""

    def __init__(self) -> None:
        self.returned = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Engine)

    def __hash__(self) -> int:
        return ROOM

    def update(self, room: Room) -> None: ...

    def release(self, pages: tuple[int, ...]) -> None:  # noqa: ARG002 - a room releases all of its pages in one call
        self.returned += 1


class LossWorld:
    """The loop, machine and links of the sink's driver (see the module)."""

    def __init__(self, scope: Deaths, machines: Machines) -> None:
        self.scope = scope
        self.alive = self.writing = (
            True  # of the source; after its death, `writing` lasts until its last bytes have landed
        )
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
        """Carry out this action. Raise `LawBroken` if it breaks a law."""
        getattr(self, "_" + action[0])(*action[1:])
        if self.engine.returned > 1:
            raise LawBroken("law 6: the sink releases the pages of a room twice")
        if self.engine.returned and self.writing:
            state = "lives" if self.alive else "is dead, and its last bytes are in flight"
            raise LawBroken(f"law 6: the sink released pages that the source still writes: it {state}")

    def rest(self) -> Hashable:
        """Return a key of the world around the driver.

        Two worlds that share this key and `kind` allow the same actions, with the same results.
        """
        return self.came, self.said, self.declared, self.losses, self.expiries, self.alive, self.writing

    def kind(self) -> Hashable:
        """Return a key that drivers share if they behave the same."""
        fences, remotes = self.fences, self.driver.peers.remotes
        letters = sorted((letter.key for letter in self.letters), key=repr)
        return (
            behaviour_key(self.table, self.time),
            self.engine.returned,
            frozenset((peer, one.handle, one.witness, frozenset(one.asked)) for peer, one in fences.lost.items()),
            frozenset(fences._fencing),  # noqa: SLF001 - it decides which questions are sent
            frozenset((peer, remote.handle) for peer, remote in remotes.items()),
            frozenset(self.memory.connected),
            tuple(letters),
            tuple((work.fences, self._is_current(work), self._word(work)) for work in self.works),
        )

    # -- possible actions -----------------------------------------------------------------------------------------

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

    # -- actions --------------------------------------------------------------------------------------------------

    def _lose(self) -> None:
        """Lose the link with the source, as the sink notices it; messages in flight over it are lost."""
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
        """Let the witness make a statement unasked, about the earlier process or (from elsewhere) about the source."""
        self.said = True
        about = question_of(EARLIER if self.scope.witness == "here" else WRITER)
        assert about is not None  # both processes have all the fields that a question needs
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

    def _work(self, number: int, fences: bool) -> None:  # noqa: ARG002 - the line of a trace names it
        """Complete a blocking call; the driver receives its result."""
        work = self.works.pop(number)
        work.future.set_result(work.call())

    def _declare(self) -> None:
        """Let the operator declare the source's address gone.

        That is refused if a living process is linked from there.
        """
        self.declared = True
        with contextlib.suppress(InvalidRequest):
            self.fences.declare_gone(parse_address(SOURCE.address))

    def _expire(self) -> None:
        self.expiries += 1
        self._let_time_pass()

    # -- the clean end --------------------------------------------------------------------------------------------

    def proofs(self) -> tuple[str, ...]:
        """Return the proofs of the source's end that are possible in this world, each sufficient by itself."""
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
        """Give this proof, end everything in flight and let deadlines pass.

        Law 2: the pages must come back, once.
        """
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
            raise LawBroken(
                f"law 2: pages do not come back although their source has stopped writing; the proof was {proof}"
            )

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
        """Schedule nothing: a deadline expires by an action of the world."""
        return lambda: None

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:  # noqa: ARG002
        """Close the coroutine: a living source may link again at any time, as an action of the world."""
        work.close()

    async def dial(self, address: str) -> Peer:
        raise LinkError(f"{address} links by an action of the world")

    def process(self) -> Process:
        return self._process_at("here" if self.scope.sink_here else "sink", 73)

    def look_up(self, process: Process) -> Fate:  # noqa: ARG002 - no peer asks the sink about a process
        return Fate.UNKNOWN

    def host_of(self, peer: Peer) -> str:
        return parse_address(peer.address).host

    def send(self, peer: Peer, message: Message | Inquiry, *, again: bool = False) -> bool:  # noqa: ARG002
        """Keep messages that get an answer, each of them once."""
        letter = Letter(SINK, peer, message)
        if isinstance(message, Abort | AskFate) and letter not in self.letters:
            self.letters.append(letter)
        return True

    def drop(self, peer: Peer, detail: str) -> None:
        raise LawBroken(f"law 11: {NAMES[peer]} broke no rule and was disconnected: {detail}")

    # -- helpers --------------------------------------------------------------------------------------------------

    def _link(self, peer: Peer, process: Process, *, connects: bool = True) -> None:
        before = len(self.works)
        identity = PeerProfile(_LAYOUT, self.memory.name, _CLAIMS[peer], process)
        self.driver.on_up(peer, msgspec.msgpack.encode(identity))
        if connects:  # completed immediately: only a later connection to the source is worth an action
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
    """Return the line of a trace that describes this action."""
    kind, *what = action
    if kind == "hear":
        sender, receiver, message = what[0]
        return f"{NAMES[receiver]} receives from {NAMES[sender]}: {message}"
    if kind == "work":
        return f"the transport has {'looked for proof' if what[1] else 'connected'}"
    return {
        "lose": "the sink's link with the source is lost",
        "die": "the source dies",
        "take_in": "the last bytes of the source land",
        "link_again": "the source links again",
        "come": "another process links, from the source's address",
        "say": "the witness sends a statement unasked",
        "declare": "the operator declares the source's address gone",
        "expire": "the sink reaches a deadline",
    }[str(kind)]
