"""Proof that lost peers write no longer. No other module tells the rooms of such a proof (`Fences._fenced`).

A lost link proves nothing, and neither does a new worker at the old address: the old process may still run behind a
partition. The transport is asked first, because it sees the processes of its own machine. For a process elsewhere there
are two witnesses: a manager that is linked now, runs on the lost peer's machine, and has answered a question that was
asked after the loss (`_can_witness`); and the operator. Even with a witness, the transport has to confirm that the last
bytes of that process have been taken in.

A manager can witness for its own boot and namespaces, where it looks the process up, and for every other boot of its
machine, because a machine runs one boot at a time. The second kind rests on an order in time:

1. The lost peer L had a link here. The handshake contains this side's nonce, so L ran at that time, in boot 1 of
   machine M.
2. L is lost. This side asks W, which is linked and stated M and boot 2, about L by boot, pid and start time.
3. W answers. It can have the question only from this side, so W ran after step 1, in boot 2.

Boots of M do not overlap and none comes back, so boot 1 ended between steps 1 and 3. The interleaving to exclude is the
reverse: W is of boot 1, M restarts unnoticed, L links from boot 2 and is lost, and W's link, which broke with boot 1,
is still half open here because no heartbeat is due yet. W is asked, and cannot answer: its process ended before L
began. An answer of W that was in flight belongs to an earlier question, which named another process. Therefore only an
answer to a question about this loss counts, and only over the link that carried the question (`LostPeer.asked`).

The argument fails if two machines have one machine id, so no answer counts if there is a sign of that: a peer is linked
from the lost peer's boot; the two boots were linked at the same time when L was lost, whichever of their processes
links later; or this manager states that machine itself, because a boot other than its own could not have sent anything.
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
"""Sources of the proof that a lost peer no longer writes: this transport, a manager of its machine, the operator."""


class LostPeer(NamedTuple):
    """A peer whose link was lost."""

    handle: int
    """The transport's handle of the peer."""
    host: str
    """The numeric address of the other end of its link."""
    process: Process
    """The process that the peer stated to be."""
    beside: frozenset[str]
    """Other boots that state its machine and were linked when it was lost."""
    asked: set[Peer]
    """Linked managers that were asked about it."""
    witness: str = PROOFS[0]
    """The source, of `PROOFS`, that stated the end of the process; "transport" while there is no other."""


class Declared(NamedTuple):
    """A lost peer that the operator has declared to be gone."""

    peer: Peer
    """The peer."""
    pages: int
    """Pages of rooms here that waited for its end."""
    proven: Future[bool]
    """Done when the transport has answered: True if the drain is proven."""


class FencingPeers(Protocol):
    """The part of `Peers` that fences use; the methods are described there."""

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

    def __init__(self, peers: FencingPeers, loop: Loop, machine: LocalMachine) -> None:
        self.lost: dict[Peer, LostPeer] = {}
        """Lost peers, oldest question first, until they are fenced with proof or connected again."""
        self.proofs = dict.fromkeys(PROOFS, 0)
        """Peers fenced with proof since the start, by the source of the proof."""
        self._peers, self._loop, self._machine = peers, loop, machine
        self._fencing: set[Peer] = set()
        """Peers whose fence runs in a worker thread now. A second fence of one peer must not run beside the first."""
        self._declared: dict[Peer, list[Future[bool]]] = {}
        """Results that callers of `declare_gone` wait for."""

    # -- events of peers ------------------------------------------------------------------------------------------

    def lose(self, peer: Peer, remote: Remote, handle: int) -> None:
        """Note that the link to this peer is lost, and the transport's handle of it.

        The handle may come later than the loss. By then a manager or the operator may have stated the end of the
        process. That statement is kept if the peer states the same process, because it is about that process only.
        """
        process = remote.identity.process
        others = (one.identity.process for one in self._peers.remotes.values())
        beside = frozenset(other.boot for other in others if process.outlived_by(other))
        before = self.lost.get(peer)
        if before is None or before.process != process:
            self.lost[peer] = LostPeer(handle, remote.host, process, beside, set())
        else:
            self.lost[peer] = before._replace(handle=handle, host=remote.host, beside=beside | before.beside)

    def relinked(self, peer: Peer) -> bool:
        """Void every statement that this peer has ended, because it is linked. Return False while its fence runs.

        The peer may be connected to the transport only after the fence, which would break the new connection.
        """
        for other in self.lost.values():
            # A question that was sent over this peer's previous link can only be answered over that link.
            other.asked.discard(peer)
        lost = self.lost.get(peer)
        if lost is not None:
            self.lost[peer] = lost._replace(witness=PROOFS[0], asked=set())
        return peer not in self._fencing

    def connected(self, peer: Peer) -> None:
        """Note that the transport is connected to this peer again: the peer answers for its writes itself."""
        self.lost.pop(peer, None)

    def ask_again(self) -> None:
        """Fence lost peers again, because a peer has linked that may be a witness.

        All lost peers that a room waits for are fenced, and a few of the others, for which only the transport keeps
        state: those that have waited longest. A peer that links again and again as a new run leaves one lost peer each
        time; if all of them were fenced, each link would cost more than the one before.
        """
        others = (peer for peer in list(self.lost) if not self._peers.table.concerns(peer))
        asked = [*filter(self._peers.table.concerns, self.lost), *islice(others, _OTHERS_AT_ONCE)]
        for peer in asked:
            self.lost[peer] = self.lost.pop(peer)  # to the end of the order
            self.fence(peer)

    # -- asking for proof -----------------------------------------------------------------------------------------

    def fence(self, peer: Peer) -> None:
        """Ask the transport for proof that a lost peer writes no longer. Does nothing for a peer that is not lost."""
        lost, remotes = self.lost.get(peer), self._peers.remotes
        if lost is None or peer in self._fencing or peer in remotes:
            return
        if any(remote.handle == lost.handle for remote in remotes.values()):
            return  # the lost peer stated the description of a linked one, whose connection the fence would break
        self._fencing.add(peer)
        others = frozenset(remote.host for remote in remotes.values())
        fencing = self._loop.run_blocking(lambda: self._break_with(lost, others))
        fencing.add_done_callback(lambda done: self._loop.post(lambda: self._fenced(peer, lost, done)))

    def _break_with(self, lost: LostPeer, others: frozenset[str]) -> bool:
        """Run the transport's fence, in a worker thread."""
        transport = self._peers.transport
        transport.note_lost(lost.handle, lost.host, others)
        return transport.fence(lost.handle) if lost.witness == PROOFS[0] else transport.fence_dead(lost.handle)

    def _fenced(self, peer: Peer, lost: LostPeer, fencing: Future[bool]) -> None:
        self._fencing.discard(peer)
        error = fencing.exception()
        if error is not None:  # an engine may raise for numbers of a hostile peer; the pages stay in quarantine
            self._peers.describe_error(peer, "its end cannot be proven: its description", error)
        proven = error is None and fencing.result()
        remote = self._peers.remotes.get(peer)
        if remote is not None:  # linked again during the fence: from now on the peer answers for its writes itself
            self._answer(peer, proven=False)
            self._peers.linked_again(peer, remote)
        elif self.lost.get(peer) is not lost:  # since then another connection of it was lost, or a witness has answered
            self.fence(peer)
        elif proven:
            del self.lost[peer]
            self.proofs[lost.witness] += 1
            self._peers.fenced(peer)
            self._answer(peer, proven=True)
        else:
            self._answer(peer, proven=False)
            self._ask_about(lost)
            if self._peers.table.concerns(peer):
                self._peers.redial(peer)

    # -- a manager on the same machine as witness -----------------------------------------------------------------

    def receive(self, peer: Peer, message: Inquiry) -> None:
        """Answer a linked manager's question about a process of this machine, or take its answer to a question."""
        if isinstance(message, AskFate):
            fate = self._machine.look_up(Process(**msgspec.structs.asdict(message), uid=0))
            self._send(peer, TellFate(about=message, fate=fate.value))
        elif message.fate == Fate.GONE.value:
            self._accept_witness(peer, message.about)

    def _ask_about(self, lost: LostPeer) -> None:
        """Ask the linked managers of the lost peer's machine, unless the transport here sees the process itself."""
        question = None if self._machine.process().sees(lost.process) else question_of(lost.process)
        lost.asked.intersection_update(self._peers.remotes)
        for peer, remote in self._peers.remotes.items():
            if question is not None and self._can_witness(remote.identity.process, lost) and self._send(peer, question):
                lost.asked.add(peer)

    def _accept_witness(self, witness: Peer, about: AskFate) -> None:
        """Take a manager's answer that a process of its machine has ended, for each lost peer that stated it."""
        remote = self._peers.remotes.get(witness)
        for peer, lost in list(self.lost.items()):
            settled = lost.witness != PROOFS[0] or peer in self._peers.remotes
            if remote is None or settled or witness not in lost.asked or question_of(lost.process) != about:
                continue
            its = remote.identity.process
            if self._can_witness(its, lost):
                how = "has looked its process up" if its.sees(lost.process) else "runs in a later boot"
                peer_log(logger, peer).info("%s is gone: %s, on the same machine, %s", peer, witness, how)
                self.lost[peer] = lost._replace(witness="machine")
                self.fence(peer)

    def _can_witness(self, its: Process, lost: LostPeer) -> bool:
        """Return True if a linked manager with this process can prove the end of the lost one; see the module."""
        process = lost.process
        if its.sees(process):
            return True
        if not process.outlived_by(its) or its.boot in lost.beside:
            return False
        linked = (remote.identity.process.boot for remote in self._peers.remotes.values())
        return process.boot not in linked and process.machine != self._machine.process().machine

    def _send(self, peer: Peer, message: Inquiry) -> bool:
        return self._peers.send(peer, message, again=True)

    # -- the operator as witness ----------------------------------------------------------------------------------

    def declare_gone(self, where: HostPort | str) -> list[Declared]:
        """Note the operator's statement that all lost peers at a host or an address have ended, and fence them.

        Raises:
            InvalidRequest: no lost peer is there. A linked peer is never fenced.
        """

        def at(peer: Peer) -> bool:
            with contextlib.suppress(ConfigurationError):  # a peer may state any text
                stated = parse_address(peer.address)
                return where in (stated, stated.host)
            return False

        found = [peer for peer in self.lost if at(peer) and peer not in self._peers.remotes]
        if not found and any(map(at, self._peers.remotes)):
            raise InvalidRequest(f"{where} is linked now, and a linked peer is never fenced: end its processes first")
        if not found:
            lost = ", ".join(sorted({str(peer) for peer in self.lost if peer not in self._peers.remotes}))
            raise InvalidRequest(f"no lost peer at {where}; lost peers: {lost or 'none'}")
        declared = []
        for peer in found:
            proven: Future[bool] = Future()
            self._declared.setdefault(peer, []).append(proven)
            waiting = sum(len(room.held_pages) for room in self._peers.table if peer in room.involved())
            declared.append(Declared(peer, waiting, proven))
            peer_log(logger, peer).warning("%s is gone: declared by the operator", peer)
            self.lost[peer] = self.lost[peer]._replace(witness="operator")
            self.fence(peer)
        return declared

    def _answer(self, peer: Peer, *, proven: bool) -> None:
        for waiting in self._declared.pop(peer, ()):
            waiting.set_result(proven)


def question_of(process: Process) -> AskFate | None:
    """Return the question about a process that a peer has stated; None if the stated values are impossible."""
    try:
        return msgspec.convert({**msgspec.structs.asdict(process), "type": "AskFate"}, AskFate)
    except msgspec.ValidationError:
        return None
