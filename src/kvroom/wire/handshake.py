"""The handshake: two managers prove to each other that they have the secret, then exchange their identities.

    dialler                         acceptor
    Hello(nonce, address, ...) -->
                               <--  Hello(nonce, address, ...)
    Proof(dialler)             -->                              the dialler proves first: a caller without the secret
                               <--  Proof(acceptor), Identity   gets no proof against which to test guesses of it
    Identity                   -->

A proof covers both hello frames as they were on the wire and the role of its sender, so a recorded proof is refused,
and so is a side's own proof that is sent back to it. Each side sends its `LinkIdentity` only after it has verified the
other's proof.

A manager states a public key in its hello, from which its incarnation is derived, and signs its proof. So a peer that
has the secret cannot take the place of another peer, whatever address it states.

With a secret, the acceptor also refuses a dialler that dialled an address other than the acceptor's own. The dialled
address is in the dialler's hello, which the proof covers. So a relay at another address cannot change it and gets no
link, even if both ends have the secret.

A side that refuses sends the reason in `Refused`, so that both sides log the same cause. The reason never depends on
the value of the secret.
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
"""The first and the last protocol version that this side supports. Version 2 added the message `Renew`,
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
    """The side of a TCP connection: the one that opened it, or the one that accepted it."""

    DIALLER = "dialler"
    ACCEPTOR = "acceptor"

    @property
    def other(self) -> Role:
        return Role.ACCEPTOR if self is Role.DIALLER else Role.DIALLER


class Hello(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="hello"):
    """The first frame of each side. Later versions may append fields, but these always keep their positions."""

    magic: Literal["kvroom"]
    versions: tuple[_Version, _Version]
    nonce: _Nonce
    address: Annotated[str, Meta(max_length=300)]
    incarnation: Seq
    dialled: Annotated[str, Meta(max_length=300)] = ""
    """The address that the sender dialled; empty from an acceptor."""
    key: Annotated[bytes, Meta(max_length=PUBLIC_KEY_BYTES)] = b""
    """The sender's public key, from which its incarnation is derived; empty from a rank of an `Agreement`."""

    @property
    def peer(self) -> Peer:
        return Peer(self.address, self.incarnation)


class Proof(msgspec.Struct, frozen=True, array_like=True, tag="proof"):
    mac: Annotated[bytes, Meta(min_length=auth.PROOF_BYTES, max_length=auth.PROOF_BYTES)]
    signature: Annotated[bytes, Meta(max_length=SIGNATURE_BYTES)] = b""
    """The signature over the same transcript and role, with the key of the sender's hello."""


class LinkIdentity(msgspec.Struct, frozen=True, array_like=True, tag="identity"):
    """The description of the sender, opaque here, and the state of its other connections to the same peer.

    `attempt` numbers the identities that the sender has sent, from 1; `held` are the attempts with this same peer whose
    connections were still open when it sent this one. With them the peer can distinguish a duplicate connection (both
    sides dialled at the same time) from one that replaces a broken connection.
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
    """The frame that the peer must send next."""

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
    """One side of one connection. Pass it frame bodies in order, and send the result of `take` after every call.

    `receive` raises `RemoteProtocolError` (`AuthenticationError` for the secret or the key), or `LinkError` if the peer
    refuses only for now. The handshake has failed then. `take` may still return a `Refused`, to be sent before the
    connection is closed.

    `introduce` is called once, when the peer has proven the secret, and returns this side's identity for it. A dialler
    states `dialled` as the address that it dialled. With a `key`, the incarnation of `me` must be that of the key, and
    a peer without a key is refused; without one, no key is stated or required.
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
        """Addresses of an acceptor. With a secret, a dialler of another address is refused. None: not compared."""
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
        self._sent = [self._hello.nonce]  # values that the peer has seen and no error may show

    @property
    def complete(self) -> bool:
        """Return True if both identities were exchanged. All later frames are envelopes."""
        return self._stage is _Stage.COMPLETE

    @property
    def frame_limit_bytes(self) -> int:
        """Return the size limit of the peer's next frame, which is small until it has proven the secret."""
        return _FRAME_LIMIT_BYTES[self._stage]

    def take(self) -> bytes:
        """Return the bytes to send now. Each byte is returned once."""
        data = bytes(self._to_send)
        self._to_send.clear()
        return data

    def receive(self, body: bytes) -> None:
        """Take the body of the peer's next frame. After an exception the handshake has failed for good."""
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
            raise RemoteProtocolError(f"expected the frame {self._stage.name.lower()}, got {type(frame).__name__}")

    def _on_hello(self, hello: Hello, body: bytes) -> None:
        if hello.nonce == self._hello.nonce:
            raise RemoteProtocolError("the peer sent this side's own hello back")
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
                f"no common protocol version: {dialler.address} supports {dialler.versions[0]} to {dialler.versions[1]}"
                f", {acceptor.address} {acceptor.versions[0]} to {acceptor.versions[1]}; "
                "install the same kvroom on both",
            )
        self.peer_hello = hello
        bodies = (self._hello_body, body) if self.role is Role.DIALLER else (body, self._hello_body)
        self._transcript = b"".join(hashlib.sha256(part).digest() for part in bodies)
        self._stage = _Stage.PROOF
        if self.role is Role.DIALLER:
            self._prove()

    def _on_proof(self, proof: Proof) -> None:
        hello, theirs = self.peer_hello, _label(self.role.other)
        assert hello is not None  # set before stage PROOF
        if not auth.verify(proof.mac, self._secret, theirs, (self._transcript,)):
            dialler, acceptor = self._in_order(hello)
            self._refuse(
                "authentication",
                f"the shared secrets of {dialler.address} and {acceptor.address} differ, or one has none; "
                f"set the same {auth.SECRET_SETTING} on both",
            )
        # The secret is shared, so it does not prove which peer this is. Only the key proves the incarnation: without
        # this check a peer with the secret could take over another peer's link.
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
            # A relay forwards to this side a dialler that meant to reach the relay's address. Without a secret the
            # check is useless: the relay can end the dialler's connection itself and open one of its own.
            own = self.own_addresses
            if self._secret and own is not None and not any(_is_same_place(hello.dialled, each) for each in own):
                self._refuse(
                    "authentication",
                    f"{hello.address} dialled {hello.dialled or 'an address that it does not state'} and reached "
                    f"{' or '.join(sorted(own))}: if no relay stands between them, start the worker that was reached "
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
        """Return the error for a refusal, which is the same on the side that refuses and on the refused side."""
        reason = self._shown(frame.reason)
        if frame.kind == "busy":
            return LinkError(reason)
        return AuthenticationError(reason) if frame.kind == "authentication" else RemoteProtocolError(reason)

    def _shown(self, text: str) -> str:
        """Return a text of the peer in printable form, or a fixed text if it repeats this side's nonce or proof."""
        if auth.repeats(text, *self._sent):
            return "the peer sent this side's nonce or proof back, which is not shown; is it a kvroom manager?"
        return text if text.isprintable() else ascii(text)

    def _in_order(self, other: Hello) -> tuple[Hello, Hello]:
        return (self._hello, other) if self.role is Role.DIALLER else (other, self._hello)


def _label(role: Role) -> bytes:
    return _LABEL + role.value.encode()


def _is_same_place(dialled: str, own: str) -> bool:
    """Return True if both texts are the same address. Scope ids are not compared, because each machine has its own."""
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
    """Return the incarnation that a manager states in its hello, the first frame of a connection. It is not proven yet.

    Raises `RemoteProtocolError` for any other frame.
    """
    try:
        frame = _frames.decode(body)
    except UNDECODABLE as error:
        raise RemoteProtocolError(f"not a kvroom handshake frame: {error}") from None
    if not isinstance(frame, Hello):
        raise RemoteProtocolError(f"expected a hello, got {type(frame).__name__}")
    return frame.incarnation


def busy(reason: str) -> bytes:
    """Return the frame that an acceptor sends in place of its hello if it cannot take a connection now.

    The dialler raises `LinkError` with the reason, and may try again later.
    """
    return encode_frame(_encoder.encode(Refused("busy", reason[:MAX_REASON_CHARS])))
