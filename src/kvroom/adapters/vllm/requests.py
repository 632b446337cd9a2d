"""The task of this connector for a request, which is read from the request's `kv_transfer_params` alone.

Routers drive a pair in one of two modes, which the parameters show:

    one after the other  The producer gets `do_remote_decode`, chooses the room when the prompt is computed, and replies
                         with the parameters for the consumer (`do_remote_prefill`, `bootstrap_*`).
    in parallel          Both get `bootstrap_host`, `bootstrap_port` and `bootstrap_room`, and either may come first. An
                         engine that is both producer and consumer needs `do_remote_decode` or `do_remote_prefill` to
                         know its role.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kvroom import ROOM_NUMBERS, KVIdentity
from kvroom.errors import KVRoomError
from kvroom.network import HostPort

DEFAULT_BOOTSTRAP_PORT = 8998


class RequestError(KVRoomError):
    """The parameters of a request are invalid, or ask for something that is not supported."""


class Produce(NamedTuple):
    """Compute the prompt and hand it over in `room`, or, for None, in a room that is chosen at the end."""

    room: int | None


class Consume(NamedTuple):
    """Load the prompt's blocks from the room."""

    room: int
    bootstrap_addr: str


def wanted(params: Mapping[str, Any] | None, *, produces: bool, consumes: bool) -> Produce | Consume | None:
    """Return the task of an engine with these roles for a request, or None if it has none.

    Raises:
        RequestError: The parameters are invalid or contradict the engine's role.
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
        raise RequestError(f"kv_transfer_params has {flag}, but this engine is a kv_{role}: send it to the other one")
    return Produce(None if room is None else _room(room)) if sends else _consume(params, room)


def request_identity(request: Any) -> KVIdentity:
    """Return the properties of a vLLM request that determine its KV cache, for a given model.

    They are the token ids, images and the like, the name of the LoRA adapter, and the cache salt.

    Raises:
        RequestError: The prompt has no token ids.
    """
    tokens = request.prompt_token_ids
    if tokens is None:
        raise RequestError(
            "the prompt was given as embeddings, which have no token ids to compare: give text or tokens"
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
            "kv_transfer_params asks to load a prompt but has no bootstrap_room: pass on the kv_transfer_params of a "
            "producer's reply that runs this connector, too"
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
        raise RequestError(f"bootstrap_room is {room!r}: give one int of at least 0, below 2**63, for each request")
    return room
