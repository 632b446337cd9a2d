"""The linked peers of a driver, the layouts of their memory, and the transport's connections to them.

A peer chooses every byte of its identity and of its transport's description. Any exception that these bytes cause,
beyond the declared errors, is attributed to that peer (`blame`): its link ends with the text of the exception, and its
rooms end with the link.

`Peers` has no access to single rooms. It informs the table of proofs (`fenced`), and `settle`, which the driver sets,
carries out the effects. All methods belong to the loop's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import msgspec

from kvroom.core import inputs as asked
from kvroom.core.causes import Cause
from kvroom.core.messages import Message, Peer, fitting
from kvroom.core.table import RoomTable
from kvroom.errors import KVRoomError, PlanError, RemoteProtocolError, TransportError
from kvroom.listening.repeats import Repeats
from kvroom.plan import KVLayout, Planner
from kvroom.transports import Transport
from kvroom.transports.kit import claims
from kvroom.wire.frames import UNDECODABLE, Inquiry

from .fences import Fences
from .logs import peer_log
from .loop import Loop
from .measure import LinkView
from .remote import PeerProfile, Remote, identities, shares_of
from .surroundings import LocalMachine, Messenger

logger = logging.getLogger(__name__)
CONNECT_AGAIN_S = 1.0
"""Pause after the transport failed to connect to a linked peer. The first room that needs it afterwards retries."""


class Peers:
    """The peers of one driver. `layout` describes this side's memory, which is registered with `transport`."""

    def __init__(
        self, loop: Loop, table: RoomTable, layout: KVLayout, *, transport: Transport, machine: LocalMachine
    ) -> None:
        self.table = table
        self.transport = transport
        self.links: Messenger | None = None
        """The links. Set before the first link can be up."""
        self.settle: Callable[[], None] = lambda: None
        """Carries out the effects of rooms that were fed here. Set by the driver."""
        self._loop, self._layout, self._machine = loop, layout, machine
        self._remotes: dict[Peer, Remote] = {}
        """The linked peers."""
        self.fences = Fences(self, loop, machine)
        self.links_lost = 0
        """Links that were up and ended, since the start."""
        self._log = Repeats(logger)  # a peer can come and go as often as it likes, so its records are limited

    # -- called by the links, through the driver ------------------------------------------------------------------

    def link(self, peer: Peer, payload: bytes) -> None:
        """Decode a newly linked peer's `PeerProfile`, and connect the transport to the peer.

        Raises:
            RemoteProtocolError: the profile is malformed. A well-formed one that does not fit this side (another
                transport, another layout) raises nothing: the peer stays linked, and its rooms fail with the reason.
        """
        try:
            identity = identities.decode(payload)
            # The planner for writing into the peer's memory.
            planner: Planner | None = None
            detail: str | None = None
            if identity.transport == self.transport.name:
                try:
                    planner = Planner(self._layout, identity.layout)
                except PlanError as error:
                    detail = str(error)
            else:
                detail = (
                    f"this side moves blocks by {self.transport.name!r} and {peer} by {identity.transport!r}; "
                    f"start both with the same --transport"
                )
            remote = Remote(self._layout, identity, planner, detail)
        except (KVRoomError, *UNDECODABLE) as error:
            raise RemoteProtocolError(f"{peer} sent an invalid description of itself: {error}") from None
        except Exception as error:  # noqa: BLE001 - a supervisor, see the module
            raise RemoteProtocolError(self.describe_error(peer, "its description of itself", error)) from None
        assert self.links is not None  # one is up
        remote.host = self.links.host_of(peer)
        self._remotes[peer] = remote
        if self.fences.relinked(peer):
            self._connect(peer, remote)

    def lose(self, peer: Peer, detail: str) -> Remote | None:
        """Forget a peer whose link was lost, and return its `Remote`. The caller runs its waiting calls by `retry`."""
        self.links_lost += 1
        peer_log(self._log, peer).info("the link to %s is lost: %s", peer, detail)
        remote = self._remotes.pop(peer, None)
        if remote is not None and remote.handle is not None:
            self.fences.lose(peer, remote, remote.handle)
        return remote

    def send(self, peer: Peer, message: Message | Inquiry, *, again: bool = False) -> bool:
        """Send over the link, as `Messenger.send` does."""
        assert self.links is not None  # this peer is or was linked
        return self.links.send(peer, message, again=again)

    # -- descriptions and plans -----------------------------------------------------------------------------------

    @property
    def remotes(self) -> Mapping[Peer, Remote]:
        """The linked peers."""
        return self._remotes

    def describe(self, incarnation: int) -> bytes:
        """Return the encoded `PeerProfile` of this run: the payload of `on_up` at the peers."""
        described = claims.state(self.transport, claims.run_owner(incarnation))
        return msgspec.msgpack.encode(
            PeerProfile(self._layout, self.transport.name, described, self._machine.process())
        )

    def how(self, peer: Peer) -> str:
        """Return one sentence for operators: the transport that moves bytes to and from this peer, and why."""
        remote = self._remotes.get(peer)
        return "not connected" if remote is None else remote.how

    def links_now(self) -> tuple[LinkView, ...]:
        """Return the linked peers, and the lost ones that a room still waits for; one entry for each address."""
        lost = {str(peer): LinkView(str(peer), "", up=False) for peer in self.fences.lost if self.table.concerns(peer)}
        linked = {str(peer): LinkView(str(peer), remote.transport, up=True) for peer, remote in self._remotes.items()}
        return tuple({**lost, **linked}.values())

    def shares(self, sources: tuple[Peer, ...], sinks: tuple[int, ...]) -> tuple[asked.Share, ...]:
        """Return what each source writes, so that together they fill this side's pages. `PlanError` if they cannot.

        The result is kept on the first source's `Remote`, and so for as long as that link lasts.
        """
        remotes = [self._remotes[peer] for peer in sources]
        found = remotes[0].shares.get(sources)
        if found is None:
            found = remotes[0].shares[sources] = shares_of(remotes, sinks, self._layout)
        return found

    # -- the transport's connection -------------------------------------------------------------------------------

    def _connect(self, peer: Peer, remote: Remote) -> None:
        if remote.error is not None:
            no_rooms = "%s is linked, but no room can be handed over: %s"
            peer_log(self._log, peer).warning(no_rooms, peer, remote.error)
            return
        # The claim must be signed for the run that the link has proven: another peer's description is refused. In a
        # worker thread, because engines may block.
        claim, owner = remote.identity.description, claims.run_owner(peer.incarnation)
        connecting = self._loop.run_blocking(
            lambda: self.transport.connect(claims.read(claim, self.transport.name, owner))
        )
        connecting.add_done_callback(lambda done: self._loop.post(lambda: self._connected(peer, remote, done)))

    def try_again(self, peer: Peer, remote: Remote | None) -> None:
        """Connect the transport again if that failed `CONNECT_AGAIN_S` ago for a reason that may pass.

        A process that was out of file descriptors for a moment would otherwise fail all later rooms with this peer.
        """
        if remote is not None and remote.again_s is not None and self._loop.now() >= remote.again_s:
            remote.error = remote.again_s = None
            self._connect(peer, remote)

    def _connected(self, peer: Peer, remote: Remote, connecting: Future[int]) -> None:
        error = connecting.exception() or self._reached(peer, remote, connecting.result())
        if isinstance(error, TransportError) and not isinstance(error, RemoteProtocolError):
            remote.error, remote.cause = str(error), Cause.TRANSFER
            remote.again_s = self._loop.now() + CONNECT_AGAIN_S
            peer_log(self._log, peer).warning("the transport cannot connect to %s: %s", peer, error)
        elif error is not None:
            remote.cause = Cause.TRANSFER
            remote.error = self.blame(peer, remote, "how its transport is reached", error)
        self.retry(remote)
        self.settle()

    def _reached(self, peer: Peer, remote: Remote, handle: int) -> Exception | None:
        """Take the transport's handle of a peer, or return the error that forbids it.

        A handle that another peer has is refused: whichever of the two links ended first would break the other's too.
        """
        other = next((who for who, one in self._remotes.items() if one.handle == handle and who != peer), None)
        if other is not None:
            return RemoteProtocolError(f"it describes itself as {other}, which is linked")
        if self._remotes.get(peer) is not remote:  # lost while it was connecting
            self.fences.lose(peer, remote, handle)
            self.fences.fence(peer)
            return None
        try:
            remote.how, remote.transport = self.transport.explain(handle), self.transport.transport_for(handle)
        except Exception as error:  # noqa: BLE001 - a supervisor, see the module
            return error
        self.fences.connected(peer)
        remote.handle = handle
        peer_log(self._log, peer).info("linked with %s; %s", peer, remote.how)
        return None

    def blame(self, peer: Peer, remote: Remote, what: str, error: BaseException) -> str:
        """End the link to a peer whose bytes have caused an error, and return the reason that the peer gets.

        The link ends in a later call of the loop. Its end feeds rooms, and this call may be in the middle of their
        effects.
        """
        detail = self.describe_error(peer, what, error)

        def end() -> None:
            assert self.links is not None  # the peer is or was linked
            if self._remotes.get(peer) is remote:
                self.links.drop(peer, detail)

        self._loop.post(end)
        return detail

    def describe_error(self, peer: Peer, what: str, error: BaseException) -> str:
        """Log an error that a peer's bytes caused, and return it as one printable line of at most `TEXT_CHARS`."""
        text = str(error) if isinstance(error, KVRoomError) else f"{type(error).__name__}: {error}"
        detail = fitting(f"{what} cannot be used: {text if text.isprintable() else ascii(text)}")
        peer_log(self._log, peer).warning("invalid data from %s: %s", peer, detail)
        logger.debug("data from %s raised", peer, exc_info=error)
        return detail

    def retry(self, remote: Remote) -> None:
        """Run the calls that wait for the transport's handle, each once.

        The list is emptied first: after a loss the handle may still come, and each call would run a second time.
        """
        waiting, remote.waiting = remote.waiting, []
        for retry in waiting:
            retry()

    # -- for the fences -------------------------------------------------------------------------------------------

    def linked_again(self, peer: Peer, remote: Remote) -> None:
        """Connect the transport to a peer that was linked again during its fence."""
        self._connect(peer, remote)

    def redial(self, peer: Peer) -> None:
        """Reconnect to a lost peer in the background. A failure is only logged; the rooms' next deadline retries."""
        self._loop.spawn(self._redial(peer), f"linking with {peer} again")

    async def _redial(self, peer: Peer) -> None:
        assert self.links is not None  # the peer was linked
        try:
            await self.links.dial(peer.address)
        except KVRoomError as error:
            unproven = "pages wait for proof that %s writes no longer, and it cannot be reached: %s"
            peer_log(logger, peer).info(unproven, peer, error)

    def fenced(self, peer: Peer) -> None:
        """Tell the rooms that this peer is proven to write no longer."""
        self.table.fenced(peer, self._loop.now())
        self.settle()
