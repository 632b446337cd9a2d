"""The aux message: what a prefill engine says about a request, once, with the last chunk of its room.

A room carries aux as opaque bytes. Engines of different makes can only hand over to each other if these bytes mean the
same to all of them, so the meaning is fixed here. Which request it is about is not said here: a room has an identity of
its own (`KVIdentity`), which was compared before. On the wire it is a msgpack map:

    version         1
    tokens          length of the prompt, in tokens
    first_token     id of the token that the prefill side sampled; absent if it sampled none
    first_logprob   its natural log probability; absent if the request asked for none
    cached_tokens   how many tokens of the prompt came from the prefill side's prefix cache
    extra           map of name -> bytes: what only engines that know the name can read

A field that equals its default is left out. A decode engine that needs an `extra` which is missing refuses the request.
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
    """One aux message. The fields are those of the module's table; all together may take 1 MiB."""

    tokens: _Count
    first_token: _Count | None = None
    first_logprob: float | None = None
    cached_tokens: _Count = 0
    extra: dict[str, bytes] = {}


class _Versioned(Aux, frozen=True, kw_only=True, omit_defaults=True):
    version: int


class _Version(msgspec.Struct, frozen=True):
    version: int


def encode_aux(aux: Aux) -> bytes:
    """Return the bytes of `aux`, for `KVSender.send(aux=...)`.

    Raises `LocalRoomError` for a count that the decode side would refuse, so that the engine which gave it is named.
    """
    for name in ("tokens", "first_token", "cached_tokens"):
        count = getattr(aux, name)
        if count is not None and not 0 <= count <= _MAX_COUNT:
            raise LocalRoomError(f"{name} of an aux message is {count}: give a number in [0, 2**63)")
    return msgspec.msgpack.encode(_Versioned(version=VERSION, **msgspec.structs.asdict(aux)))


def decode_aux(data: bytes) -> Aux:
    """Return the message in `data`. Raises `RemoteProtocolError` for bytes of another version or of no aux message."""
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
            f"the prefill side sent {len(data)} bytes of aux that are no aux message ({error}): "
            f"run the same version of kvroom on both sides"
        ) from None
