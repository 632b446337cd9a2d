"""The part of the connector that reads a request's `kv_transfer_params`, which alone decide what happens with it.

Routers drive a pair in two ways:

    in turn      the producer gets `do_remote_decode`, chooses the room when the prompt is computed, and replies with
                 the parameters for the consumer (`do_remote_prefill`, `bootstrap_*`)
    both at once both engines get `bootstrap_host`, `bootstrap_port` and `bootstrap_room`, and either may be first. An
                 engine that is both producer and consumer also needs `do_remote_decode` or `do_remote_prefill`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kvroom import ROOM_NUMBERS, KVIdentity
from kvroom.errors import KVRoomError
from kvroom.network import HostPort

DEFAULT_BOOTSTRAP_PORT = 8998


class RequestError(KVRoomError):
    """The `kv_transfer_params` of a request are invalid, or do not fit this engine or this prompt."""


class Produce(NamedTuple):
    """Compute the prompt and hand it over."""

    room: int | None
    """None if this engine chooses the room itself, once the prompt is computed."""


class Consume(NamedTuple):
    """Load the prompt's KV cache, which another engine computes."""

    room: int
    bootstrap_addr: str
    """The address of the producer's bootstrap directory, "host:port"."""


def read_params(params: Mapping[str, Any] | None, *, produces: bool, consumes: bool) -> Produce | Consume | None:
    """Return this engine's part in a request with these `kv_transfer_params`; None for an ordinary request.

    Args:
        params: The request's `kv_transfer_params`, as its client sent them.
        produces: True if this engine has the role of a producer.
        consumes: True if this engine has the role of a consumer. An engine may have both.

    Raises:
        RequestError: The parameters are invalid or belong to the other engine. The message names the remedy.
    """
    if not params:
        return None
    sends, loads = bool(params.get("do_remote_decode")), bool(params.get("do_remote_prefill"))
    room = params.get("bootstrap_room")
    if not sends and not loads:
        if room is None:
            return None
        if produces and consumes:
            raise RequestError(
                "kv_transfer_params has a bootstrap_room, and this engine is both producer and consumer: add "
                "do_remote_decode (it prefills) or do_remote_prefill (it decodes)"
            )
        sends, loads = produces, consumes
    if sends and loads:
        raise RequestError("kv_transfer_params has both do_remote_decode and do_remote_prefill: set one of them")
    if (sends and not produces) or (loads and not consumes):
        flag, role = ("do_remote_decode", "consumer") if sends else ("do_remote_prefill", "producer")
        raise RequestError(
            f"kv_transfer_params has {flag}, but this engine is a kv_{role}: send the request to the other engine"
        )
    return Produce(None if room is None else _room(room)) if sends else _consume(params, room)


def request_identity(request: Any) -> KVIdentity:
    """Return the identity of a vLLM request: everything besides the model that determines its KV cache.

    That is the token ids, the images and other media, the name of the LoRA adapter, and the cache salt. Raises
    `RequestError` for a prompt without token ids.
    """
    tokens = request.prompt_token_ids
    if tokens is None:
        raise RequestError(
            "the prompt was given as embeddings, so there are no token ids to compare: give text or token ids"
        )
    adapter = getattr(request, "lora_request", None)
    return KVIdentity.of(
        tokens,
        adapter="" if adapter is None else str(adapter.lora_name),
        cache_salt=getattr(request, "cache_salt", None) or "",
        images=[str(feature.identifier) for feature in getattr(request, "mm_features", None) or ()],
    )


def _consume(params: Mapping[str, Any], room: object) -> Consume:
    if room is None:
        raise RequestError(
            "kv_transfer_params asks to load a prompt but has no bootstrap_room: send the kv_transfer_params from the "
            "reply of a producer that runs this connector"
        )
    host, port = params.get("bootstrap_host"), params.get("bootstrap_port")
    if not isinstance(host, str) or not host:
        raise RequestError(f"bootstrap_host is {host!r}: give the host of the producer's bootstrap directory")
    if port is None:
        port = DEFAULT_BOOTSTRAP_PORT
    if type(port) is not int or not 0 < port < 65536:
        raise RequestError(f"bootstrap_port is {port!r}: give the port of the producer's bootstrap directory")
    return Consume(_room(room), str(HostPort.to_dial(host, port)))


def _room(room: object) -> int:
    if type(room) is not int or not 0 <= room < ROOM_NUMBERS:
        raise RequestError(
            f"bootstrap_room is {room!r}: give an int of at least 0 and below 2**63, another one for each request"
        )
    return room
