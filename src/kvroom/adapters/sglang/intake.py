"""Checks of a request's room number and bootstrap address, in the process of SGLang's HTTP server.

SGLang passes both to its scheduler unchecked, and its decode scheduler ends with an exception if a request has no
`bootstrap_host`. These hooks answer such a request with status 400 and one sentence before it reaches the scheduler.
They ignore requests that SGLang sends to itself as warm-up or health check, which name a special host.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_disagg

from kvroom.errors import ConfigurationError, KVRoomError
from kvroom.network import HostPort

from .hooks import install
from .leg import ROOM_RULE, is_room
from .samples import count_samples, number_sample

_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"


class InvalidBootstrap(KVRoomError, ValueError):
    """The room number or bootstrap address of a request is invalid. SGLang answers a `ValueError` with status 400."""


def install_in_server() -> None:
    """Register the hooks of the HTTP server's process. Idempotent."""
    install(
        (f"{_TOKENIZER}._handle_batch_request", HookType.AROUND, count_samples),
        (f"{_TOKENIZER}._send_one_request", HookType.BEFORE, check_request),
        (f"{_TOKENIZER}._send_one_request", HookType.BEFORE, number_sample),
        (f"{_TOKENIZER}._send_batch_request", HookType.BEFORE, check_requests),
    )


def check_requests(manager: Any, requests: Iterable[Any]) -> None:
    """Check several requests as `check_request` does. Runs before they go to the scheduler in one message."""
    for request in requests:
        check_request(manager, request)


def check_request(manager: Any, request: Any) -> None:  # noqa: ARG001 - a BEFORE hook
    """Raise `InvalidBootstrap` if the room number or address is invalid. Runs before a request goes to the scheduler.

    A request without a room number passes, because SGLang itself refuses it.
    """
    host, room = getattr(request, "bootstrap_host", None), getattr(request, "bootstrap_room", None)
    if host == FAKE_BOOTSTRAP_HOST or room is None:
        return
    if not is_room(room):
        raise InvalidBootstrap(f"bootstrap_room is {room!r}: {ROOM_RULE}")
    # Both legs of a request carry the address of the prefill server's directory, and only the decode side uses it. The
    # prefill side refuses an invalid one, too: otherwise it would compute the prompt for a decode side that refuses the
    # request.
    if host is None and get_disagg().disaggregation_mode != "decode":
        return
    port: Any = getattr(request, "bootstrap_port", None)
    if not isinstance(host, str) or not host:
        raise InvalidBootstrap(
            f"bootstrap_host is {host!r}: give the host of the prefill server, or send the request through a router "
            f"for prefill and decode, which adds it"
        )
    try:
        HostPort.to_dial(host, port)
    except ConfigurationError as error:
        raise InvalidBootstrap(f"bootstrap_host is {host!r} and bootstrap_port {port!r}: {error}") from None
