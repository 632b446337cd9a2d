"""Checks of a request's room and bootstrap address, in the HTTP server's process.

SGLang passes both on to its scheduler as they come, and its decode scheduler ends with an exception if a request has
no `bootstrap_host`. Here such a request is answered with status 400 and one sentence, before the scheduler sees it.
Requests that SGLang sends to itself, to warm up or as a health check, carry a host of its own and are left alone.
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
    """A request whose room or bootstrap address cannot be used. SGLang answers a `ValueError` with status 400."""


def install_in_server() -> None:
    """Register the hooks of the HTTP server's process. Idempotent."""
    install(
        (f"{_TOKENIZER}._handle_batch_request", HookType.AROUND, count_samples),
        (f"{_TOKENIZER}._send_one_request", HookType.BEFORE, check_request),
        (f"{_TOKENIZER}._send_one_request", HookType.BEFORE, number_sample),
        (f"{_TOKENIZER}._send_batch_request", HookType.BEFORE, check_requests),
    )


def check_requests(manager: Any, requests: Iterable[Any]) -> None:
    """Before several requests go to the scheduler at a time: check each, see `check_request`."""
    for request in requests:
        check_request(manager, request)


def check_request(manager: Any, request: Any) -> None:  # noqa: ARG001 - a BEFORE hook
    """Before a request goes to the scheduler: raise `InvalidBootstrap` if its room or address cannot be used.

    A request without a room is left to SGLang, which refuses it by itself.
    """
    host, room = getattr(request, "bootstrap_host", None), getattr(request, "bootstrap_room", None)
    if host == FAKE_BOOTSTRAP_HOST or room is None:
        return
    if not is_room(room):
        raise InvalidBootstrap(f"bootstrap_room is {room!r}: {ROOM_RULE}")
    # Both legs of a request carry the address of the prefill server's directory. A prefill server does not use it. It
    # refuses a wrong one all the same: the decode side will, and the prompt would be computed for a decode side that
    # never comes.
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
