"""The decode side of a room: it offers pages, counts the sources' reports, and keeps every page that may be written.

A source may write from the offer until it has said `Done` or `Quiesced`, or until the transport has proven that it
cannot (`Revoked`, `Fenced`). Time never proves it.
"""

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
    """The decode side: offers pages, counts the sources' reports, and lets no page go while one may still write."""

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
        self.bootstrap_addr = bootstrap_addr  # of the directory that knows its sources; for people
        self.sources: frozenset[Peer] = frozenset()  # the ranks that must report
        self.writers: frozenset[Peer] = frozenset()  # of these, who may still write
        self.missing: frozenset[Peer] = frozenset()  # of these, who has not reported all its bytes
        self.idle: frozenset[Peer] = frozenset()  # of these, whose engine has not computed the next chunk yet
        self.offer: asked.OfferPages | None = None
        self.shares: Mapping[Peer, asked.Share] = {}  # never changed: what each source has to do with it
        self.claims: tuple[do.Claim, ...] = ()  # what was reported
        self.aux = b""
        self.transports: tuple[str, ...] = ()  # by what the bytes came, as the sources say it, each way once
        self._peer_identity: KVIdentity | None = None

    @property
    def peer_identity(self) -> KVIdentity | None:
        return self._peer_identity

    def receive(self, peer: Peer, message: Message, now: float) -> bool:
        """Take the word of a source that may still write; of another one only an `Abort`, which answers `Renew`."""
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
        if self.sources:  # all have reported, so that none of them is involved any more
            return ", ".join(sorted(map(str, self.sources)))
        return f"none yet, by the directory at {self.bootstrap_addr}" if self.bootstrap_addr else "none yet"

    def _pages(self) -> tuple[int, ...]:
        return self.offer.pages if self.offer else ()

    def _awaited(self) -> str:
        if self.phase is Phase.OPENED:
            return "the engine to offer pages" if self.sources else "links to its sources"
        if self.phase is Phase.VERIFYING:
            return "its own checksum"
        names = ", ".join(sorted(map(str, self.writers if self.phase in GIVEN_UP else self.missing)))
        if self.phase in GIVEN_UP:
            return f"proof that {names} can write no more: its word, its process's end or `kvroom fence`"
        if self.phase is Phase.OFFERED:
            return f"the first bytes from {names}"
        if self.idle:
            return f"further pages from {', '.join(sorted(map(str, self.idle)))}"
        return f"more bytes from {names}"

    def _resolved(self, what: asked.Resolved, now: float) -> None:
        if self.phase is Phase.RELEASED and not self.sources:  # it ended while its links were coming up
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
        """A source has failed. To one that only answers `Renew` nothing was offered, so nothing has to be proven."""
        if peer not in self.writers:
            if self.phase is not Phase.OPENED or peer not in self.sources:
                return False
            self.sources -= {peer}  # it knows why no offer comes; the others will be told
        self._fail_with(abort.failure, now)
        return True

    def _offer_pages(self, what: asked.OfferPages, now: float) -> None:
        if self.phase in GIVEN_UP:  # ended before the engine knew: its pages were never shown to anybody
            self.outbox.append(do.Revoke(what.grant))
            return
        if self.offer is not None or self.phase is not Phase.OPENED:
            raise LocalRoomError(f"room {self.number}: pages were offered already; one room has one offer")
        self._stated()
        if not 0 <= what.start <= what.stop <= what.length:
            raise LocalRoomError(
                f"room {self.number}: tokens [{what.start}, {what.stop}) are no window of {what.length} tokens"
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
        """Wait on: for bytes that are under way, or as long as for the first ones if an engine still computes."""
        if self.phase in GIVEN_UP:
            return False
        self._fire(Event.PROGRESS)
        self.idle = self.idle | {peer} if idle else self.idle - {peer}
        self._wait(Wait.WAITING if self.idle else Wait.STALL, now)
        self.outbox.append(do.Report())
        return True

    def _done(self, peer: Peer, done: Done, now: float) -> None:
        """One source has reported all its bytes. It has said so, hence it writes no more, whatever else is true."""
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
            self.outbox.append(do.Revoke(self.offer.grant))
            if not self.offer.checksum:
                self._enter_terminal(Event.COMPLETE)
                return
            self._fire(Event.VERIFY)
            self._wait(Wait.STALL, now)
            shares = tuple(self.shares[claim.peer] for claim in self.claims)
            self.outbox += [do.Verify(offer=self.offer, claims=self.claims, shares=shares), do.Report()]

    def _gap(self, offer: asked.OfferPages) -> str | None:
        """What is missing although every source has reported; None: nothing."""
        whole = ((offer.start, offer.stop),)
        teams: dict[str, list[tuple[int, int]]] = {}
        groups: set[tuple[str, str]] = set()
        for claim in self.claims:
            team = self.shares[claim.peer].team
            who = str(claim.peer) if team is None else f"the ranks of team {team}, which split the tokens,"
            teams.setdefault(who, []).extend(claim.spans or whole)
            had = [window.group for window in offer.windows] if claim.windows is None else claim.windows
            if twice := [group for group in had if (who, group) in groups]:
                return f"{who} sent group {twice[0]!r} twice; one rank of a team gives the pages of a group"
            groups.update((who, group) for group in had)
        for who, spans in teams.items():
            if not tiles(spans, offer.start, offer.stop):
                return f"{who} sent tokens {sorted(spans)}, the offer was for [{offer.start}, {offer.stop})"
        if self.nbytes != offer.nbytes:
            return f"the sources sent {self.nbytes} bytes, the offer was for {offer.nbytes}"
        return None

    def _verified(self, what: asked.Verified, now: float) -> None:
        if self.phase is not Phase.VERIFYING:
            return  # given up meanwhile
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
            self.outbox.append(do.Revoke(grant))
            self._enter_terminal(Event.GIVE_UP)
            self._decline(self.sources)
            return
        self._fire(Event.GIVE_UP)
        self._wait(Wait.DRAIN, now)
        # A source that has reported its checksum writes no more, but waits to hear whether it agrees.
        verifies = self.offer is not None and self.offer.checksum
        self._send_aborts(self.sources if self.claims and verifies else self.writers)
        self.outbox += [do.Revoke(grant), do.Report()]
        self._release_if_drained()

    def _decline(self, sources: Iterable[Peer]) -> None:
        """Tell sources that wait for an offer why none will come. A room without a number has none that wait."""
        if self.number is not None:
            assert self.failure is not None  # it was given up
            message = Decline(**self._about(), failure=self.failure)
            self.outbox += [do.Send(peer=source, message=message) for source in sorted(sources)]

    def _send_aborts(self, peers: frozenset[Peer] | set[Peer], *, again: bool = False) -> None:
        assert self.failure is not None  # only a room that was given up aborts
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
