"""The peers of a driver: whom it is linked with, what their memory looks like, and how the transport reaches them.

A peer chose every byte of its identity and of its transport's description. Whatever they raise beyond the declared
errors is that peer's fault (`blame`): its link ends, with the text, and with the link its rooms.

`Peers` knows the rooms only as a table that is told of links and fences; `settle`, which the driver sets, carries out
what comes of it. All methods belong to the loop's thread.
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
"""After the transport could not connect to a linked peer, a room that needs it makes it try again after this time."""


class Peers:
    """See the module. `layout` describes our memory; `transport` has it registered already."""

    def __init__(
        self, loop: Loop, table: RoomTable, layout: KVLayout, *, transport: Transport, machine: LocalMachine
    ) -> None:
        self.table = table
        self.transport = transport
        self.links: Messenger | None = None
        """Set before the first link can be up."""
        self.settle: Callable[[], None] = lambda: None
        """Carries out what the rooms want done, after they were told something here."""
        self._loop, self._layout, self._machine = loop, layout, machine
        self._remotes: dict[Peer, Remote] = {}  # linked peers
        self.fences = Fences(self, loop, machine)
        self.links_lost = 0  # since the start
        self._log = Repeats(logger)  # of what a peer can repeat as often as it likes: coming and going

    # -- what the links say ---------------------------------------------------------------------------------------

    def link(self, peer: Peer, payload: bytes) -> None:
        """A link is up: learn what the peer's memory looks like and connect the transport to it."""
        try:
            identity = identities.decode(payload)
            # Our plans for writing into its memory. A peer that does not fit may be linked, but gets no rooms.
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
            raise RemoteProtocolError(f"{peer} described itself in a way that cannot be read: {error}") from None
        except Exception as error:  # noqa: BLE001 - a supervisor, see the module
            raise RemoteProtocolError(self.describe_error(peer, "its description of itself", error)) from None
        assert self.links is not None  # one is up
        remote.host = self.links.host_of(peer)
        self._remotes[peer] = remote
        if self.fences.relinked(peer):
            self._connect(peer, remote)

    def lose(self, peer: Peer, detail: str) -> Remote | None:
        """A link is down: let the peer go. Return what was known of it; what waits there is the caller's to `retry`."""
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

    # -- what is known of them ------------------------------------------------------------------------------------

    @property
    def remotes(self) -> Mapping[Peer, Remote]:
        """The linked peers."""
        return self._remotes

    def describe(self, incarnation: int) -> bytes:
        """Return what peers get to know of this run; the payload of `on_up` there."""
        described = claims.state(self.transport, claims.run_owner(incarnation))
        return msgspec.msgpack.encode(
            PeerProfile(self._layout, self.transport.name, described, self._machine.process())
        )

    def how(self, peer: Peer) -> str:
        """One sentence for people: by which transport bytes travel between us and this peer, and why."""
        remote = self._remotes.get(peer)
        return "not connected" if remote is None else remote.how

    def links_now(self) -> tuple[LinkView, ...]:
        """The linked peers, and the lost ones that some room still waits for; one for each address."""
        lost = {str(peer): LinkView(str(peer), "", up=False) for peer in self.fences.lost if self.table.concerns(peer)}
        linked = {str(peer): LinkView(str(peer), remote.transport, up=True) for peer, remote in self._remotes.items()}
        return tuple({**lost, **linked}.values())

    def shares(self, sources: tuple[Peer, ...], sinks: tuple[int, ...]) -> tuple[asked.Share, ...]:
        """What each source writes, so that together they fill our pages. Worked out once for a set of links."""
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
        # By what its proven run has stated, and in another thread, because engines may block.
        claim, owner = remote.identity.description, claims.run_owner(peer.incarnation)
        connecting = self._loop.run_blocking(
            lambda: self.transport.connect(claims.read(claim, self.transport.name, owner))
        )
        connecting.add_done_callback(lambda done: self._loop.post(lambda: self._connected(peer, remote, done)))

    def try_again(self, peer: Peer, remote: Remote | None) -> None:
        """Connect the transport once more where that failed a while ago: the want of a descriptor, say, passes."""
        if remote is not None and remote.again_s is not None and self._loop.now() >= remote.again_s:
            remote.error = remote.again_s = None
            self._connect(peer, remote)

    def _connected(self, peer: Peer, remote: Remote, connecting: Future[int]) -> None:
        error = connecting.exception() or self._reached(peer, remote, connecting.result())
        if isinstance(error, TransportError) and not isinstance(error, RemoteProtocolError):
            remote.error, remote.cause = str(error), Cause.TRANSFER
            remote.again_s = self._loop.now() + CONNECT_AGAIN_S
            peer_log(self._log, peer).warning("no blocks can be moved to %s: %s", peer, error)
        elif error is not None:
            remote.cause = Cause.TRANSFER
            remote.error = self.blame(peer, remote, "how its transport is reached", error)
        self.retry(remote)
        self.settle()

    def _reached(self, peer: Peer, remote: Remote, handle: int) -> Exception | None:
        """Take the transport's handle, or return why it cannot be: one that another peer has would end with it."""
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
        """End the link to the peer whose bytes have caused an error; return the sentence that it is told.

        The link ends in a call of its own: its end feeds rooms, and this may be the middle of what they want done.
        """
        detail = self.describe_error(peer, what, error)

        def end() -> None:
            assert self.links is not None  # the peer is or was linked
            if self._remotes.get(peer) is remote:
                self.links.drop(peer, detail)

        self._loop.post(end)
        return detail

    def describe_error(self, peer: Peer, what: str, error: BaseException) -> str:
        """Say in one line why a peer's bytes are of no use, and log it."""
        text = str(error) if isinstance(error, KVRoomError) else f"{type(error).__name__}: {error}"
        detail = fitting(f"{what} cannot be used: {text if text.isprintable() else ascii(text)}")
        peer_log(self._log, peer).warning("%s is at fault: %s", peer, detail)
        logger.debug("what %s said has raised", peer, exc_info=error)
        return detail

    def retry(self, remote: Remote) -> None:
        """What waits for the transport's handle runs once: a link may be lost, and its handle still come later."""
        waiting, remote.waiting = remote.waiting, []
        for retry in waiting:
            retry()

    # -- for the fences -------------------------------------------------------------------------------------------

    def linked_again(self, peer: Peer, remote: Remote) -> None:
        """Connect the transport to a peer that was linked while it was being fenced."""
        self._connect(peer, remote)

    def redial(self, peer: Peer) -> None:
        """Try to link with a lost peer again. Failing is no event: the next deadline asks anew."""
        self._loop.spawn(self._redial(peer), f"linking with {peer} again")

    async def _redial(self, peer: Peer) -> None:
        assert self.links is not None  # the peer was linked
        try:
            await self.links.dial(peer.address)
        except KVRoomError as error:
            unproven = "pages wait for proof that %s writes no more, and it cannot be asked: %s"
            peer_log(logger, peer).info(unproven, peer, error)

    def fenced(self, peer: Peer) -> None:
        """Tell the rooms of the proof that this peer writes no more."""
        self.table.fenced(peer, self._loop.now())
        self.settle()
