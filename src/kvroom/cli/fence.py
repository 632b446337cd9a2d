"""`kvroom fence`: the operator's word to workers that the processes of a lost host have ended.

Workers are told at their admin addresses (see `kvroom.cli.admin`). Exit status 0: every worker took it, and the pages
are back. 1: a worker did not answer, lost no such peer, or still waits for bytes that the host had sent.
"""

from __future__ import annotations

import asyncio
import os
import sys

import aiohttp
import msgspec

from kvroom import FencedPeer
from kvroom.cli.admin import AdminClient, Unanswered
from kvroom.cli.interrupts import run_until_interrupted
from kvroom.cli.options import FenceOptions
from kvroom.errors import ConfigurationError
from kvroom.http import http_session
from kvroom.network import load_admin_token, parse_address, read_host

ANSWER_WITHIN_S = 30.0
_SHOWN_CHARS = 200


class _Taken(msgspec.Struct, frozen=True):
    fenced: tuple[FencedPeer, ...]


class _Error(msgspec.Struct, frozen=True):
    message: str


class _NotTaken(msgspec.Struct, frozen=True):
    error: _Error


def run_fence(options: FenceOptions) -> int:
    """Tell every worker, and print what each of them made of it."""
    token = load_admin_token(os.environ)
    try:
        body = {"host": read_host(options.where)}
    except ConfigurationError:  # with a port, it names one peer
        body = {"peer": str(parse_address(options.where))}

    async def tell_all() -> int:
        async with http_session(aiohttp.ClientTimeout(total=ANSWER_WITHIN_S)) as session:
            client = AdminClient(session, token)
            return max(await asyncio.gather(*(_tell(client, url, body) for url in options.urls)))

    status = run_until_interrupted(tell_all())
    return 1 if status is None else status


async def _tell(client: AdminClient, url: str, body: dict[str, str]) -> int:
    try:
        told = await client.tell(await client.window(url), "/fence", body)
        try:
            if told.status == 400:
                raise Unanswered(msgspec.json.decode(told.body, type=_NotTaken).error.message)
            answer = msgspec.json.decode(told.body, type=_Taken) if told.status == 200 else None
        except msgspec.DecodeError:
            answer = None
        if answer is None:
            said = told.body[:_SHOWN_CHARS].decode(errors="replace")
            raise Unanswered(f"answered {told.status}: {said!r}; is it a kvroom worker (not its router)?")
    except Unanswered as error:
        print(f"kvroom fence: {url}: {error}", file=sys.stderr)
        return 1
    for one in answer.fenced:
        pages = f"{one.pages} {'page' if one.pages == 1 else 'pages'}"
        outcome = f"{pages} released" if one.proven else (
            f"{pages} wait on: bytes that it had sent are not all taken in, or its process is seen to run"
        )  # fmt: skip
        print(f"{url}: {''.join(c if c.isprintable() else '?' for c in one.peer)} is fenced, {outcome}")
    return 0 if all(one.proven for one in answer.fenced) else 1
