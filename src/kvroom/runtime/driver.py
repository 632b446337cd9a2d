"""The driver: owns the room table, feeds it inputs, and carries out the effects that the rooms return.

Only the loop's thread calls it. It has no thread, socket or clock: loop, links and transport are passed in, so that the
same code runs over real ones and over simulated ones. Calls that block (connecting and fencing a transport) go through
`Loop.run_blocking`, and results from other threads come back through `Loop.post`.

A peer chooses every byte of its identity, of its transport's description and of its offers. Transports, engines and
plans do not declare every exception that such bytes can cause. Where the driver uses them, any exception beyond the
declared errors is therefore attributed to that peer (`Peers.blame`): its link ends with the text of the exception, and
its rooms end with the link. No other peer is affected. Only an exception that no peer's bytes explain reaches the
supervisor of the loop, which ends every room.
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
    """Carries effects of the room table out over links and transport. `layout` describes this side's memory."""

    def __init__(self, loop: Loop, table: RoomTable, layout: KVLayout, peers: Peers) -> None:
        self.loop = loop
        self.table = table
        self.layout = layout
        self.peers = peers
        peers.settle = self._settle
        self._own = Planner(layout, layout)
        self._alarm: tuple[float, Callable[[], None]] | None = None
        """The time of the next `handle_timer`, and the function that cancels it."""
        self._idle_waiters: list[Future[None]] = []
        self.hand_offs = {side: HandOffs() for side in Side}
        """Successful hand-offs since the start, by side."""

    # -- called for the engine ------------------------------------------------------------------------------------

    def open(self, room: Room, number: int, generation: int | None) -> None:
        """Admit a room to the table. Raise `RoomInUse` or `LimitExceeded` if that fails; no room has changed then."""
        self.table.open(room, number, generation, self.loop.now())
        self._settle()

    def feed(self, room: Room, what: asked.Input) -> None:
        """Feed an input to a room. An input that the room's phase does not allow ends the room with `misuse`."""
        try:
            self.table.feed(room, what, self.loop.now())
        except LocalRoomError as error:
            self.table.feed(room, asked.GiveUp(cause=cause_of(error), detail=str(error)), self.loop.now())
        self._settle()

    def extents(self, offer: asked.OfferPages) -> Extents:
        """Return the bytes of this side's memory that an offer opens to writes. May be called from any thread.

        Raises:
            PlanError: the pages are not in the pool or cannot hold the offer's tokens.
        """
        return page_lists.extents(self._own, self.layout, offer)

    def offer(self, room: Room, what: asked.OfferPages, extents: Extents) -> None:
        """Offer a sink's pages, with a grant of the transport for exactly these extents."""
        nbytes, grant = int(extents.length.sum()), self.peers.transport.grant(extents)
        self.feed(room, msgspec.structs.replace(what, nbytes=nbytes, grant=grant))

    def resolved(self, room: Room, sources: tuple[Peer, ...], sinks: tuple[int, ...]) -> None:
        """Give a sink its sources once the transport is connected to all of them. If one cannot be used, end the room.

        `sinks[i]` is the number of ranks of this side that offer to `sources[i]`.
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
        # A supervisor, see the module. The layout at fault is not known if there are several, so no link ends.
        except Exception as error:  # noqa: BLE001
            detail = self.peers.describe_error(sources[0], "the layouts of these sources", error)
            self._decline(room, sources, asked.GiveUp(cause=Cause.INCOMPATIBLE, detail=detail))
        else:
            self.feed(room, asked.Resolved(sources=sources, shares=shares))

    def _decline(self, room: Room, sources: tuple[Peer, ...], why: asked.GiveUp) -> None:
        """End a sink that has offered nothing, then give it its sources, so that the linked ones get the reason."""
        self.feed(room, why)
        self.feed(room, asked.Resolved(sources=sources))

    def give_up_all(self, cause: Cause, detail: str) -> None:
        """End and clear every room. A room that still drains stays in the table until it has."""
        for room in list(self.table):
            self.table.feed(room, asked.GiveUp(cause=cause, detail=detail), self.loop.now())
            self.table.feed(room, asked.Clear(), self.loop.now())
        self._settle()

    # -- called by the links --------------------------------------------------------------------------------------

    def on_up(self, peer: Peer, payload: bytes) -> None:
        """Decode the peer's description, connect the transport to it, and notify the rooms of the link."""
        self.peers.link(peer, payload)
        self.table.peer_up(peer, self.loop.now())
        self._settle()
        self.peers.fences.ask_again()  # the new peer may prove the end of a lost one that ran on its machine

    def on_lost(self, peer: Peer, detail: str) -> None:
        """End the peer's rooms, and ask for proof that it writes no longer."""
        remote = self.peers.lose(peer, detail)
        self.table.peer_lost(peer, detail, self.loop.now())
        if remote is not None:
            # Calls that wait for the transport's connection must run even if it never comes: they find the link lost.
            self.peers.retry(remote)
        self._settle()
        self.peers.fences.fence(peer)

    def on_message(self, peer: Peer, seq: int, message: Message | Inquiry) -> None:
        """Pass a peer's message to the rooms, or an inquiry about a process to the fences."""
        if isinstance(message, Inquiry):
            self.peers.fences.receive(peer, message)
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
        """Set the waiter's result once no room and no early arrival is left."""
        if self._is_idle():
            waiter.set_result(None)
        else:
            self._idle_waiters.append(waiter)

    def forget_waiter(self, waiter: Future[None]) -> None:
        """Remove a waiter whose caller has timed out."""
        if waiter in self._idle_waiters:
            self._idle_waiters.remove(waiter)

    def close(self) -> None:
        """Cancel the timer; the loop ends."""
        if self._alarm is not None:
            self._alarm[1]()

    # -- effects of the rooms -------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Carry out effects until none is left, then set the timer for the table's next deadline."""
        while todo := self.table.take_effects():
            for room, effect in todo:
                self._performs[type(effect)](self, room, effect)
        self._set_alarm(self.table.deadline())

    def _set_alarm(self, at: float | None) -> None:
        """Call `handle_timer` at this time. An earlier alarm is kept: it finds nothing due and sets the next one.

        So a room that is opened and ends within its deadline costs no cancelled timer.
        """
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
            # Bind the grant to this peer before the offer is sent. Afterwards the peer could use it before it is bound.
            # Another peer that obtains the token cannot use it.
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
        assert room.listener is not None  # the handle that created the room
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
        """Compute a source's checksum over its whole window, in a worker thread.

        It cannot be computed chunk by chunk, because a page that one chunk filled in part changes with the next.
        """
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
        """Compute a sink's checksums in a worker thread and compare them: one for each source, over its bytes."""
        lost = [claim.peer for claim in effect.claims if claim.peer not in self.peers.remotes]
        if lost:
            self._give_up(room, Cause.LINK_LOST, f"the link to {lost[0]} was lost before the checksums were compared")
            return
        remotes = [self.peers.remotes[claim.peer] for claim in effect.claims]
        peer, remote = effect.claims[0].peer, remotes[0]  # the peer whose numbers were used last, for `compared`

        def compare() -> str | None:
            nonlocal peer, remote
            for claim, share, remote in zip(effect.claims, effect.shares, remotes, strict=True):
                peer = claim.peer
                held = page_lists.held_by_sink(self.layout, effect.offer, claim)
                found = checksum(remote.strips_as_sink(share.parts), held, self.layout, remote.layout)
                if found != claim.checksum:
                    return (
                        f"checksum mismatch: expected {claim.checksum:#018x}, got {found:#018x} for the bytes from "
                        f"{claim.peer}"
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
        """End a room whose checksum cannot be computed from the numbers that this peer sent."""
        if isinstance(error, PlanError):
            self._give_up(room, cause_of(error), str(error))
        else:
            self._give_up(room, Cause.CHECKSUM, self.peers.blame(peer, remote, "its numbers for a room", error))

    def _when_done(self, work: Future[T], then: Callable[[Future[T]], None]) -> None:
        work.add_done_callback(lambda done: self.loop.post(lambda: then(done)))

    def _give_up(self, room: Room, cause: Cause, detail: str) -> None:
        self.table.feed(room, asked.GiveUp(cause=cause, detail=detail), self.loop.now())

    # Only `Send` may come without a room (None): the answer to a message whose room is not in the table.
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
