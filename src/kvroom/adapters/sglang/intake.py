"""Checks of a request's room and bootstrap address, in the HTTP server's process.

SGLang passes both to its scheduler unchecked, and its decode scheduler ends with an exception if a request has no
`bootstrap_host`. Here such a request gets status 400 and one sentence before the scheduler sees it. SGLang's own
requests, for warm-up and health checks, have a special host and are not checked.
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
    """The room or the bootstrap address of a request is invalid. SGLang answers a `ValueError` with status 400."""


def install_in_server() -> None:
    """Register the hooks of the HTTP server's process. Idempotent."""
    install(
        (f"{_TOKENIZER}._handle_batch_request", HookType.AROUND, count_samples),
        (f"{_TOKENIZER}._send_one_request", HookType.BEFORE, check_request),
        (f"{_TOKENIZER}._send_one_request", HookType.BEFORE, number_sample),
        (f"{_TOKENIZER}._send_batch_request", HookType.BEFORE, check_requests),
    )


def check_requests(manager: Any, requests: Iterable[Any]) -> None:
    """Check each of several requests before they go to the scheduler together, see `check_request`."""
    for request in requests:
        check_request(manager, request)


def check_request(manager: Any, request: Any) -> None:  # noqa: ARG001 - a BEFORE hook
    """Raise `InvalidBootstrap` if the room or address of a request is invalid, before it goes to the scheduler.

    A request without a room is left to SGLang, which refuses it itself.
    """
    host, room = getattr(request, "bootstrap_host", None), getattr(request, "bootstrap_room", None)
    if host == FAKE_BOOTSTRAP_HOST or room is None:
        return
    if not is_room(room):
        raise InvalidBootstrap(f"bootstrap_room is {room!r}: {ROOM_RULE}")
    # Both legs of a request carry the address of the prefill server's directory. A prefill server does not use it, but
    # refuses an invalid one nevertheless: the decode side will refuse it, so the prompt would be computed for nothing.
    if host is None and get_disagg().disaggregation_mode != "decode":
        return
    port: Any = getattr(request, "bootstrap_port", None)
    if not isinstance(host, str) or not host:
        raise InvalidBootstrap(
            f"bootstrap_host is {host!r}: give the host of the prefill server, which a router for prefill and decode "
            f"adds to each request"
        )
    try:
        HostPort.to_dial(host, port)
    except ConfigurationError as error:
        raise InvalidBootstrap(f"bootstrap_host is {host!r} and bootstrap_port {port!r}: {error}") from None
