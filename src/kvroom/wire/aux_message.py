"""The aux message: metadata of a request that a prefill engine sends once, with the last chunk of its room.

A room carries aux as opaque bytes. Different engines can hand over to each other only if these bytes have one meaning,
which is defined here. The message does not identify the request: the room has compared its identity (`KVIdentity`)
before. On the wire it is a msgpack map:

    version         1
    tokens          length of the prompt, in tokens
    first_token     id of the token that the prefill side sampled; absent if it sampled none
    first_logprob   its natural log probability; absent if the request asked for none
    cached_tokens   how many tokens of the prompt came from the prefill side's prefix cache
    extra           map of name -> bytes: data that only engines with support for the name can read

A field that equals its default is left out. A decode engine that requires an `extra` refuses a request without it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from kvroom.errors import LocalRoomError, RemoteProtocolError

from .frames import UNDECODABLE

VERSION = 1
_MAX_COUNT = 2**63 - 1
_Count = Annotated[int, Meta(ge=0, le=_MAX_COUNT)]


class Aux(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The metadata of a request that the prefill side sends with its last chunk; 1 MiB at most when encoded."""

    tokens: _Count
    """Length of the prompt in tokens."""
    first_token: _Count | None = None
    """Id of the token that the prefill side sampled, None if it sampled none."""
    first_logprob: float | None = None
    """Natural log probability of `first_token`, None if the request asked for none."""
    cached_tokens: _Count = 0
    """Tokens of the prompt that came from the prefill side's prefix cache."""
    extra: dict[str, bytes] = {}
    """Data by name that only engines with support for the name can read."""


class _Versioned(Aux, frozen=True, kw_only=True, omit_defaults=True):
    version: int


class _Version(msgspec.Struct, frozen=True):
    version: int


def encode_aux(aux: Aux) -> bytes:
    """Return the bytes of `aux`, for `KVSender.send(aux=...)`.

    Raises:
        LocalRoomError: a count is out of range. The decode side would refuse it, but could not name the engine at
            fault.
    """
    for name in ("tokens", "first_token", "cached_tokens"):
        count = getattr(aux, name)
        if count is not None and not 0 <= count <= _MAX_COUNT:
            raise LocalRoomError(f"{name} of an aux message is {count}: give a number in [0, 2**63)")
    return msgspec.msgpack.encode(_Versioned(version=VERSION, **msgspec.structs.asdict(aux)))


def decode_aux(data: bytes) -> Aux:
    """Return the aux message in `data`.

    Raises:
        RemoteProtocolError: the bytes are not an aux message, or one of another version.
    """
    try:
        version = msgspec.msgpack.decode(data, type=_Version).version
        if version != VERSION:
            raise RemoteProtocolError(
                f"the prefill side sent an aux message of version {version}, this side reads version {VERSION}: "
                f"run the same version of kvroom on both sides"
            )
        return msgspec.msgpack.decode(data, type=_Versioned)
    except UNDECODABLE as error:
        raise RemoteProtocolError(
            f"the prefill side sent {len(data)} bytes of aux that are not an aux message ({error}): "
            f"run the same version of kvroom on both sides"
        ) from None
