"""The handshake: two managers prove to each other that they know the secret, then say who they are.

    dialler                         acceptor
    Hello(nonce, address, ...) -->
                               <--  Hello(nonce, address, ...)
    Proof(dialler)             -->                              the dialler proves first: who merely connects
                               <--  Proof(acceptor), Identity   gets nothing from which to guess the secret
    Identity                   -->

A proof covers both hello frames as they were on the wire and the role of who proves, so neither a recorded proof nor
our own one sent back is accepted. Each side sends its `LinkIdentity` only after it verified the other's proof.

A manager states a public key in its hello, from which its incarnation follows, and signs what it proves. So a peer
that knows the secret cannot be another peer, whatever address it states.

With a secret, the acceptor also refuses a dialler that has dialled another address than the acceptor's own. The
dialled address is in the dialler's hello: a relay at an address of its own cannot change it, so it gets no link even
if both ends know the secret.

A side that refuses says why in `Refused`, so that both log the same cause; nothing in it depends on the secret.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvroom.core.messages import Peer
from kvroom.errors import AuthenticationError, ConfigurationError, LinkError, RemoteProtocolError

from . import auth
from .address import HostPort, is_loopback, parse_address
from .frames import (
    MAX_ROOM_FRAME_BYTES,
    MAX_STRANGER_FRAME_BYTES,
    UNDECODABLE,
    Seq,
    encode_frame,
)
from .keys import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, RunKey, incarnation_of, is_signed

VERSIONS = (5, 5)
"""The first and the last protocol version that this side speaks. Version 2 added the message `Renew`,
version 3 the identity of a request, which a side of version 2 neither states nor compares,
version 4 the dialled address and the key of the run, which a side of version 3 neither states nor compares,
version 5 the names `cause` and `detail` of a failure and the sides `prefill` and `decode`."""

MAX_IDENTITY_BYTES = 4 << 20
MAX_HELD = 256
MAX_REASON_CHARS = 1000
_IDENTITY_FRAME_BYTES = MAX_IDENTITY_BYTES + 16 * MAX_HELD
_LABEL = b"kvroom link proof, "

_Nonce = Annotated[bytes, Meta(min_length=auth.NONCE_BYTES, max_length=auth.NONCE_BYTES)]
_Version = Annotated[int, Meta(ge=1, lt=2**16)]


class Role(enum.Enum):
    """Who opened the TCP connection."""

    DIALLER = "dialler"
    ACCEPTOR = "acceptor"

    @property
    def other(self) -> Role:
        return Role.ACCEPTOR if self is Role.DIALLER else Role.DIALLER


class Hello(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="hello"):
    """The first frame of each side. Later versions may append fields; these keep their places for ever."""

    magic: Literal["kvroom"]
    versions: tuple[_Version, _Version]
    nonce: _Nonce
    address: Annotated[str, Meta(max_length=300)]
    incarnation: Seq
    dialled: Annotated[str, Meta(max_length=300)] = ""
    """The address that the sender has dialled; empty from an acceptor."""
    key: Annotated[bytes, Meta(max_length=PUBLIC_KEY_BYTES)] = b""
    """The sender's public key, which its incarnation follows from; empty from a rank of an `Agreement`."""

    @property
    def peer(self) -> Peer:
        return Peer(self.address, self.incarnation)


class Proof(msgspec.Struct, frozen=True, array_like=True, tag="proof"):
    mac: Annotated[bytes, Meta(min_length=auth.PROOF_BYTES, max_length=auth.PROOF_BYTES)]
    signature: Annotated[bytes, Meta(max_length=SIGNATURE_BYTES)] = b""
    """By the key in the sender's hello, over the same transcript and role."""


class LinkIdentity(msgspec.Struct, frozen=True, array_like=True, tag="identity"):
    """What the sender is, opaque here, and what it knows about its other connections to the same peer.

    `attempt` numbers the identities that the sender has sent, from 1; `held` are the attempts towards this very peer
    whose connections it still held when it sent this one. With them the peer can tell a second connection that is
    spare (both dialled at once) from one that replaces a dead one.
    """

    payload: Annotated[bytes, Meta(max_length=MAX_IDENTITY_BYTES)]
    attempt: Seq = 0
    held: Annotated[tuple[Seq, ...], Meta(max_length=MAX_HELD)] = ()


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    kind: Literal["authentication", "protocol", "busy"]
    reason: Annotated[str, Meta(max_length=MAX_REASON_CHARS)]


_Frame = Hello | Proof | LinkIdentity | Refused
_frames = msgspec.msgpack.Decoder(_Frame)
_encoder = msgspec.msgpack.Encoder()


class _Stage(enum.Enum):
    """What the peer has to send next."""

    HELLO = enum.auto()
    PROOF = enum.auto()
    IDENTITY = enum.auto()
    COMPLETE = enum.auto()
    FAILED = enum.auto()


_FRAME_LIMIT_BYTES = {
    _Stage.HELLO: MAX_STRANGER_FRAME_BYTES,
    _Stage.PROOF: MAX_STRANGER_FRAME_BYTES,
    _Stage.IDENTITY: _IDENTITY_FRAME_BYTES,
    _Stage.COMPLETE: MAX_ROOM_FRAME_BYTES,
    _Stage.FAILED: 0,
}


class Handshake:
    """One side of one connection. Give it frame bodies in order, send what `take` returns after every call.

    `receive` raises `RemoteProtocolError` (`AuthenticationError` for the secret), or `LinkError` where the peer refuses
    for now only, and is dead then; `take` may still return a `Refused` that should reach the peer before the connection
    is closed.

    `introduce` is called once, when the peer has proven that it knows the secret, and returns our identity for it.
    `dialled` is what a dialler states as the address that it has dialled. With a `key`, the incarnation of `me` must be
    the key's, and a peer without a key of its own is refused; without one, no key is stated or asked for.
    """

    def __init__(
        self,
        role: Role,
        secret: bytes,
        me: Peer,
        introduce: Callable[[Peer], LinkIdentity],
        versions: tuple[int, int] = VERSIONS,
        *,
        dialled: str = "",
        key: RunKey | None = None,
    ) -> None:
        self.role = role
        self.own_addresses: frozenset[str] | None = None
        """An acceptor's: with a secret, a dialler that has dialled none of them is refused. None: not compared."""
        self.peer_hello: Hello | None = None
        self.peer_identity: LinkIdentity | None = None
        self._secret = secret
        self._key = key
        self._introduce = introduce
        self._stage = _Stage.HELLO
        self._hello = Hello(
            magic="kvroom",
            versions=versions,
            nonce=auth.new_nonce(),
            address=me.address,
            incarnation=me.incarnation,
            dialled=dialled,
            key=key.public if key is not None else b"",
        )
        self._hello_body = _encoder.encode(self._hello)
        self._transcript = b""
        self._to_send = bytearray(encode_frame(self._hello_body))
        self._sent = [self._hello.nonce]  # what a peer may know of us, and no error may show

    @property
    def complete(self) -> bool:
        """Both sides know who the other is; what the stream brings next are envelopes."""
        return self._stage is _Stage.COMPLETE

    @property
    def frame_limit_bytes(self) -> int:
        """How large the peer's next frame may be: small until it has proven something."""
        return _FRAME_LIMIT_BYTES[self._stage]

    def take(self) -> bytes:
        """The bytes to send now; each is returned once."""
        data = bytes(self._to_send)
        self._to_send.clear()
        return data

    def receive(self, body: bytes) -> None:
        """Take the peer's next frame."""
        try:
            self._receive(body)
        except (RemoteProtocolError, LinkError):
            self._stage = _Stage.FAILED
            raise

    def _receive(self, body: bytes) -> None:
        try:
            frame = _frames.decode(body)
        except UNDECODABLE as error:
            raise RemoteProtocolError(f"not a kvroom handshake frame: {self._shown(str(error))}") from None
        if isinstance(frame, Refused):
            raise self._refusal(frame)
        if self._stage is _Stage.HELLO and isinstance(frame, Hello):
            self._on_hello(frame, body)
        elif self._stage is _Stage.PROOF and isinstance(frame, Proof):
            self._on_proof(frame)
        elif self._stage is _Stage.IDENTITY and isinstance(frame, LinkIdentity):
            self.peer_identity = frame
            self._stage = _Stage.COMPLETE
        else:
            raise RemoteProtocolError(f"{type(frame).__name__} out of turn: expected {self._stage.name.lower()}")

    def _on_hello(self, hello: Hello, body: bytes) -> None:
        if hello.nonce == self._hello.nonce:
            raise RemoteProtocolError("the peer sent our own hello back")
        if hello.incarnation == self._hello.incarnation:
            self._refuse("protocol", f"{hello.address} is this manager itself: dial another address")
        try:
            parse_address(hello.address)
        except ConfigurationError as error:
            self._refuse("protocol", str(error))
        if hello.versions[0] > self._hello.versions[1] or hello.versions[1] < self._hello.versions[0]:
            dialler, acceptor = self._in_order(hello)
            self._refuse(
                "protocol",
                f"no common protocol version: {dialler.address} speaks {dialler.versions[0]} to {dialler.versions[1]}, "
                f"{acceptor.address} {acceptor.versions[0]} to {acceptor.versions[1]}; install the same kvroom on both",
            )
        self.peer_hello = hello
        bodies = (self._hello_body, body) if self.role is Role.DIALLER else (body, self._hello_body)
        self._transcript = b"".join(hashlib.sha256(part).digest() for part in bodies)
        self._stage = _Stage.PROOF
        if self.role is Role.DIALLER:
            self._prove()

    def _on_proof(self, proof: Proof) -> None:
        hello, theirs = self.peer_hello, _label(self.role.other)
        assert hello is not None  # stage PROOF is entered only with it
        if not auth.verify(proof.mac, self._secret, theirs, (self._transcript,)):
            dialler, acceptor = self._in_order(hello)
            self._refuse(
                "authentication",
                f"the shared secrets of {dialler.address} and {acceptor.address} differ, or one has none; "
                f"set the same {auth.SECRET_SETTING} on both",
            )
        # A peer that states the incarnation of another is refused.
        wrong = ""
        if self._key is not None and incarnation_of(hello.key) != hello.incarnation:
            wrong = "has no key of its own" if not hello.key else "does not follow from its key"
        elif self._key is not None and not is_signed(proof.signature, hello.key, theirs, self._transcript):
            wrong = "is not signed with its key"
        if wrong:
            self._refuse(
                "authentication",
                f"incarnation {hello.incarnation} of {hello.address} {wrong}: it is another process, or no kvroom "
                "manager",
            )
        if self.role is Role.ACCEPTOR:
            # A dialler that meant to reach another address is refused. Without a secret a relay needs no trick.
            own = self.own_addresses
            if self._secret and own is not None and not any(_is_same_place(hello.dialled, each) for each in own):
                self._refuse(
                    "authentication",
                    f"{hello.address} dialled {hello.dialled or 'an address that it does not state'} and reached "
                    f"{' or '.join(sorted(own))}: if that is no relay of a stranger, start the worker that was reached "
                    "with --advertise-host (in the library: `advertise_host`) set to the host that others dial",
                )
            self._prove()
        self._send(self._introduce(hello.peer))
        self._stage = _Stage.IDENTITY

    def _prove(self) -> None:
        label = _label(self.role)
        signature = self._key.sign(label, self._transcript) if self._key is not None else b""
        proof = Proof(auth.prove(self._secret, label, (self._transcript,)), signature)
        self._sent += [proof.mac, signature] if signature else [proof.mac]
        self._send(proof)

    def _send(self, frame: _Frame) -> None:
        self._to_send += encode_frame(_encoder.encode(frame), _IDENTITY_FRAME_BYTES)

    def _refuse(self, kind: Literal["authentication", "protocol"], reason: str) -> None:
        frame = Refused(kind, reason[:MAX_REASON_CHARS])
        self._send(frame)
        raise self._refusal(frame)

    def _refusal(self, frame: Refused) -> RemoteProtocolError | LinkError:
        """The same error on the side that refuses and on the side that is told."""
        reason = self._shown(frame.reason)
        if frame.kind == "busy":
            return LinkError(reason)
        return AuthenticationError(reason) if frame.kind == "authentication" else RemoteProtocolError(reason)

    def _shown(self, text: str) -> str:
        """Return a stranger's text in printable form, or words of ours where it repeats our nonce or our proof."""
        if auth.repeats(text, *self._sent):
            return "it sent back what proves who we are, which is not shown; is it a kvroom manager?"
        return text if text.isprintable() else ascii(text)

    def _in_order(self, other: Hello) -> tuple[Hello, Hello]:
        return (self._hello, other) if self.role is Role.DIALLER else (other, self._hello)


def _label(role: Role) -> bytes:
    return _LABEL + role.value.encode()


def _is_same_place(dialled: str, own: str) -> bool:
    """Return True if both texts are one address. A scope id is not compared: each machine has its own."""
    try:
        there, here = parse_address(dialled), parse_address(own)
    except ConfigurationError:
        return False
    if there.port != here.port:
        return False
    if there.host == "localhost" and is_loopback(here.host):
        return True
    return _without_scope(there) == _without_scope(here)


def _without_scope(where: HostPort) -> str:
    return where.host.partition("%")[0]


def read_incarnation(body: bytes) -> int:
    """Return the incarnation that a manager states in its hello, the first frame of a connection, and proves later.

    `RemoteProtocolError` for another frame.
    """
    try:
        frame = _frames.decode(body)
    except UNDECODABLE as error:
        raise RemoteProtocolError(f"not a kvroom handshake frame: {error}") from None
    if not isinstance(frame, Hello):
        raise RemoteProtocolError(f"{type(frame).__name__} in place of a hello")
    return frame.incarnation


def busy(reason: str) -> bytes:
    """Return all that an acceptor says which cannot take a connection now, and would later: a frame in place of its
    hello. The dialler raises `LinkError` with the reason.
    """
    return encode_frame(_encoder.encode(Refused("busy", reason[:MAX_REASON_CHARS])))
