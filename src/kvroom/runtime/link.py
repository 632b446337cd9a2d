"""The links of one manager: it listens, it dials, and there is at most one open link per peer.

Two managers may dial each other at once, and one may redial before the other noticed a loss, so several connections
to one peer can exist for a moment. Which of them is the link is decided by one side only, the one with the lower
incarnation, which says `Open` on it; the other side waits for that. The decision is a comparison of what the peer
said in its `LinkIdentity` (its `attempt`, and the attempts it still `held`): a newer attempt of a peer that no longer
holds the open link replaces it, any other second connection is spare. So both sides keep the same connection without
a timer or a random choice, and a connection that carried a message is only given up by a side that lost it.

A peer proves its incarnation, but not the address that it states: whom a dial to an address reaches is known only from
a connection that was dialled there. So a link that a peer has dialled never answers `Links.dial`, and never replaces
the link of another incarnation that states the same address.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from kvroom.core.messages import Message, Peer
from kvroom.dialling.advertised import advertised_host
from kvroom.dialling.dial import STAGGER_S, is_numeric
from kvroom.errors import AuthenticationError, ConfigurationError, KVRoomError, LinkError
from kvroom.listening.acceptor import listen
from kvroom.listening.descriptors import describe_dial_error
from kvroom.listening.repeats import Repeats
from kvroom.wire.address import HostPort, check_port, listen_error, loopback_remedy, parse_address, read_listen_host
from kvroom.wire.auth import require_secret
from kvroom.wire.frames import Goodbye, Inquiry, Spare, encode_envelope
from kvroom.wire.handshake import MAX_HELD, MAX_IDENTITY_BYTES, LinkIdentity, Role, busy
from kvroom.wire.keys import RunKey

from .connection import MAX_CAUSE_CHARS, Connection, LinkLimits, State
from .within import within

__all__ = ["LinkHandler", "LinkLimits", "Links"]

logger = logging.getLogger(__name__)


class LinkHandler(Protocol):
    """What links tell their owner; all calls come on the loop, none from inside `Links.send`.

    Per peer the calls are `on_up`, any number of `on_message`, `on_lost`, and so on in turn: every `on_up` is followed
    by exactly one `on_lost`, and nothing of a link is delivered after its `on_lost`. A `RemoteProtocolError` from
    `on_message` ends the link with that cause. Any other exception is a fault of this process: it ends the link too,
    with `on_lost`, and goes to the loop's exception handler.
    """

    def on_up(self, peer: Peer, identity: bytes) -> None: ...
    def on_lost(self, peer: Peer, detail: str) -> None: ...
    def on_message(self, peer: Peer, seq: int, message: Message | Inquiry) -> None: ...


class LinkListener(Protocol):
    """As much of an `Acceptor` as links need."""

    @property
    def port(self) -> int: ...
    def start(self) -> None: ...
    async def close(self) -> None: ...


class Listen(Protocol):
    """How links listen: `kvroom.listening.acceptor.listen`, or its like in another world."""

    def __call__(
        self, factory: Callable[[], asyncio.Protocol], where: HostPort, /, *, refusal: Callable[[str], bytes]
    ) -> Awaitable[LinkListener]: ...


class Links:
    """All methods belong to the loop that `start` ran on.

    `identity` is what peers get in their `on_up`, at most 4 MiB. `port` 0 takes any free one. `advertise_host` is the
    host that peers dial where it differs from `host`; see `kvroom.dialling.advertised` for a `host` that means every
    interface.

    `key` is the key of this run, where `identity` depends on it; else a new one is made. An `incarnation` is for
    simulations, which choose it: such links have no key, so that links with keys refuse them.
    """

    def __init__(
        self,
        handler: LinkHandler,
        *,
        identity: bytes,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise_host: str | None = None,
        secret: bytes = b"",
        key: RunKey | None = None,
        incarnation: int | None = None,
        limits: LinkLimits | None = None,
        listening: Listen | None = None,
    ) -> None:
        require_secret(host, secret)
        if len(identity) > MAX_IDENTITY_BYTES:
            raise ConfigurationError(f"identity of {len(identity)} bytes is over the limit of {MAX_IDENTITY_BYTES}")
        check_port(port, "links")
        self._handler = handler
        self._identity = identity
        self._listen = HostPort(read_listen_host(host), port)
        self._advertised = advertised_host(host, advertise_host)
        self._secret = secret
        if incarnation is None:
            key = RunKey() if key is None else key
            incarnation = key.incarnation
        self._key, self._incarnation = key, incarnation
        self._limits = LinkLimits() if limits is None else limits
        self._listening = listening or listen
        self._listener: LinkListener | None = None
        self._log = Repeats(logger)
        self._me: Peer | None = None
        self._closing = False
        self._connections: dict[Connection, None] = {}
        """All that have a socket, oldest first."""
        self._strangers: dict[Connection, None] = {}
        """Accepted connections whose peer has proven nothing yet, oldest first."""
        self._links: dict[Peer, Connection] = {}
        self._reached: dict[str, Peer] = {}
        """The peers of `_links` by the address at which a dial of ours has reached them."""
        self._dials: dict[str, asyncio.Task[Peer]] = {}
        self._attempts = itertools.count(1)
        self._numbers = itertools.count(1)
        self._seqs = itertools.count(1)
        self.refused = 0
        """Connections that ended before they became links: strangers, wrong secrets, timeouts."""

    @property
    def me(self) -> Peer:
        """This manager as its peers know it. Defined after `start`."""
        if self._me is None:
            raise ConfigurationError("links have no address before start()")
        return self._me

    @property
    def peers(self) -> frozenset[Peer]:
        """Whom a link is open with."""
        return frozenset(self._links)

    async def start(self) -> Peer:
        """Listen. `ConfigurationError` when the address cannot be listened on; nothing is open then."""

        def turn_away(why: str) -> bytes:
            self.refused += 1
            return busy(f"{self.me} takes no new links now: {why}")

        try:
            self._listener = await self._listening(
                lambda: self._connection(Role.ACCEPTOR), self._listen, refusal=turn_away
            )
        except OSError as error:
            raise ConfigurationError(listen_error(self._listen, error)) from None
        self._me = Peer(str(HostPort(self._advertised, self._listener.port)), self._incarnation)
        self._listener.start()
        return self._me

    async def dial(self, address: str) -> Peer:
        """The peer that listens at `address`, linked: through the open link, a dial under way, or a new connection.

        `LinkError` when nobody answers in `connect_s`, `AuthenticationError` or `RemoteProtocolError` when the peer is
        refused or refuses. There is no link then, and nothing is left open. Cancelling one caller leaves the others.
        """
        where = parse_address(address)
        require_secret(where.host, self._secret)
        if self._closing or self._listener is None:
            raise LinkError(f"cannot dial {where}: the links of this manager are not open")
        key = str(where)
        peer = self._reached.get(key)
        if peer is not None:
            return peer

        def dialled(done: asyncio.Task[Peer]) -> None:
            del self._dials[key]
            if not done.cancelled():
                done.exception()  # the callers got it; one that nobody waits for any more is not an event

        task = self._dials.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._dial(where), name=f"dial {key}")
            self._dials[key] = task
            task.add_done_callback(dialled)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise LinkError(f"cannot dial {where}: the links of this manager are closing") from None
            raise

    def host_of(self, peer: Peer) -> str:
        """The numeric address at the other end of the link with this peer; empty if there is no link."""
        connection = self._links.get(peer)
        return "" if connection is None else connection.host

    def send(self, peer: Peer, message: Message | Inquiry, *, again: bool = False) -> bool:
        """Queue a message. False: no link is open with this peer (its `on_lost` was called), nothing was kept.

        `again`: it will be said once more, so it is not queued (False) while half of the link's queue is taken.
        Never blocks. True is no proof of arrival: what a lost link had queued is lost with it. `LimitExceeded` for a
        message that is larger than a frame may be; the link is unharmed.
        """
        connection = self._links.get(peer)
        if connection is None or (again and connection.busy):
            return False
        connection.send(encode_envelope(next(self._seqs), message))
        return True

    def drop(self, peer: Peer, detail: str) -> None:
        """End the link with this peer, if there is one, and tell it why. `on_lost` is called before this returns."""
        connection = self._links.get(peer)
        if connection is not None:
            connection.end(LinkError(detail), Goodbye(detail[:MAX_CAUSE_CHARS]))

    async def close(self) -> None:
        """End every link (`on_lost` is called) and every dial. Idempotent; no task, timer or socket is left."""
        self._closing = True
        for task in self._dials.values():
            task.cancel()
        for connection in list(self._connections):
            connection.end(LinkError("this manager is shutting down"), Goodbye("it is shutting down"))
        if self._listener is not None:
            await self._listener.close()  # `made` ends what arrives meanwhile
        await asyncio.gather(*self._dials.values(), return_exceptions=True)
        await asyncio.gather(*[connection.closed for connection in self._connections])

    # dialling

    async def _dial(self, where: HostPort) -> Peer:
        connection = self._connection(Role.DIALLER, str(where))
        # Only the addresses of a name have a race to run, of which asyncio leaves a socket open if it is cancelled.
        stagger_s = None if is_numeric(where.host) else STAGGER_S
        connecting = asyncio.get_running_loop().create_connection(
            lambda: connection, where.host, where.port, happy_eyeballs_delay=stagger_s
        )
        try:
            await within(connecting, self._limits.connect_s)
        except asyncio.TimeoutError:
            raise LinkError(f"no answer from {where} within {self._limits.connect_s} s: is the worker up?") from None
        except OSError as error:
            question = f"is the worker up?{loopback_remedy(where.host, error)}"
            raise LinkError(f"cannot connect to {where}: {describe_dial_error(error, question)}") from None
        await connection.settled
        if connection.spare and connection.peer is not None:
            # Wait until the connection that made ours spare is open: its `Open` may still be under way.
            others = [other.settled for other in self._connections if other.claims == connection.peer]
            if others:
                await asyncio.wait(others)
            if connection.peer not in self._links:
                raise LinkError(f"the other connection with {connection.peer} ended before it was open: dial again")
        elif connection.state is not State.UP:
            assert connection.error is not None  # settled means up or ended, and an end has its cause
            raise connection.error
        peer, address = connection.peer, str(where)
        assert peer is not None  # known since before UP and before Spare
        if peer in self._links:
            # What another run of that worker has left here is ended.
            for other in [other for other in self._links if other.address == address == peer.address and other != peer]:
                self._links[other].end(LinkError(f"{peer} replaced this link: it was restarted"), abrupt=True)
            self._reached[address] = peer
        return peer

    # what connections say

    def _connection(self, role: Role, dialled: str = "") -> Connection:
        return Connection(self, role, self._secret, self.me, self._limits, dialled=dialled, key=self._key)

    def made(self, connection: Connection) -> None:
        self._connections[connection] = None
        if self._closing:
            connection.end(LinkError("this manager is shutting down"))
        elif connection.role is Role.ACCEPTOR:
            self._strangers[connection] = None
            if len(self._strangers) > self._limits.strangers:
                oldest = next(iter(self._strangers))
                oldest.end(LinkError(f"more than {self._limits.strangers} connections are in their handshake"))

    def introduce(self, connection: Connection, peer: Peer) -> LinkIdentity:
        """The peer has proven that it knows the secret: say who we are and what we hold towards it."""
        self._strangers.pop(connection, None)
        held = [other.attempt for other in self._connections if other.claims == peer and other.state is not State.ENDED]
        connection.attempt = next(self._attempts)
        connection.claims = peer
        return LinkIdentity(self._identity, connection.attempt, tuple(sorted(held)[-MAX_HELD:]))

    def completed(self, connection: Connection) -> None:
        """Both know each other. If the decision is ours, take it; else `Open` or `Spare` will come."""
        peer = connection.peer
        assert peer is not None  # completed means known
        if self._incarnation > peer.incarnation:
            return
        link = self._links.get(peer)
        new, old = connection.identity, link.identity if link is not None else None
        # It replaces the link if the peer, when it sent its new identity, had already lost the old one's connection.
        if old is not None and not (new.attempt > old.attempt and old.attempt not in new.held):
            connection.end(LinkError(f"{peer} is linked through another connection"), Spare())
            return
        connection.open(next(self._numbers))
        self._enter(peer, connection)

    def opened(self, connection: Connection, number: int) -> None:
        """The peer has decided. An `Open` that another connection's has overtaken is void."""
        peer = connection.peer
        assert peer is not None  # Open is only read once the peer is known
        link = self._links.get(peer)
        if link is not None and link.number > number:
            connection.end(LinkError(f"{peer} has opened another connection since"))
            return
        connection.up(number)
        self._enter(peer, connection)

    def received(self, connection: Connection, seq: int, message: Message | Inquiry) -> None:
        assert connection.peer is not None  # only an open link delivers
        self._handler.on_message(connection.peer, seq, message)

    def ended(self, connection: Connection, detail: KVRoomError) -> None:
        self._strangers.pop(connection, None)
        peer = connection.peer
        if peer is not None and self._links.get(peer) is connection:
            del self._links[peer]
            self._reached = {address: known for address, known in self._reached.items() if known != peer}
            self._handler.on_lost(peer, str(detail))
        elif not connection.spare and not self._closing:
            self.refused += 1
            level = logging.WARNING if isinstance(detail, AuthenticationError) else logging.INFO
            self._log.log(level, "no link with %s: %s", connection, detail)

    def gone(self, connection: Connection) -> None:
        self._connections.pop(connection, None)

    def _enter(self, peer: Peer, connection: Connection) -> None:
        """Make this connection the link, after the link that it replaces was lost."""
        old = self._links.get(peer)
        if old is not None:
            old.end(LinkError(f"{peer} replaced this link: it opened another connection"), abrupt=True)
        self._links[peer] = connection
        self._handler.on_up(peer, connection.identity.payload)
