"""Claims: descriptions bound to the peer that states them. No peer can pass off another's description as its own.

Peers identify a transport instance by its endpoint, the public half of `Transport.key`. A claim is the description with
a signature by that key over the transport's name, the owner and the description. The owner of a manager's transport is
the run of that manager, whose incarnation the handshake of the link has proven; the owner of a candidate of `auto` is
the endpoint of that `auto`. A peer therefore gains nothing from copying another peer's description, or one candidate's
part of it, or a description of an earlier run.
"""

from __future__ import annotations

import msgspec

from kvroom.transports.base import MalformedDescription, Transport
from kvroom.wire.frames import UNDECODABLE
from kvroom.wire.keys import SigningKey, is_signed

from .descriptions import decoded

_LABEL = b"kvroom description 1, "


class SignedDescription(msgspec.Struct, frozen=True, array_like=True):
    """A description, and the signature by the key of the endpoint that it names."""

    description: bytes
    signature: bytes


class _Named(msgspec.Struct):
    """The field that the description of every transport has."""

    endpoint: bytes


def run_owner(incarnation: int) -> bytes:
    """Return the owner in the claims of the run with this incarnation."""
    return incarnation.to_bytes(8, "big")


def state(transport: Transport, owner: bytes) -> bytes:
    """Return the claim of this owner's transport, which is its signed description."""
    return signed(transport.describe(), transport.key, transport.name, owner)


def signed(description: bytes, key: SigningKey, transport: str, owner: bytes) -> bytes:
    """Return the claim that this description is that of the owner's transport, which has this name and key."""
    signature = key.sign(_LABEL + transport.encode(), _statement(owner, description))
    return msgspec.msgpack.encode(SignedDescription(description, signature))


def read(claim: bytes, transport: str, owner: bytes) -> bytes:
    """Verify a claim and return the description in it.

    Args:
        claim: The signed description, as it came from the peer.
        transport: The name of the transport that it must be signed for.
        owner: The owner that it must be signed for.

    Raises:
        MalformedDescription: The claim cannot be decoded, or the key of the endpoint that it names has not signed this
            description for this transport and owner.
    """
    try:
        stated = decoded(claim, SignedDescription)
        endpoint = decoded(stated.description, _Named).endpoint
    except UNDECODABLE as error:
        raise MalformedDescription(f"{transport}: the peer's description is malformed: {error}") from error
    statement = _statement(owner, stated.description)
    if not is_signed(stated.signature, endpoint, _LABEL + transport.encode(), statement):
        raise MalformedDescription(
            f"{transport}: the peer's description is not signed for this peer by the key that it names: it belongs to"
            " another peer or to an earlier run"
        )
    return stated.description


def _statement(owner: bytes, description: bytes) -> bytes:
    return len(owner).to_bytes(8, "big") + owner + description
