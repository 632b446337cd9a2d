"""The decode side of a room: it offers pages, counts the sources' reports, and holds the pages until they are drained.

A source may write from the offer until it has sent `Done` or `Quiesced`, or until the transport has proven that it
cannot write (`Revoked`, `Fenced`). A timeout never proves this.
"""

# Theory of operation
#
# `sources` is fixed when the links are up. `writers` starts as all sources when the offer is made and only shrinks: by
# `Done` or `Quiesced` from that source, by `Fenced` for that source, or by `Revoked`, which covers all of them. Pages
# are released only when `writers` is empty. Below, A and B are sources and S is the sink. Names in CamelCase without
# quotes are mutants of tests/core/mutants.py, names in snake_case are bugs of tests/runtime/planted.py or tests.
#
# 1. A timeout proves nothing. S offers, A submits a transfer, S gives up, and `drain_s` runs out while A's bytes are
#    still in the network. If S released here, the engine would give the pages to another request, and A's bytes would
#    land in that request's KV cache. So `expire` only quarantines. ReleasesOnATimeout,
#    test_a_timeout_quarantines_pages_and_only_proof_releases_them. For the same reason `Clear` does not release while
#    A writes: ReleasesOnClear.
# 2. A lost link proves nothing. A submits, and the control link breaks while the transfer continues on another
#    connection or by RDMA. S asks for a fence and waits. TakesALostLinkForProof, a_sink_takes_a_lost_link_for_proof.
# 3. A proof is about one peer. A writes, B dies and is fenced. If S took B's fence for both, A's bytes would land in
#    released pages. TakesAnyFence.
# 4. An `Abort` from a source proves nothing. A's engine clears the request while a transfer is in flight; A sends
#    `Abort` immediately and `Quiesced` when the transfer has ended. TakesAnAbortForQuiet.
# 5. Success needs every source once. B has not begun when A reports `Done`; a sink that counted reports, or that was
#    shown A's `Done` twice, would succeed without B's bytes. So reports are sets of peers, and `_gap` compares spans
#    and bytes with the offer. IsDoneAfterTheFirstRank, CountsADoneTwice, test_success_needs_every_source_once,
#    test_a_count_that_differs_is_a_failure.
# 6. With checksums, success waits for `Verified`. A's report arrives, and a byte in S's pages differs from A's:
#    the engine would decode from a corrupt cache. IgnoresTheFault. A sink that then fails also aborts the sources that
#    have reported: they wait for `ChecksumsAgree`, and would otherwise wait until `stall_s` runs out.
#    test_a_checksum_that_differs_is_told_to_every_source_that_waits_for_it.
# 7. The grant ends before the pages are read or released. If S kept the grant after success, a peer that still holds
#    the token could write into pages that the engine has given to another request.
#    a_sink_keeps_its_grant_after_success.
#    An engine that offers pages after the room has failed gets only a `Revoke`:
#    test_pages_that_come_after_the_room_has_ended_were_never_shown_and_give_back_their_grant.
# 8. A room that gave up never moves back. S aborts, and a `Progress` that A sent before arrives afterwards: the engine
#    would see a failed room receive again. IsRevivedByProgress.
# 9. Every wait has a deadline. A reports one chunk and falls silent: WaitsForEver. The deadline is `stall_s` while
#    bytes move, and `waiting_s` while A is idle, because A's engine may need longer than `stall_s` for its next chunk.
# 10. A renewal moves no deadline of S. S has links and its engine never offers pages: a sink that restarted its own
#     wait with each `Renew` would never end (LivesByItsOwnRenewals). After the end no renewal is left, or the table
#     would keep a timer for a room that is gone (RenewsAfterItsEnd). Before the offer, S accepts only `Abort`: A's room
#     has timed out, S sends `Renew`, and A answers with its cause. A sink that ignored this answer would wait for
#     `waiting_s` although it was informed (IsDeafToTheAnswer).
# 11. An abort is repeated until it is answered. The link breaks, and with it the `Abort` or the `Quiesced` is lost: the
#     pages would stay in quarantine after the link is back. So `_ask_again` runs at each `drain_s`, and `PeerUp` sends
#     the abort again. NeverAsksAgain, a_sink_does_not_ask_twice, test_an_overdue_drain_is_asked_for_again_and_again.
# 12. A room that ends before its offer needs no drain, because no peer has seen its pages. It sends `Decline`, also to
#     sources whose links come up later; a source that did not get it would wait until `bootstrap_s`.
#     test_a_sink_that_ends_before_its_links_are_up_tells_the_source_when_they_are.

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvroom.errors import LocalRoomError

from . import effects as do
from . import inputs as asked
from .causes import Cause
from .delivery import tiles
from .identity import KVIdentity, mismatch
from .messages import Abort, ChecksumsAgree, Decline, Done, Failure, Message, Offer, Peer, Progress, Quiesced, Renew
from .phases import GIVEN_UP, SINK, TERMINAL, Event, KVPoll, Phase, Side
from .room import Hearing, Room, RoomListener, Timer
from .settings import Timeouts, Wait


class Sink(Room):
    """The decode side: offers pages, counts the sources' reports, and releases no page while a source may write it."""

    side = Side.SINK
    table = SINK

    def __init__(
        self,
        timeouts: Timeouts,
        owner: RoomListener | None = None,
        identity: KVIdentity | None = None,
        bootstrap_addr: str = "",
    ) -> None:
        super().__init__(timeouts, owner, identity)
        self.bootstrap_addr = bootstrap_addr  # of the directory that lists its sources; shown in failures only
        self.sources: frozenset[Peer] = frozenset()  # the prefill ranks that must report
        self.writers: frozenset[Peer] = frozenset()  # of `sources`: those that may still write
        self.missing: frozenset[Peer] = frozenset()  # of `sources`: those that have not reported `Done`
        self.idle: frozenset[Peer] = frozenset()  # of `missing`: their engine has not computed the next chunk
        self.offer: asked.OfferPages | None = None
        self.shares: Mapping[Peer, asked.Share] = {}  # the part of each source; replaced, never changed in place
        self.claims: tuple[do.Claim, ...] = ()  # the reports of `Done`, in order of arrival
        self.aux = b""
        self.transports: tuple[str, ...] = ()  # the transports that the sources name, without repeats
        self._peer_identity: KVIdentity | None = None

    @property
    def peer_identity(self) -> KVIdentity | None:
        return self._peer_identity

    def receive(self, peer: Peer, message: Message, now: float) -> bool:
        """Take any message from a source that may still write; from other peers only `Abort`, which answers `Renew`."""
        if peer not in self.writers and type(message) is not Abort:
            return False
        return super().receive(peer, message, now)

    def expire(self, now: float) -> None:
        super().expire(now)
        if self.renewal is not None and now >= self.renewal.at:
            self.outbox += [
                do.Send(peer=source, message=Renew(**self._about()), again=True) for source in sorted(self.sources)
            ]
            self._renew_in(Wait.RENEW, now)

    def _renew_in(self, wait: Wait, now: float) -> None:
        self.renewal = Timer(wait, now + self.timeouts.of(wait))

    def involved(self) -> frozenset[Peer]:
        if self.phase in TERMINAL:
            return frozenset()
        return self.sources if self.phase is Phase.OPENED else self.writers

    def _status(self) -> KVPoll:
        if self.phase in (Phase.RECEIVING, Phase.VERIFYING):
            return KVPoll.Transferring
        linked = self.sources or self.phase is Phase.OFFERED
        return KVPoll.WaitingForInput if linked else KVPoll.Bootstrapping

    def _other_side(self) -> str:
        if self.sources:  # all have reported, so no source is involved
            return ", ".join(sorted(map(str, self.sources)))
        return f"none yet, from the directory at {self.bootstrap_addr}" if self.bootstrap_addr else "none yet"

    def _pages(self) -> tuple[int, ...]:
        return self.offer.pages if self.offer else ()

    def _awaited(self) -> str:
        if self.phase is Phase.OPENED:
            return "the engine to offer pages" if self.sources else "links to its sources"
        if self.phase is Phase.VERIFYING:
            return "its own checksum"
        names = ", ".join(sorted(map(str, self.writers if self.phase in GIVEN_UP else self.missing)))
        if self.phase in GIVEN_UP:
            return f"proof that {names} can no longer write: its message, the end of its process, or `kvroom fence`"
        if self.phase is Phase.OFFERED:
            return f"the first bytes from {names}"
        if self.idle:
            return f"further pages from {', '.join(sorted(map(str, self.idle)))}"
        return f"more bytes from {names}"

    def _resolved(self, what: asked.Resolved, now: float) -> None:
        if self.phase is Phase.RELEASED and not self.sources:  # the room ended while its links were coming up
            self._decline(what.sources)
            return
        if self.phase is not Phase.OPENED or self.sources:
            return
        if not what.sources:
            raise LocalRoomError(f"room {self.number}: a sink needs at least one source")
        self.sources = frozenset(what.sources)
        plain = what.shares or (asked.Share(),) * len(what.sources)
        self.shares = dict(zip(what.sources, plain, strict=True))
        self._wait(Wait.WAITING, now)
        self._renew_in(Wait.OFFER, now)
        self.outbox.append(do.Report())
        self._make_offer(now)

    def _aborted(self, peer: Peer, abort: Abort, now: float) -> bool:
        """Fail with a source's cause. Before the offer, `Abort` answers a `Renew`, and there is nothing to drain."""
        if peer not in self.writers:
            if self.phase is not Phase.OPENED or peer not in self.sources:
                return False
            self.sources -= {peer}  # it needs no `Decline`: the cause is its own
        self._fail_with(abort.failure, now)
        return True

    def _offer_pages(self, what: asked.OfferPages, now: float) -> None:
        if self.phase in GIVEN_UP:  # the engine has not polled since the room failed; no peer has seen these pages
            self.outbox.append(do.Revoke(what.grant))
            return
        if self.offer is not None or self.phase is not Phase.OPENED:
            raise LocalRoomError(f"room {self.number}: pages were offered already, and a room has one offer")
        self._stated()
        if not 0 <= what.start <= what.stop <= what.length:
            raise LocalRoomError(
                f"room {self.number}: invalid window: tokens [{what.start}, {what.stop}) of {what.length} tokens"
            )
        self.offer = what
        self._make_offer(now)

    def _make_offer(self, now: float) -> None:
        offer = self.offer
        if offer is None or not self.sources:
            return
        self._fire(Event.OFFER)
        self.renewal = None
        self.writers = self.missing = self.sources
        for source in sorted(self.sources):
            message = Offer(
                **self._about(),
                **offer.fields(),
                identity=self._stated(),
                sinks=self.shares[source].sinks,
                parts=self.shares[source].parts,
            )
            self.outbox.append(do.Send(peer=source, message=message))
        self.outbox.append(do.Report())
        self._wait(Wait.WAITING, now)

    def _progressed(self, peer: Peer, what: Progress, now: float) -> bool:
        return self._progress(peer, now, idle=what.idle)

    def _progress(self, peer: Peer, now: float, *, idle: bool) -> bool:
        """Restart the wait: `stall_s` while bytes are in flight, `waiting_s` while an engine still computes a chunk."""
        if self.phase in GIVEN_UP:
            return False
        self._fire(Event.PROGRESS)
        # With several sources the slowest engine counts: one that computes must not be timed out by `stall_s`.
        self.idle = self.idle | {peer} if idle else self.idle - {peer}
        self._wait(Wait.WAITING if self.idle else Wait.STALL, now)
        self.outbox.append(do.Report())
        return True

    def _done(self, peer: Peer, done: Done, now: float) -> None:
        """Count one source's report. It writes no longer, even if the report is wrong and the room fails."""
        self.writers -= {peer}
        if self.phase in GIVEN_UP:
            self._release_if_drained()
            return
        assert self.offer is not None  # a room with writers has made its offer
        self.missing -= {peer}
        self.nbytes += done.nbytes
        self.took_s = max(self.took_s, done.took_s)
        self.aux = self.aux or done.aux
        if done.transport and done.transport not in self.transports:
            self.transports += (done.transport,)
        self.claims += (do.Claim(peer=peer, checksum=done.checksum, spans=done.spans, windows=done.windows),)
        self._peer_identity = self._peer_identity or done.identity
        if (error := mismatch(done.identity, self._stated())) is not None:
            self._fail_locally(Cause.IDENTITY, error, now, by=peer)
        elif done.tokens != self.offer.length:
            sent = f"{peer} sent tokens up to {done.tokens}, the offer was for {self.offer.length}"
            self._fail_locally(Cause.LENGTH, sent, now, by=peer)
        elif self.missing:
            self._progress(peer, now, idle=False)
        elif (error := self._gap(self.offer)) is not None:
            self._fail_locally(Cause.LENGTH, error, now)
        else:
            # Before the pages are released or read for a checksum: afterwards no token may permit a write into them.
            self.outbox.append(do.Revoke(self.offer.grant))
            if not self.offer.checksum:
                self._enter_terminal(Event.COMPLETE)
                return
            self._fire(Event.VERIFY)
            self._wait(Wait.STALL, now)
            shares = tuple(self.shares[claim.peer] for claim in self.claims)
            self.outbox += [do.Verify(offer=self.offer, claims=self.claims, shares=shares), do.Report()]

    def _gap(self, offer: asked.OfferPages) -> str | None:
        """Return a sentence on what the reports of all sources leave out or repeat, or None if they fill the offer."""
        whole = ((offer.start, offer.stop),)
        teams: dict[str, list[tuple[int, int]]] = {}
        groups: set[tuple[str, str]] = set()
        for claim in self.claims:
            team = self.shares[claim.peer].team
            who = str(claim.peer) if team is None else f"the ranks of team {team}, which split the tokens,"
            teams.setdefault(who, []).extend(claim.spans or whole)
            had = [window.group for window in offer.windows] if claim.windows is None else claim.windows
            if twice := [group for group in had if (who, group) in groups]:
                return f"{who} sent group {twice[0]!r} twice; only one rank of a team may send the pages of a group"
            groups.update((who, group) for group in had)
        for who, spans in teams.items():
            if not tiles(spans, offer.start, offer.stop):
                return f"{who} sent tokens {sorted(spans)}, the offer was for [{offer.start}, {offer.stop})"
        if self.nbytes != offer.nbytes:
            return f"the sources sent {self.nbytes} bytes, the offer was for {offer.nbytes}"
        return None

    def _verified(self, what: asked.Verified, now: float) -> None:
        if self.phase is not Phase.VERIFYING:
            return  # the room failed while the checksum was computed
        if what.error is not None:
            self._fail_locally(Cause.CHECKSUM, what.error, now)
            return
        agree = ChecksumsAgree(**self._about())
        self.outbox += [do.Send(peer=source, message=agree) for source in sorted(self.sources)]
        self._enter_terminal(Event.COMPLETE)

    def _quiesced(self, peer: Peer, what: Quiesced, now: float) -> None:
        self.writers -= {peer}
        if what.failure is not None:
            self._fail_with(what.failure, now)
        self._fail_locally(Cause.ABORTED, f"{peer} stopped before it had sent everything", now, by=peer)
        self._release_if_drained()

    def _peer_up(self, what: asked.PeerUp, now: float) -> None:  # noqa: ARG002 - one shape for every handler
        # The abort, or the answer to it, may have been lost with the link.
        if self.phase in GIVEN_UP and what.peer in self.writers:
            self._send_aborts({what.peer}, again=True)

    def _peer_lost(self, what: asked.PeerLost, now: float) -> None:
        if what.peer not in self.involved():
            return
        if what.peer in self.writers:
            self.outbox.append(do.Fence(what.peer))
        self._fail_locally(Cause.LINK_LOST, f"the link to {what.peer} was lost: {what.detail}", now)

    def _fenced(self, what: asked.Fenced, now: float) -> None:
        if self.phase in GIVEN_UP:
            self.writers -= {what.peer}
            self._release_if_drained()
        elif what.peer in self.missing:
            self.writers -= {what.peer}
            cut_off = f"{what.peer} was cut off before it had sent everything"
            self._fail_locally(Cause.LINK_LOST, cut_off, now, by=what.peer)

    def _revoked(self, what: asked.Revoked, now: float) -> None:  # noqa: ARG002 - one shape for every handler
        if self.phase in GIVEN_UP:
            self.writers = frozenset()
            self._release_if_drained()

    def _start_draining(self, failure: Failure, now: float) -> None:  # noqa: ARG002 - the base has noted the failure
        grant = self.offer.grant if self.offer else b""
        if self.phase in (Phase.NEW, Phase.OPENED):
            # The engine may have given pages before the links were up: their grant exists, though no peer has it.
            self.outbox.append(do.Revoke(grant))
            self._enter_terminal(Event.GIVE_UP)
            self._decline(self.sources)
            return
        self._fire(Event.GIVE_UP)
        self._wait(Wait.DRAIN, now)
        # A source that has reported its checksum no longer writes, but it waits for `ChecksumsAgree`.
        verifies = self.offer is not None and self.offer.checksum
        self._send_aborts(self.sources if self.claims and verifies else self.writers)
        self.outbox += [do.Revoke(grant), do.Report()]
        self._release_if_drained()

    def _decline(self, sources: Iterable[Peer]) -> None:
        """Tell sources that wait for an offer why none will come. A room without a number has no such source."""
        if self.number is not None:
            assert self.failure is not None  # set before a room gives up
            message = Decline(**self._about(), failure=self.failure)
            self.outbox += [do.Send(peer=source, message=message) for source in sorted(sources)]

    def _send_aborts(self, peers: frozenset[Peer] | set[Peer], *, again: bool = False) -> None:
        assert self.failure is not None  # only a room that gave up aborts
        message = Abort(**self._about(), failure=self.failure)
        self.outbox += [do.Send(peer=peer, message=message, again=again) for peer in sorted(peers)]

    def _release_if_drained(self) -> None:
        if not self.writers and self.phase in (Phase.DRAINING, Phase.QUARANTINED):
            self._enter_terminal(Event.QUIET)

    def _ask_again(self) -> None:
        self._send_aborts(self.writers, again=True)
        self.outbox += [do.Fence(peer) for peer in sorted(self.writers)]

    handlers = {
        **Room.common_handlers,
        asked.Resolved: _resolved,
        asked.OfferPages: _offer_pages,
        asked.Verified: _verified,
        asked.PeerUp: _peer_up,
        asked.PeerLost: _peer_lost,
        asked.Fenced: _fenced,
        asked.Revoked: _revoked,
    }
    hears = {
        Progress: Hearing(_progressed),
        Done: Hearing(_done),
        Abort: Hearing(_aborted),
        Quiesced: Hearing(_quiesced),
    }
