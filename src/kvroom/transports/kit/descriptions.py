"""Decoding of peers' descriptions, which are tagged structs whose tag is the transport's name."""

from __future__ import annotations

import contextlib
import threading
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from kvroom.errors import TransportError
from kvroom.transports.base import MalformedDescription
from kvroom.wire.frames import UNDECODABLE

D = TypeVar("D", bound=msgspec.Struct)
_decoding = threading.Lock()


def decoded(raw: bytes, kind: type[D]) -> D:
    """Decode a struct. May be called from any thread.

    msgspec (0.22) inspects a type at its first use, and two threads that do so at the same time can crash the process.
    """
    with _decoding:
        return msgspec.msgpack.decode(raw, type=kind)


def read_description(raw: bytes, kind: type[D]) -> D:
    """Decode a peer's description.

    Args:
        raw: The description.
        kind: A tagged struct whose tag is the transport's name.

    Raises:
        MalformedDescription: `raw` is not a description.
        TransportError: `raw` is the description of another transport. The message names both.
    """
    name = kind.__struct_config__.tag
    try:
        return decoded(raw, kind)
    except UNDECODABLE as error:
        with contextlib.suppress(*UNDECODABLE):  # suppressed if there is no valid tag either
            other = decoded(raw, _Tagged).type
            if other != name:
                raise TransportError(
                    f"this side uses transport {name}, the peer uses {other}: choose the same on both sides"
                ) from error
        raise MalformedDescription(f"{name}: the peer's description is malformed: {error}") from error


class _Tagged(msgspec.Struct):
    type: Annotated[str, Meta(pattern="^[a-z0-9_-]{1,32}$")]
