"""`kvroom fence`: the operator confirms to workers that the processes of a lost host have ended.

The confirmation goes to the workers' admin addresses (see `kvroom.cli.admin`). The exit status is 0 if every worker
accepted it and released the pages. It is 1 if a worker has lost no peer at that host, or still waits for bytes that the
host had sent, and 3 if a worker did not answer.
"""

from __future__ import annotations

import asyncio
import os
import sys

import aiohttp
import msgspec

from kvroom import FencedPeer
from kvroom.errors import ConfigurationError
from kvroom.http import http_session
from kvroom.network import load_admin_token, parse_address, read_host

from .admin import AdminClient, Unanswered
from .exit_status import CommandError, ExitStatus
from .interrupts import run_until_interrupted
from .options import FenceOptions

ANSWER_WITHIN_S = 30.0
_SHOWN_CHARS = 200


class _NotLost(CommandError):
    """A worker has lost no peer at the host. The text continues a sentence that names the worker's URL."""


class _Accepted(msgspec.Struct, frozen=True):
    fenced: tuple[FencedPeer, ...]


class _Error(msgspec.Struct, frozen=True):
    message: str


class _FenceError(msgspec.Struct, frozen=True):
    error: _Error


def run_fence(options: FenceOptions) -> int:
    """Send the confirmation to every worker and print each result. Return the exit status."""
    token = load_admin_token(os.environ)
    try:
        body = {"host": read_host(options.where)}
    except ConfigurationError:  # HOST:PORT, which names one peer
        body = {"peer": str(parse_address(options.where))}

    async def fence_all() -> int:
        async with http_session(aiohttp.ClientTimeout(total=ANSWER_WITHIN_S)) as session:
            client = AdminClient(session, token)
            return max(await asyncio.gather(*(_fence(client, url, body) for url in options.urls)))

    status = run_until_interrupted(fence_all())
    return ExitStatus.INTERRUPTED if status is None else status


async def _fence(client: AdminClient, url: str, body: dict[str, str]) -> int:
    try:
        response = await client.post(await client.admin_address(url), "/fence", body)
        try:
            if response.status == 400:
                raise _NotLost(msgspec.json.decode(response.body, type=_FenceError).error.message)
            answer = msgspec.json.decode(response.body, type=_Accepted) if response.status == 200 else None
        except msgspec.DecodeError:
            answer = None
        if answer is None:
            shown = response.body[:_SHOWN_CHARS].decode(errors="replace")
            raise Unanswered(f"answered {response.status}: {shown!r}; is it a kvroom worker (not a router)?")
    except (Unanswered, _NotLost) as error:
        print(f"kvroom fence: {url}: {error}", file=sys.stderr)
        return error.status
    for one in answer.fenced:
        pages = f"{one.pages} {'page' if one.pages == 1 else 'pages'}"
        outcome = f"{pages} released" if one.proven else (
            f"{pages} still quarantined: bytes that it had sent are not all received, or its process still runs"
        )  # fmt: skip
        print(f"{url}: {''.join(c if c.isprintable() else '?' for c in one.peer)} is fenced, {outcome}")
    return ExitStatus.DONE if all(one.proven for one in answer.fenced) else ExitStatus.FAILED
