"""The links of one manager: it listens and dials, and has at most one open link with each peer.

`Links` decides which of several connections to one peer is the link. `runtime.connection` runs a single connection.
"""

# Theory of operation
#
# After each rule stands the sequence of events that it excludes, and the test that fails without it. A test without a
# path is in tests/runtime/test_link.py. A "planted bug" is a function of tests/runtime/planted.py, which breaks the
# rule in the simulation; the simulation has to notice. A and B are managers, H a hostile peer that knows the secret.
#
# Dialling. Any manager may dial: a decode rank dials the prefill ranks that its directory lists, and a rank whose pages
# wait for proof dials a lost peer again (planted bug `a_lost_peer_is_not_dialled_again`). Dials to one address share
# one connection: otherwise ten rooms that open together would run ten handshakes with one prefill rank
# (test_dials_to_one_address_share_one_connection). An open link answers a dial only if an earlier dial reached that
# peer at that address, because a peer proves its incarnation and merely states its address: H dials A and states B's
# address; if that link answered A's next dial to B, A would send B's offers to H
# (test_a_peer_that_states_the_address_of_another_takes_neither_its_link_nor_its_dials).
#
# Handshake. After both hellos come the dialler's proof, the acceptor's proof and identity, and the dialler's identity.
# If the acceptor proved first, a stranger could connect, take the proof, and search for the secret offline
# (tests/wire/test_handshake.py::test_nothing_of_the_secret_or_the_identity_is_said_to_one_who_merely_connects). The
# incarnation follows from a key: otherwise H could state B's incarnation, and replace B's link by its own
# (test_a_manager_refuses_an_incarnation_without_its_key_and_keeps_the_link).
#
# One side decides. The side with the lower incarnation sends `Open` on one connection; the other side waits for it.
# A and B dial each other simultaneously. If each side kept the connection that it had dialled, each would close the one
# that the other keeps (tests/runtime/test_link_races.py::test_both_sides_always_agree_on_the_link). A message before
# `Open` is an error: its sender would count the link as up while the deciding side answers `Spare`, and the message
# would be lost (test_a_message_before_the_link_is_open_is_refused). A dial that ends in `Spare` waits for the other
# connection, because `Spare` may overtake the `Open` of that one: the dial would fail beside a link that is about to
# open (test_managers_that_dial_each_other_at_once_get_one_link_and_lose_nothing).
#
# Spare or replacement. An identity carries `attempt`, a growing number, and `held`, the attempts of its sender whose
# connections to this peer were still open. A new connection replaces the link only if its attempt is newer and `held`
# lacks the link's attempt. Without replacement, B loses the link unnoticed by A, dials again, and is refused as spare
# until A's heartbeat runs out (test_a_new_connection_of_the_same_run_replaces_the_old_one). Without `held`, the second
# of two simultaneous dials replaces a live link and loses what is in flight on it. Without `attempt`, a late identity
# that B sent before the link existed does the same, because its `held` cannot name that link
# (test_a_second_connection_is_spare_while_the_peer_still_holds_the_first). `Open` is numbered: A opens c1 as 7, loses
# it, and opens c2 as 8; B reads 8 before 7 and would return to c1, which A has given up
# (test_an_overtaken_open_is_void).
#
# Silence. After `heartbeat_s` without a byte the link sends `Ping`, and after as long again it is lost. A host without
# power sends neither FIN nor RST, so its rooms would wait for their own deadlines (planted bug
# `silence_is_never_noticed`). The age of the last byte does not suffice: after a stall of 11 s a loop would give up an
# idle peer that it had never pinged (test_a_silent_peer_is_pinged_once_and_then_lost).
#
# Runs. A restarted process is another peer, with another incarnation. If the address alone counted, the `Quiesced` of
# the new run would free pages into which the old one, still running, writes (planted bug
# `a_peer_is_known_by_its_address`). A dial that reaches a new run ends the old run's link, which could stay half open
# for 2 * `heartbeat_s` (test_a_dial_that_reaches_another_run_ends_what_the_earlier_run_has_left). Sequence numbers
# outlive a link: if they began again, the table would drop each message of the next link as overtaken
# (test_the_sequence_goes_on_after_a_link_was_replaced).
#
# Loss. Every `on_up` is followed by one `on_lost`, also before a replacement: the old connection may have taken a
# `Done` with it, for which its room would wait (planted bug `a_lost_link_ends_no_room`). The rooms of the peer end, and
# their pages stay held, because a process without a link may still write (planted bugs
# `a_sink_takes_a_lost_link_for_proof`, `a_lost_peer_is_not_fenced`). A peer that does not read is lost when its queue
# is full, or the queue would grow without limit (planted bug `a_slow_reader_is_waited_for`). That is checked at the end
# of a loop turn: the driver calls `send` amid a room's effects, where an `on_lost` would change that very room.

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
    """The receiver of what happens on links. All calls come on the loop, none from inside `Links.send`.

    For each peer the calls are `on_up`, any number of `on_message`, `on_lost`, then `on_up` again, and so on. Every
    `on_up` is followed by exactly one `on_lost`, and no message of a link is delivered after its `on_lost`. A
    `RemoteProtocolError` from `on_message` ends the link with that cause. Any other exception is a bug in this process:
    it ends the link as well, with `on_lost`, and goes to the loop's exception handler.
    """

    def on_up(self, peer: Peer, identity: bytes) -> None:
        """Note that a link is open; `identity` is the payload that the peer gave to its own `Links`."""

    def on_lost(self, peer: Peer, detail: str) -> None:
        """Note that the link is gone. Messages queued for the peer are lost; `detail` is the reason, for people."""

    def on_message(self, peer: Peer, seq: int, message: Message | Inquiry) -> None:
        """Take a message. `seq` grows with each message that this run of the peer sends, over all of its links."""


class LinkListener(Protocol):
    """The part of an `Acceptor` that links use."""

    @property
    def port(self) -> int: ...
    def start(self) -> None: ...
    async def close(self) -> None: ...


class Listen(Protocol):
    """Function that listens for links: `kvroom.listening.acceptor.listen`, or the simulation's substitute."""

    def __call__(
        self, factory: Callable[[], asyncio.Protocol], where: HostPort, /, *, refusal: Callable[[str], bytes]
    ) -> Awaitable[LinkListener]: ...


class Links:
    """The listening socket, the dials and the links of one manager. All methods belong to the loop that ran `start`.

    Args:
        handler: receives what happens on the links.
        identity: the payload of `on_up` at the peers, at most 4 MiB.
        host: where to listen.
        port: where to listen; 0 takes any free port.
        advertise_host: the host that peers dial, if it differs from `host`; see `kvroom.dialling.advertised` for a
            `host` that means every interface.
        secret: the shared secret; required beyond loopback.
        key: the key of this run, if `identity` depends on it; otherwise a new key is generated.
        incarnation: for simulations, which choose it. Such links have no key, so links with keys refuse them.
        limits: times and sizes; the defaults of `LinkLimits` without it.
        listening: opens the listening socket; the simulation passes its own.

    Raises:
        ConfigurationError: a secret is missing, the identity is too large, or host or port is invalid.
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
        """All connections that have a socket, oldest first."""
        self._strangers: dict[Connection, None] = {}
        """Accepted connections whose peer has not proven the secret yet, oldest first."""
        self._links: dict[Peer, Connection] = {}
        self._reached: dict[str, Peer] = {}
        """Peers of `_links`, by the address at which a dial from here reached them. Only these answer a dial."""
        self._dials: dict[str, asyncio.Task[Peer]] = {}
        self._attempts = itertools.count(1)
        self._numbers = itertools.count(1)
        self._seqs = itertools.count(1)
        self.refused = 0
        """Number of connections that ended before they became links: strangers, wrong secrets, timeouts."""

    @property
    def me(self) -> Peer:
        """Address and incarnation under which peers know this manager. Defined after `start`."""
        if self._me is None:
            raise ConfigurationError("links have no address before start(): call start() first")
        return self._me

    @property
    def peers(self) -> frozenset[Peer]:
        """The peers with which a link is open."""
        return frozenset(self._links)

    async def start(self) -> Peer:
        """Listen, and return this manager's own address and incarnation.

        Raises:
            ConfigurationError: the address cannot be listened on; nothing is open then.
        """

        def refuse(why: str) -> bytes:
            self.refused += 1
            return busy(f"{self.me} accepts no new links now: {why}")

        try:
            self._listener = await self._listening(
                lambda: self._connection(Role.ACCEPTOR), self._listen, refusal=refuse
            )
        except OSError as error:
            raise ConfigurationError(listen_error(self._listen, error)) from None
        self._me = Peer(str(HostPort(self._advertised, self._listener.port)), self._incarnation)
        self._listener.start()
        return self._me

    async def dial(self, address: str) -> Peer:
        """Return the peer that listens at `address`, linked: by an open link, a dial in flight, or a new connection.

        Callers that dial one address at the same time share the dial; cancelling one of them leaves it to the others.

        Raises:
            LinkError: no answer within `connect_s`, no link within `handshake_s`, or this manager is closing.
            AuthenticationError: one of the two sides refused the other's secret, key or dialled address.
            RemoteProtocolError: the other end is not a kvroom manager, or it has another protocol version.

        After an exception there is no link from this dial, and no socket of it is left open.
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
                done.exception()  # marks it as retrieved, or asyncio would log it where every caller was cancelled

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
        """Return the numeric address at the other end of the link with this peer; empty if there is no link."""
        connection = self._links.get(peer)
        return "" if connection is None else connection.host

    def send(self, peer: Peer, message: Message | Inquiry, *, again: bool = False) -> bool:
        """Queue a message for a peer. Never blocks, and never calls the handler.

        Args:
            peer: the receiver.
            message: any message.
            again: the sender repeats this message later, so it is dropped while the link's queue is half full.

        Returns:
            True if it was queued, which does not prove arrival: a lost link takes its queue with it. False if it was
            dropped because of `again`, or because no link is open with this peer (its `on_lost` was called).

        Raises:
            LimitExceeded: the message is larger than a frame may be; the link stays open.
        """
        connection = self._links.get(peer)
        if connection is None or (again and connection.busy):
            return False
        connection.send(encode_envelope(next(self._seqs), message))
        return True

    def drop(self, peer: Peer, detail: str) -> None:
        """End the link with this peer, if there is one, and send it the reason. Calls `on_lost` before it returns."""
        connection = self._links.get(peer)
        if connection is not None:
            connection.end(LinkError(detail), Goodbye(detail[:MAX_CAUSE_CHARS]))

    async def close(self) -> None:
        """End every link (with `on_lost`) and every dial. Idempotent; afterwards no task, timer or socket is left."""
        self._closing = True
        for task in self._dials.values():
            task.cancel()
        for connection in list(self._connections):
            connection.end(LinkError("this manager is shutting down"), Goodbye("it is shutting down"))
        if self._listener is not None:
            await self._listener.close()  # `made` ends connections that are accepted until then
        await asyncio.gather(*self._dials.values(), return_exceptions=True)
        await asyncio.gather(*[connection.closed for connection in self._connections])

    # dialling

    async def _dial(self, where: HostPort) -> Peer:
        connection = self._connection(Role.DIALLER, str(where))
        # Only a name has several addresses to race. A cancelled race leaves a socket open in asyncio, so a numeric
        # address goes without.
        stagger_s = None if is_numeric(where.host) else STAGGER_S
        connecting = asyncio.get_running_loop().create_connection(
            lambda: connection, where.host, where.port, happy_eyeballs_delay=stagger_s
        )
        try:
            await within(connecting, self._limits.connect_s)
        except asyncio.TimeoutError:
            limit_s = self._limits.connect_s
            raise LinkError(
                f"timed out after {limit_s} s (connect_s): no answer from {where}; is the worker up?"
            ) from None
        except OSError as error:
            question = f"is the worker up?{loopback_remedy(where.host, error)}"
            raise LinkError(f"cannot connect to {where}: {describe_dial_error(error, question)}") from None
        await connection.settled
        if connection.spare and connection.peer is not None:
            # Wait for the connection that made this one spare: its `Open` may still be in flight.
            others = [other.settled for other in self._connections if other.claimed_peer == connection.peer]
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
            # End the link that an earlier run of this worker left at this address.
            for other in [other for other in self._links if other.address == address == peer.address and other != peer]:
                self._links[other].end(LinkError(f"{peer} replaced this link: it was restarted"), abrupt=True)
            self._reached[address] = peer
        return peer

    # called by connections

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
        """Return this side's identity for a peer that has proven the secret, with the attempts that are still held."""
        self._strangers.pop(connection, None)
        known = (other for other in self._connections if other.claimed_peer == peer)
        held = [other.attempt for other in known if other.state is not State.ENDED]
        connection.attempt = next(self._attempts)
        connection.claimed_peer = peer
        return LinkIdentity(self._identity, connection.attempt, tuple(sorted(held)[-MAX_HELD:]))

    def completed(self, connection: Connection) -> None:
        """Decide on a connection whose handshake is complete; the other side decides if its incarnation is lower."""
        peer = connection.peer
        assert peer is not None  # completed means known
        if self._incarnation > peer.incarnation:
            return  # the peer sends `Open` or `Spare`
        link = self._links.get(peer)
        new, old = connection.identity, link.identity if link is not None else None
        # It replaces the link if the peer had already lost the old connection when it sent the new identity.
        if old is not None and not (new.attempt > old.attempt and old.attempt not in new.held):
            connection.end(LinkError(f"{peer} is linked through another connection"), Spare())
            return
        connection.open(next(self._numbers))
        self._enter(peer, connection)

    def opened(self, connection: Connection, number: int) -> None:
        """Take the peer's decision for this connection, unless an `Open` with a higher number was read before."""
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
        """Make this connection the link, after `on_lost` for the link that it replaces."""
        old = self._links.get(peer)
        if old is not None:
            old.end(LinkError(f"{peer} replaced this link: it opened another connection"), abrupt=True)
        self._links[peer] = connection
        self._handler.on_up(peer, connection.identity.payload)
