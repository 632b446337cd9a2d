"""Bugs to plant in the runtime, the tables and the machines; the simulation must find each of them.

A bug is a function that breaks something through `monkeypatch`. Its docstring describes the behaviour of the broken
code.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec
import pytest

from kvroom.core import effects as do
from kvroom.core import inputs as asked
from kvroom.core.delivery import Delivery
from kvroom.core.messages import Abort, Done, Failure, Offer, Peer, Quiesced, Renew
from kvroom.core.phases import GIVEN_UP, TERMINAL, Event, Phase, Side
from kvroom.core.room import IndexEntry, Room
from kvroom.core.settings import Wait
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.core.table import RoomTable
from kvroom.runtime.connection import Connection
from kvroom.runtime.driver import Driver
from kvroom.runtime.fences import Fences, LostPeer
from kvroom.runtime.peers import Peers
from kvroom.wire.frames import FrameReader

Patch = pytest.MonkeyPatch
Bug = Callable[[Patch], None]


# -- the driver -------------------------------------------------------------------------------------------------------


def every_fence_is_taken_for_proof(patch: Patch) -> None:
    """The transport's answer to a fence is not read."""

    fenced = Fences._fenced

    def trusting(self: Fences, peer: Peer, lost: LostPeer, fencing: Any) -> None:
        proof: Future[bool] = Future()
        proof.set_result(True)
        fenced(self, peer, lost, proof)

    patch.setattr(Fences, "_fenced", trusting)


def a_lost_peer_is_not_fenced(patch: Patch) -> None:
    """The transport is never asked for proof."""
    patch.setattr(Fences, "fence", lambda self, peer: None)


def a_lost_peer_is_not_dialled_again(patch: Patch) -> None:
    """A writer that lives and cannot be fenced is not dialled, so it is never asked to stop."""
    patch.setattr(Peers, "redial", lambda self, peer: None)


def the_handle_of_a_lost_peer_is_dropped(patch: Patch) -> None:
    """A transport that connects after its link was lost is dropped, so that it is never fenced."""
    connected = Peers._connected

    def dropping(self: Peers, peer: Peer, remote: Any, connecting: Any) -> None:
        if remote in self._remotes.values():
            connected(self, peer, remote, connecting)

    patch.setattr(Peers, "_connected", dropping)


def what_waits_for_a_handle_is_forgotten(patch: Patch) -> None:
    """Rooms that wait for the transport are not informed when the link is lost."""
    retry = Peers.retry

    def forgetting(self: Peers, remote: Any) -> None:
        if remote in self._remotes.values():
            retry(self, remote)
        remote.waiting.clear()

    patch.setattr(Peers, "retry", forgetting)


def what_waits_for_a_handle_runs_twice(patch: Patch) -> None:
    """Waiting calls run when the link is lost, and again when the handle arrives."""

    def twice(self: Peers, remote: Any) -> None:
        for retry in list(remote.waiting):
            retry()

    patch.setattr(Peers, "retry", twice)


def a_transfer_that_ends_after_its_room_is_not_reported(patch: Patch) -> None:
    """The end of a transfer is dropped if its room has been given up in between."""
    later = Driver._transferred_later

    def dropping(self: Driver, room: Room, number: int, transfer: Any, how: str) -> None:
        if room.phase not in GIVEN_UP:
            later(self, room, number, transfer, how)

    patch.setattr(Driver, "_transferred_later", dropping)


def the_window_is_counted_from_the_first_page(patch: Patch) -> None:
    """The sink's pages are treated as those of token 0, although it has a prefix."""
    start = Driver._start_transfer

    def shifted(self: Driver, room: Room, effect: do.Submit, remote: Any, handle: int) -> None:
        pages = effect.offer.pages
        if effect.offer.start and len(pages) > 1:
            effect = _replaced(effect, offer=_replaced(effect.offer, pages=(*pages[1:], pages[0])))
        start(self, room, effect, remote, handle)

    patch.setattr(Driver, "_start_transfer", shifted)


def a_later_alarm_is_kept(patch: Patch) -> None:
    """A timer that is set is never moved to an earlier time."""
    set_alarm = Driver._set_alarm
    patch.setattr(Driver, "_set_alarm", lambda self, at: None if self._alarm else set_alarm(self, at))


# -- links ------------------------------------------------------------------------------------------------------------


def silence_is_never_noticed(patch: Patch) -> None:
    """Pings are sent to the peer, but its silence has no consequence."""
    heartbeat = Connection._on_heartbeat

    def patient(self: Connection) -> None:
        self._pinged = False
        heartbeat(self)

    patch.setattr(Connection, "_on_heartbeat", patient)


def a_frame_that_comes_in_two_pieces_is_cut(patch: Patch) -> None:
    """Bytes in the buffer after the last complete frame are dropped."""
    next_frame = FrameReader.next_frame

    def cutting(self: FrameReader) -> bytes | None:
        body = next_frame(self)
        if body is None:
            self._buffer.clear()
        return body

    patch.setattr(FrameReader, "next_frame", cutting)


def a_slow_reader_is_waited_for(patch: Patch) -> None:
    """The queue to a peer that does not read grows without a limit."""

    def on_turn_end(self: Connection) -> None:
        self._turn_end = None
        self._flush()

    patch.setattr(Connection, "_on_turn_end", on_turn_end)


def a_peer_is_known_by_its_address(patch: Patch) -> None:
    """A new run of a worker is treated as the earlier one."""
    patch.setattr(Peer, "__eq__", lambda self, other: isinstance(other, Peer) and self.address == other.address)
    patch.setattr(Peer, "__hash__", lambda self: hash(self.address))


# -- the table --------------------------------------------------------------------------------------------------------


def a_lost_link_ends_no_room(patch: Patch) -> None:
    """The table notes that the peer is gone, and leaves its rooms to their deadlines."""

    def peer_lost(self: RoomTable, peer: Peer, detail: str, now: float) -> None:
        known = self._peers.get(peer)
        if known is not None:
            known.up = False

    patch.setattr(RoomTable, "peer_lost", peer_lost)


def overtaken_messages_are_taken(patch: Patch) -> None:
    """A late copy of an offer opens its pages to a source again."""
    patch.setattr(RoomTable, "overtaken", lambda self, peer, seq: False)


def the_generation_is_not_compared(patch: Patch) -> None:
    """A message about an earlier use of a number is applied to the present one."""
    find = RoomTable._find

    def by_number(self: RoomTable, message: Any) -> Room | None:
        if isinstance(message, Done | Quiesced | Abort):
            for side in (Side.SINK, Side.SOURCE):
                rooms = self._rooms.get((side, message.room))
                if rooms:
                    return rooms[-1]
        return find(self, message)

    patch.setattr(RoomTable, "_find", by_number)


def clear_forgets_the_peer_index(patch: Patch) -> None:
    """A removed room stays in the index of its peer."""
    file = RoomTable._file

    def forgetting(self: RoomTable, room: Room, index_entry: IndexEntry) -> None:
        file(self, room, IndexEntry(room.index_entry.peers, index_entry.timer) if room.gone else index_entry)

    patch.setattr(RoomTable, "_file", forgetting)


def an_ended_room_stays_in_the_table(patch: Patch) -> None:
    """A cleared room is not removed."""
    patch.setattr(Room, "gone", property(lambda self: False))


# -- the machines -----------------------------------------------------------------------------------------------------


def a_sink_releases_when_it_gives_up(patch: Patch) -> None:
    """An abort releases the pages immediately, even if a writer is left."""
    give_up = Sink._start_draining

    def hasty(self: Sink, failure: Failure, now: float) -> None:
        give_up(self, failure, now)
        self.writers = frozenset()
        self._release_if_drained()

    patch.setattr(Sink, "_start_draining", hasty)


def a_sink_takes_a_deadline_for_proof(patch: Patch) -> None:
    """The end of the drain deadline releases the pages."""
    expire = Sink.expire

    def believing(self: Sink, now: float) -> None:
        if self.timer is not None and now >= self.timer.at and self.phase in GIVEN_UP:
            self._enter_terminal(Event.QUIET)
        else:
            expire(self, now)

    patch.setattr(Sink, "expire", believing)


def a_sink_takes_a_lost_link_for_proof(patch: Patch) -> None:
    """A peer whose link is lost counts as unable to write."""
    lost = Sink._peer_lost

    def believing(self: Sink, what: asked.PeerLost, now: float) -> None:
        lost(self, what, now)
        self.writers -= {what.peer}
        self._release_if_drained()

    patch.setitem(Sink.handlers, asked.PeerLost, believing)


def a_sink_ends_with_the_first_report(patch: Patch) -> None:
    """The first report completes the room, although bytes are missing."""

    def progress(self: Sink, peer: Peer, now: float, *, idle: bool) -> bool:
        self._fire(Event.COMPLETE)
        self.timer = None
        self.outbox += [do.ReleasePages(self._pages()), do.Report()]
        return True

    patch.setattr(Sink, "_progress", progress)


def a_sink_keeps_its_grant_after_success(patch: Patch) -> None:
    """The grant outlives the room."""
    take = Room.take_effects

    def keeping(self: Room) -> list[do.Effect]:
        effects = take(self)
        landed = self.phase in (Phase.LANDED, Phase.VERIFYING)
        return [effect for effect in effects if not (landed and isinstance(effect, do.Revoke))]

    patch.setattr(Room, "take_effects", keeping)


def a_sink_does_not_ask_twice(patch: Patch) -> None:
    """An abort or an answer that is lost is never sent again."""
    patch.setattr(Sink, "_ask_again", lambda self: None)


def a_sink_renews_once(patch: Patch) -> None:
    """The sink renews once, and then no longer."""
    expire = Sink.expire

    def tired(self: Sink, now: float) -> None:
        expire(self, now)
        if self.renewal is not None and self.renewal.wait is Wait.RENEW:
            self.renewal = None

    patch.setattr(Sink, "expire", tired)


def a_source_does_not_wait_for_a_sink_that_renews(patch: Patch) -> None:
    """A renewal is accepted, but the deadline stays where it was."""

    def deaf(self: Source, peer: Peer, message: Renew, now: float) -> None:
        """Ignore the renewal."""

    patch.setitem(Source.hears, Renew, Source.hears[Renew]._replace(take=deaf))


def an_offer_is_not_reported(patch: Patch) -> None:
    """A source takes or answers a sink's offer, and its engine is not informed."""
    take = Source._take_offer

    def silent(self: Source, peer: Peer, offer: Offer, now: float) -> bool:
        before = len(self.outbox)
        taken = take(self, peer, offer, now)
        self.outbox[before:] = [effect for effect in self.outbox[before:] if not isinstance(effect, do.Report)]
        return taken

    patch.setitem(Source.hears, Offer, Source.hears[Offer]._replace(take=silent))


def a_sink_finds_every_checksum_right(patch: Patch) -> None:
    """Checksums are computed, and the comparison is ignored."""
    verified = Sink._verified

    def trusting(self: Sink, what: asked.Verified, now: float) -> None:
        verified(self, asked.Verified(error=None), now)

    patch.setitem(Sink.handlers, asked.Verified, trusting)


def a_source_releases_what_is_still_read(patch: Patch) -> None:
    """The source's pages are released while a transfer reads them."""

    def hasty(self: Source, delivery: Delivery) -> None:
        if self.phase in (Phase.DRAINING, Phase.QUARANTINED):
            self._enter_terminal(Event.QUIET)
            self._send_quiesced(delivery)

    patch.setattr(Source, "_quiet", hasty)


def a_source_says_quiet_while_it_writes(patch: Patch) -> None:
    """An abort is answered immediately, as if no transfer were in flight."""
    receive = Source.receive

    def hasty(self: Source, peer: Peer, message: Any, now: float) -> bool:
        if isinstance(message, Abort) and self._delivery(peer) is not None and self.phase not in TERMINAL:
            self.outbox.append(
                do.Send(
                    peer=peer,
                    message=Quiesced(room=message.room, generation=message.generation, failure=message.failure),
                )
            )
        return receive(self, peer, message, now)

    patch.setattr(Source, "receive", hasty)


def pages_are_released_twice(patch: Patch) -> None:
    """The end of a room releases its pages twice."""
    finish = Room._enter_terminal

    def twice(self: Room, event: Event) -> None:
        finish(self, event)
        self.outbox.append(do.ReleasePages(self._pages()))

    patch.setattr(Room, "_enter_terminal", twice)


def a_failure_has_no_cause(patch: Patch) -> None:
    """A room fails without a reason."""
    end = Room._fail_with
    patch.setattr(Room, "_fail_with", lambda self, failure, now: end(self, _replaced(failure, detail=""), now))


def an_abort_is_told_in_other_words(patch: Patch) -> None:
    """A side that receives a failure reports a cause of its own."""
    end = Room._fail_with

    def reworded(self: Room, failure: Failure, now: float) -> None:
        end(self, failure if failure.side == self.side else _replaced(failure, detail="the peer gave up"), now)

    patch.setattr(Room, "_fail_with", reworded)


def a_waiting_room_has_no_deadline(patch: Patch) -> None:
    """A room that waits for the other side has no deadline."""
    wait = Room._wait

    def endless(self: Room, kind: Wait, now: float) -> None:
        if kind is not Wait.WAITING:
            wait(self, kind, now)
        else:
            self.timer = None

    patch.setattr(Room, "_wait", endless)


def _replaced(struct: Any, **fields: Any) -> Any:
    return msgspec.structs.replace(struct, **fields)


BUGS: list[Bug] = [
    every_fence_is_taken_for_proof,
    a_lost_peer_is_not_fenced,
    a_lost_peer_is_not_dialled_again,
    the_handle_of_a_lost_peer_is_dropped,
    what_waits_for_a_handle_is_forgotten,
    what_waits_for_a_handle_runs_twice,
    a_transfer_that_ends_after_its_room_is_not_reported,
    the_window_is_counted_from_the_first_page,
    a_later_alarm_is_kept,
    silence_is_never_noticed,
    a_frame_that_comes_in_two_pieces_is_cut,
    a_slow_reader_is_waited_for,
    a_peer_is_known_by_its_address,
    a_lost_link_ends_no_room,
    overtaken_messages_are_taken,
    the_generation_is_not_compared,
    clear_forgets_the_peer_index,
    an_ended_room_stays_in_the_table,
    a_sink_releases_when_it_gives_up,
    a_sink_takes_a_deadline_for_proof,
    a_sink_takes_a_lost_link_for_proof,
    a_sink_ends_with_the_first_report,
    a_sink_keeps_its_grant_after_success,
    a_sink_does_not_ask_twice,
    a_sink_renews_once,
    a_source_does_not_wait_for_a_sink_that_renews,
    an_offer_is_not_reported,
    a_sink_finds_every_checksum_right,
    a_source_releases_what_is_still_read,
    a_source_says_quiet_while_it_writes,
    pages_are_released_twice,
    a_failure_has_no_cause,
    an_abort_is_told_in_other_words,
    a_waiting_room_has_no_deadline,
]
