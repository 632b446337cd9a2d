"""The driver: owns the room table, feeds it what happens, and carries out what the rooms want done.

One thread calls it, that of its loop. It has no thread, socket or clock of its own: the loop, the links and the
transport are handed in, so that the same code runs over real ones and over simulated ones. What blocks (connecting and
fencing a transport) goes through `Loop.run_blocking`; what comes back from other threads comes through `Loop.post`.

A peer chose every byte of its identity, of its transport's description and of its offers, and transports, engines and
plans are not asked to know what they raise for all of them. Where such bytes are used here, whatever is raised beyond
the declared errors is that peer's fault (`Peers.blame`): its link ends, with the text, and with the link its rooms.
Nothing of another peer is touched. Only an error that no peer's bytes explain reaches the supervisor, which ends every
room.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, ClassVar, TypeVar

import msgspec

from kvroom.core import effects as do
from kvroom.core import inputs as asked
from kvroom.core.causes import Cause
from kvroom.core.messages import TEXT_CHARS, Message, Offer, Peer
from kvroom.core.phases import Side
from kvroom.core.room import Room
from kvroom.core.table import RoomTable
from kvroom.errors import GrantRevoked, LimitExceeded, LocalRoomError, PlanError
from kvroom.plan import Extents, KVLayout, Planner
from kvroom.transports import Transfer
from kvroom.wire.frames import Inquiry

from . import page_lists
from .causes import cause_of
from .checksum import checksum, unreadable
from .logs import room_log
from .loop import Loop
from .measure import HandOffs
from .peers import Peers
from .remote import Remote

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Driver:
    """See the module. `layout` describes our memory."""

    def __init__(self, loop: Loop, table: RoomTable, layout: KVLayout, peers: Peers) -> None:
        self.loop = loop
        self.table = table
        self.layout = layout
        self.peers = peers
        peers.settle = self._settle
        self._own = Planner(layout, layout)
        self._alarm: tuple[float, Callable[[], None]] | None = None  # when `wake` is called, and how to prevent it
        self._idle_waiters: list[Future[None]] = []
        self.hand_offs = {side: HandOffs() for side in Side}  # what succeeded since the start, by side

    # -- what the engine asks -------------------------------------------------------------------------------------

    def open(self, room: Room, number: int, generation: int | None) -> None:
        """Admit a room. `RoomInUse` or `LimitExceeded` if it cannot be; no room has changed then."""
        self.table.open(room, number, generation, self.loop.now())
        self._settle()

    def feed(self, room: Room, what: asked.Input) -> None:
        """Give a room an input. One that its phase does not allow ends the room with that cause."""
        try:
            self.table.feed(room, what, self.loop.now())
        except LocalRoomError as error:
            self.table.feed(room, asked.GiveUp(cause=cause_of(error), detail=str(error)), self.loop.now())
        self._settle()

    def extents(self, offer: asked.OfferPages) -> Extents:
        """Return the bytes of our memory that this offer opens; any thread may ask. `PlanError` if its pages cannot
        hold its tokens.
        """
        return page_lists.extents(self._own, self.layout, offer)

    def offer(self, room: Room, what: asked.OfferPages, extents: Extents) -> None:
        """Offer a sink's pages: the transport grants exactly these extents, and nothing else."""
        nbytes, grant = int(extents.length.sum()), self.peers.transport.grant(extents)
        self.feed(room, msgspec.structs.replace(what, nbytes=nbytes, grant=grant))

    def resolved(self, room: Room, sources: tuple[Peer, ...], sinks: tuple[int, ...]) -> None:
        """Tell a sink who its sources are, once the transport is connected to all of them; else the room ends.

        `sinks[i]` ranks of this side offer to `sources[i]`.
        """
        for peer in sources:
            remote = self.peers.remotes.get(peer)
            self.peers.try_again(peer, remote)
            if remote is None or remote.error is not None:
                cause, detail = (Cause.LINK_LOST, "the link was lost again") if remote is None else remote.refusal()
                self._decline(room, sources, asked.GiveUp(cause=cause, detail=f"{peer} cannot be a source: {detail}"))
                return
            if remote.handle is None:
                remote.waiting.append(lambda: self.resolved(room, sources, sinks))
                return
        try:
            shares = self.peers.shares(sources, sinks)
        except PlanError as error:
            self._decline(room, sources, asked.GiveUp(cause=cause_of(error), detail=str(error)))
        # A supervisor, see the module. Of several layouts no one is known to be at fault, so no link ends.
        except Exception as error:  # noqa: BLE001
            detail = self.peers.describe_error(sources[0], "the layouts of these sources", error)
            self._decline(room, sources, asked.GiveUp(cause=Cause.INCOMPATIBLE, detail=detail))
        else:
            self.feed(room, asked.Resolved(sources=sources, shares=shares))

    def _decline(self, room: Room, sources: tuple[Peer, ...], why: asked.GiveUp) -> None:
        """End a sink before it has offered anything; those of its sources that are linked hear why, too."""
        self.feed(room, why)
        self.feed(room, asked.Resolved(sources=sources))

    def give_up_all(self, cause: Cause, detail: str) -> None:
        """End and clear every room; what still drains stays until it has."""
        for room in list(self.table):
            self.table.feed(room, asked.GiveUp(cause=cause, detail=detail), self.loop.now())
            self.table.feed(room, asked.Clear(), self.loop.now())
        self._settle()

    # -- what the links say ---------------------------------------------------------------------------------------

    def on_up(self, peer: Peer, payload: bytes) -> None:
        """A link is up: learn what the peer's memory looks like and connect the transport to it."""
        self.peers.link(peer, payload)
        self.table.peer_up(peer, self.loop.now())
        self._settle()
        self.peers.fences.ask_again()  # what could not be proven then may be now: a restart ends the run before it

    def on_lost(self, peer: Peer, detail: str) -> None:
        """A link is down: its rooms end, and the transport breaks with the peer."""
        remote = self.peers.lose(peer, detail)
        self.table.peer_lost(peer, detail, self.loop.now())
        if remote is not None:
            self.peers.retry(remote)  # finds the link lost
        self._settle()
        self.peers.fences.fence(peer)

    def on_message(self, peer: Peer, seq: int, message: Message | Inquiry) -> None:
        """A peer said something about a room, or about a process of its machine."""
        if isinstance(message, Inquiry):
            self.peers.fences.hear(peer, message)
            return
        self.table.receive(peer, seq, message, self.loop.now())
        self._settle()

    def handle_timer(self) -> None:
        """Expire every deadline that is due."""
        if self._alarm is not None:
            self._alarm[1]()
            self._alarm = None
        self.table.expire(self.loop.now())
        self._settle()

    def wait_for_idle(self, waiter: Future[None]) -> None:
        """Set the waiter's result as soon as no room and no early arrival is left."""
        if self._is_idle():
            waiter.set_result(None)
        else:
            self._idle_waiters.append(waiter)

    def forget_waiter(self, waiter: Future[None]) -> None:
        """Let a waiter go that has waited for long enough."""
        if waiter in self._idle_waiters:
            self._idle_waiters.remove(waiter)

    def close(self) -> None:
        """Be woken no more. The loop ends."""
        if self._alarm is not None:
            self._alarm[1]()

    # -- what the rooms want done ---------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Carry out effects until none is left, then see to the alarm."""
        while todo := self.table.take_effects():
            for room, effect in todo:
                self._performs[type(effect)](self, room, effect)
        self._set_alarm(self.table.deadline())

    def _set_alarm(self, at: float | None) -> None:
        """Be woken at this time. An earlier alarm stays: it finds nothing due."""
        if self._alarm is None or (at is not None and at < self._alarm[0]):
            if self._alarm is not None:
                self._alarm[1]()
            self._alarm = None if at is None else (at, self.loop.call_later(at - self.loop.now(), self.handle_timer))
        if at is None and self._idle_waiters and self._is_idle():
            for waiter in self._idle_waiters:
                waiter.set_result(None)
            self._idle_waiters.clear()

    def _is_idle(self) -> bool:
        return len(self.table) == 0 and self.table.deadline() is None

    def _send(self, room: Room | None, effect: do.Send) -> None:
        if isinstance(effect.message, Offer) and effect.message.grant:
            # Let the peer to which it goes use its grant, before it knows of it; others that overhear it cannot.
            remote = self.peers.remotes.get(effect.peer)
            if remote is not None and remote.handle is not None:
                self.peers.transport.bind(effect.message.grant, remote.handle)
        try:
            self.peers.send(effect.peer, effect.message, again=effect.again)
        except LimitExceeded as error:
            if room is not None:
                self._give_up(room, cause_of(error), str(error))

    def _fence(self, room: Room, effect: do.Fence) -> None:  # noqa: ARG002 - one shape for all effects
        self.peers.fences.fence(effect.peer)

    def _revoke(self, room: Room, effect: do.Revoke) -> None:
        if effect.grant and self.peers.transport.revoke(effect.grant):
            self.table.feed(room, asked.Revoked(), self.loop.now())

    def _release(self, room: Room, effect: do.ReleasePages) -> None:
        assert room.listener is not None  # the handle that has made it
        room.listener.release(effect.pages)

    def _quarantine(self, room: Room, effect: do.Quarantine) -> None:
        stay = "room %s: %d pages stay in quarantine until the drain is proven"
        level = logging.DEBUG if effect.again else logging.WARNING
        room_log(logger, room).log(level, stay, room.number, len(effect.pages))

    def _report(self, room: Room, effect: do.Report) -> None:  # noqa: ARG002 - one shape for all effects
        assert room.listener is not None
        room.listener.update(room)

    def _submit(self, room: Room, effect: do.Submit) -> None:
        remote = self.peers.remotes.get(effect.peer)
        self.peers.try_again(effect.peer, remote)
        if remote is None:
            self._broke(room, effect.transfer, Cause.LINK_LOST, "the link was lost")
        elif remote.error is not None:
            cause, detail = remote.refusal()
            self._broke(room, effect.transfer, cause, detail)
        elif remote.handle is None:
            remote.waiting.append(lambda: self._submit(room, effect))
        else:
            self._start_transfer(room, effect, remote, remote.handle)

    def _start_transfer(self, room: Room, effect: do.Submit, remote: Remote, handle: int) -> None:
        how = remote.how[:TEXT_CHARS]
        try:
            planner = remote.planner_of(effect.offer.parts)
            blocks = page_lists.blocks(planner, self.layout, remote.layout, effect)
            transfer = self.peers.transport.submit(handle, blocks, effect.offer.grant)
        except PlanError as error:
            self._broke(room, effect.transfer, cause_of(error), str(error))
            return
        except Exception as error:  # noqa: BLE001 - a supervisor, see the module
            detail = self.peers.blame(effect.peer, remote, "its offer", error)
            self._broke(room, effect.transfer, Cause.TRANSFER, detail)
            return
        if transfer.done():
            self._transferred(room, effect.transfer, transfer, how)
        else:
            transfer.add_done_callback(
                lambda done: self.loop.post(lambda: self._transferred_later(room, effect.transfer, done, how))
            )

    def _transferred(self, room: Room, number: int, transfer: Transfer, how: str) -> None:
        error = transfer.exception()
        if error is None:
            self.table.feed(
                room, asked.Landed(transfer=number, nbytes=transfer.result(), transport=how), self.loop.now()
            )
        else:
            broke = asked.Broke(transfer=number, detail=str(error), revoked=isinstance(error, GrantRevoked))
            self.table.feed(room, broke, self.loop.now())

    def _transferred_later(self, room: Room, number: int, transfer: Transfer, how: str) -> None:
        self._transferred(room, number, transfer, how)
        self._settle()

    def _broke(self, room: Room, number: int, cause: Cause, detail: str) -> None:
        self.table.feed(room, asked.Broke(transfer=number, cause=cause, detail=detail), self.loop.now())

    # -- checksums ------------------------------------------------------------------------------------------------

    def _checksum(self, room: Room, effect: do.Checksum) -> None:
        """The source's: over the whole window at once, because only now all of it is known to be final."""
        peer, offer, detail = effect.peer, effect.offer, unreadable(self.layout)
        remote = self.peers.remotes.get(peer)
        if detail is not None:
            self._give_up(room, Cause.INCOMPATIBLE, detail)
            return
        if remote is None:
            self._give_up(room, Cause.LINK_LOST, "the link was lost before the checksum was computed")
            return
        try:
            held = page_lists.held_by_source(self.layout, offer, effect.chunks, effect.spans)
            ours, theirs = remote.strips_as_source(offer.parts), remote.layout
        except Exception as error:  # noqa: BLE001 - a supervisor, see the module
            self._not_summed(room, peer, remote, error)
            return

        def computed(done: Future[int]) -> None:
            error = done.exception()
            if error is None:
                self.feed(room, asked.Checksummed(value=done.result(), peer=peer))
            else:
                self._not_summed(room, peer, remote, error)
                self._settle()

        self._when_done(self.loop.run_blocking(lambda: checksum(ours, held, self.layout, theirs)), computed)

    def _verify(self, room: Room, effect: do.Verify) -> None:
        """The sink's: one for each source, over the bytes that this source was to write."""
        lost = [claim.peer for claim in effect.claims if claim.peer not in self.peers.remotes]
        if lost:
            self._give_up(room, Cause.LINK_LOST, f"the link to {lost[0]} was lost before the checksums were compared")
            return
        remotes = [self.peers.remotes[claim.peer] for claim in effect.claims]
        peer, remote = effect.claims[0].peer, remotes[0]  # whose numbers were used last

        def compare() -> str | None:
            nonlocal peer, remote
            for claim, share, remote in zip(effect.claims, effect.shares, remotes, strict=True):
                peer = claim.peer
                held = page_lists.held_by_sink(self.layout, effect.offer, claim)
                found = checksum(remote.strips_as_sink(share.parts), held, self.layout, remote.layout)
                if found != claim.checksum:
                    return (
                        f"checksum mismatch: {claim.peer} sent bytes with {claim.checksum:#018x}, "
                        f"here they have {found:#018x}"
                    )
            return None

        def compared(done: Future[str | None]) -> None:
            error = done.exception()
            if error is None:
                self.feed(room, asked.Verified(error=done.result()))
            else:
                self._not_summed(room, peer, remote, error)
                self._settle()

        self._when_done(self.loop.run_blocking(compare), compared)

    def _not_summed(self, room: Room, peer: Peer, remote: Remote, error: BaseException) -> None:
        """End a room whose checksum cannot be computed from what this peer said."""
        if isinstance(error, PlanError):
            self._give_up(room, cause_of(error), str(error))
        else:
            self._give_up(room, Cause.CHECKSUM, self.peers.blame(peer, remote, "what it said of a room", error))

    def _when_done(self, work: Future[T], then: Callable[[Future[T]], None]) -> None:
        work.add_done_callback(lambda done: self.loop.post(lambda: then(done)))

    def _give_up(self, room: Room, cause: Cause, detail: str) -> None:
        self.table.feed(room, asked.GiveUp(cause=cause, detail=detail), self.loop.now())

    # Only `Send` may come without a room: the answer to a message for which there is none.
    _performs: ClassVar[Mapping[type[do.Effect], Callable[[Driver, Any, Any], None]]] = {
        do.Send: _send,
        do.Submit: _submit,
        do.Checksum: _checksum,
        do.Verify: _verify,
        do.Revoke: _revoke,
        do.Fence: _fence,
        do.ReleasePages: _release,
        do.Quarantine: _quarantine,
        do.Report: _report,
    }
