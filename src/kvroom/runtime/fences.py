"""Proof that lost peers write no more, and the only place that tells the rooms of it (`Fences._fenced`).

A lost link proves nothing, and neither does a new worker at the old address: the old process may still run behind a
partition. The transport is asked first, which sees the processes of its own machine. That a process elsewhere has ended
is taken from one of two: a manager that is linked now, is of the lost peer's machine, and has answered our question
since (`_may_tell`); or the operator. Then, too, the transport has to find that the last bytes of that process have been
taken in.

A manager may answer for its own boot and namespaces, where it looks the process up, and for every other boot of its
machine: one that it does not run in is over. What that rests on is an order in time:

1. The lost peer L had a link here. The handshake holds our nonce, so L ran then, in boot 1 of machine M.
2. L is lost. We ask W, which is linked and stated M and boot 2, about L by boot, pid and start time.
3. W answers. It can know that question only from us, so it ran after 1, in boot 2.

M has one boot at a time and none comes back, so boot 1 has ended between 1 and 3. The interleaving to fear is the
reverse: W is of boot 1, M restarts unseen, L links from boot 2 and is lost, and W's link, which broke with boot 1, is
half open here because no heartbeat is due yet. W is asked, and no answer can come: its process had ended before L
began. An answer that was on its way belongs to an earlier question, which named another process. So only an answer to
a question about this loss is taken, and only over the link that carried the question (`LostPeer.asked`).

All this falls with a machine id that two machines have, so with any sign of that no answer is taken: a peer is linked
from the lost one's boot; the two boots were linked side by side when L was lost, whatever process of them links later;
or we ourselves state that machine, since a boot other than ours could not have spoken to us.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from concurrent.futures import Future
from itertools import islice
from typing import NamedTuple, Protocol

import msgspec

from kvroom.core.messages import Peer
from kvroom.core.table import RoomTable
from kvroom.errors import ConfigurationError, InvalidRequest
from kvroom.transports.base import Transport
from kvroom.transports.kit.machine import Fate, Process
from kvroom.wire.address import HostPort, parse_address
from kvroom.wire.frames import AskFate, Inquiry, TellFate

from .logs import peer_log
from .loop import Loop
from .remote import Remote
from .surroundings import LocalMachine

logger = logging.getLogger(__name__)
_OTHERS_AT_ONCE = 8
PROOFS = ("transport", "machine", "operator")
"""By whom it was known that a lost peer writes no more: our transport, a manager of its machine, the operator."""


class LostPeer(NamedTuple):
    """A peer whose link was lost: the transport's handle, the other end of the link, and the process that it stated.

    `beside`: the other boots of its machine, as they state it, that were linked at that time. `asked`: the linked
    managers that were asked about it. `word`: who has said that the process has ended, one of `PROOFS`; "transport" as
    long as nobody else has.
    """

    handle: int
    host: str
    process: Process
    beside: frozenset[str]
    asked: set[Peer]
    word: str = PROOFS[0]


class Declared(NamedTuple):
    """A lost peer that the operator has declared to be gone, the pages that waited for it, and whether it is proven."""

    peer: Peer
    pages: int
    proven: Future[bool]


class FencingPeers(Protocol):
    """The peers, as far as fences need them."""

    table: RoomTable
    transport: Transport

    @property
    def remotes(self) -> Mapping[Peer, Remote]: ...
    def describe_error(self, peer: Peer, what: str, error: BaseException) -> str: ...
    def linked_again(self, peer: Peer, remote: Remote) -> None: ...
    def fenced(self, peer: Peer) -> None: ...
    def redial(self, peer: Peer) -> None: ...
    def send(self, peer: Peer, message: Inquiry, *, again: bool = False) -> bool: ...


class Fences:
    """The lost peers of one driver. All methods are called in its thread."""

    def __init__(self, home: FencingPeers, loop: Loop, machine: LocalMachine) -> None:
        self.lost: dict[Peer, LostPeer] = {}  # until fenced with proof, or connected again
        self.proofs = dict.fromkeys(PROOFS, 0)  # peers fenced since the start, by whose word
        self._home, self._loop, self._machine = home, loop, machine
        self._under_way: set[Peer] = set()
        self._declared: dict[Peer, list[Future[bool]]] = {}

    # -- what happens to peers ------------------------------------------------------------------------------------

    def lose(self, peer: Peer, remote: Remote, handle: int) -> None:
        """The link to this peer is lost, and this was the transport's handle.

        The handle may come later than the loss. By then a manager or the operator may have said that the process has
        ended, which is kept as long as the peer states the same process: what was said is about that one alone.
        """
        process = remote.identity.process
        others = (one.identity.process for one in self._home.remotes.values())
        beside = frozenset(other.boot for other in others if process.outlived_by(other))
        before = self.lost.get(peer)
        if before is None or before.process != process:
            self.lost[peer] = LostPeer(handle, remote.host, process, beside, set())
        else:
            self.lost[peer] = before._replace(handle=handle, host=remote.host, beside=beside | before.beside)

    def relinked(self, peer: Peer) -> bool:
        """A peer is linked, so that it lives, whatever was said of it; return False if it is being fenced just now."""
        for other in self.lost.values():
            other.asked.discard(peer)
        lost = self.lost.get(peer)
        if lost is not None:
            self.lost[peer] = lost._replace(word=PROOFS[0], asked=set())
        return peer not in self._under_way

    def connected(self, peer: Peer) -> None:
        """The transport is connected to this peer again."""
        self.lost.pop(peer, None)

    def ask_again(self) -> None:
        """Ask for proof once more, because a peer has linked and may know better.

        Proof is asked of every peer that a room waits for. Of the others, of which only the transport keeps something,
        it is asked of a few, those first that have waited longest. A peer that links again and again as a new run
        leaves one behind each time, and asking for all of them would make each link cost more than the one before.
        """
        others = (peer for peer in list(self.lost) if not self._home.table.concerns(peer))
        asked = [*filter(self._home.table.concerns, self.lost), *islice(others, _OTHERS_AT_ONCE)]
        for peer in asked:
            self.lost[peer] = self.lost.pop(peer)  # the last of them now
            self.fence(peer)

    # -- asking for proof -----------------------------------------------------------------------------------------

    def fence(self, peer: Peer) -> None:
        """Ask for proof that a lost peer writes no more."""
        lost, remotes = self.lost.get(peer), self._home.remotes
        if lost is None or peer in self._under_way or peer in remotes:
            return
        if any(remote.handle == lost.handle for remote in remotes.values()):
            return  # it said that it was one that is linked now, and is not to be broken with
        self._under_way.add(peer)
        others = frozenset(remote.host for remote in remotes.values())
        fencing = self._loop.run_blocking(lambda: self._break_with(lost, others))
        fencing.add_done_callback(lambda done: self._loop.post(lambda: self._fenced(peer, lost, done)))

    def _break_with(self, lost: LostPeer, others: frozenset[str]) -> bool:
        """Ask the transport, in a thread that may block."""
        transport = self._home.transport
        transport.note_lost(lost.handle, lost.host, others)
        return transport.fence(lost.handle) if lost.word == PROOFS[0] else transport.fence_dead(lost.handle)

    def _fenced(self, peer: Peer, lost: LostPeer, fencing: Future[bool]) -> None:
        self._under_way.discard(peer)
        error = fencing.exception()
        if error is not None:  # an engine may raise for the numbers of a hostile peer; its pages stay where they are
            self._home.describe_error(peer, "its end cannot be proven; what it said", error)
        proven = error is None and fencing.result()
        remote = self._home.remotes.get(peer)
        if remote is not None:  # linked again meanwhile: from now on the peer answers for itself
            self._answer(peer, proven=False)
            self._home.linked_again(peer, remote)
        elif self.lost.get(peer) is not lost:  # another connection to it, since lost, or somebody's word came meanwhile
            self.fence(peer)
        elif proven:
            del self.lost[peer]
            self.proofs[lost.word] += 1
            self._home.fenced(peer)
            self._answer(peer, proven=True)
        else:
            self._answer(peer, proven=False)
            self._ask_about(lost)
            if self._home.table.concerns(peer):
                self._home.redial(peer)

    # -- the word of a manager on the same machine ----------------------------------------------------------------

    def hear(self, peer: Peer, message: Inquiry) -> None:
        """Take what a linked manager asks or tells about a process."""
        if isinstance(message, AskFate):
            fate = self._machine.look_up(Process(**msgspec.structs.asdict(message), uid=0))
            self._send(peer, TellFate(about=message, fate=fate.value))
        elif message.fate == Fate.GONE.value:
            self._take_word_of(peer, message.about)

    def _ask_about(self, lost: LostPeer) -> None:
        """Ask the managers of its machine, if that is not ours: here the transport sees the process itself."""
        question = None if self._machine.process().sees(lost.process) else question_of(lost.process)
        lost.asked.intersection_update(self._home.remotes)
        for peer, remote in self._home.remotes.items():
            if question is not None and self._may_tell(remote.identity.process, lost) and self._send(peer, question):
                lost.asked.add(peer)

    def _take_word_of(self, witness: Peer, about: AskFate) -> None:
        """Believe that a process of the witness's machine has ended, the very one that a lost peer stated."""
        remote = self._home.remotes.get(witness)
        for peer, lost in list(self.lost.items()):
            told = lost.word != PROOFS[0] or peer in self._home.remotes
            if remote is None or told or witness not in lost.asked or question_of(lost.process) != about:
                continue
            its = remote.identity.process
            if self._may_tell(its, lost):
                how = "has looked its process up" if its.sees(lost.process) else "runs in a later boot"
                peer_log(logger, peer).info("%s is gone: %s, on the same machine, %s", peer, witness, how)
                self.lost[peer] = lost._replace(word="machine")
                self.fence(peer)

    def _may_tell(self, its: Process, lost: LostPeer) -> bool:
        """Return True if a linked manager with this process can know that the lost one has ended. See the module."""
        process = lost.process
        if its.sees(process):
            return True
        if not process.outlived_by(its) or its.boot in lost.beside:
            return False
        linked = (remote.identity.process.boot for remote in self._home.remotes.values())
        return process.boot not in linked and process.machine != self._machine.process().machine

    def _send(self, peer: Peer, message: Inquiry) -> bool:
        return self._home.send(peer, message, again=True)

    # -- the word of the operator ---------------------------------------------------------------------------------

    def declare_gone(self, where: HostPort | str) -> list[Declared]:
        """Believe the operator that the processes of the lost peers there have ended; `where` is a host or an address.

        Raise `InvalidRequest` if no lost peer is there: nothing that is linked is fenced.
        """

        def at(peer: Peer) -> bool:
            with contextlib.suppress(ConfigurationError):  # a peer may state any text
                stated = parse_address(peer.address)
                return where in (stated, stated.host)
            return False

        found = [peer for peer in self.lost if at(peer) and peer not in self._home.remotes]
        if not found and any(map(at, self._home.remotes)):
            raise InvalidRequest(
                f"{where} is linked now, and nothing that is linked is fenced: end its processes first"
            )
        if not found:
            lost = ", ".join(sorted({str(peer) for peer in self.lost if peer not in self._home.remotes}))
            raise InvalidRequest(f"no peer at {where} was lost; {f'lost are {lost}' if lost else 'none is'}")
        declared = []
        for peer in found:
            proven: Future[bool] = Future()
            self._declared.setdefault(peer, []).append(proven)
            waiting = sum(len(room.held_pages) for room in self._home.table if peer in room.involved())
            declared.append(Declared(peer, waiting, proven))
            peer_log(logger, peer).warning("%s is gone, the operator says", peer)
            self.lost[peer] = self.lost[peer]._replace(word="operator")
            self.fence(peer)
        return declared

    def _answer(self, peer: Peer, *, proven: bool) -> None:
        for waiting in self._declared.pop(peer, ()):
            waiting.set_result(proven)


def question_of(process: Process) -> AskFate | None:
    """Return the question about a process that a peer has stated; None if no process is like that."""
    try:
        return msgspec.convert({**msgspec.structs.asdict(process), "type": "AskFate"}, AskFate)
    except msgspec.ValidationError:
        return None
