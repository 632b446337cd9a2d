"""`kvroom fence`: the operator's word to workers that the processes of a lost host have ended.

Exit status 0: every worker took it, and the pages are back. 1: a worker did not answer, lost no such peer, or still
waits for bytes that the host had sent.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

import aiohttp
import msgspec

from kvroom.cli.interrupts import run_until_interrupted
from kvroom.dialling.http import http_fault, http_session, request
from kvroom.errors import ConfigurationError, KVRoomError
from kvroom.runtime.manager import Fenced
from kvroom.wire.address import parse_address, read_host

ANSWER_WITHIN_S = 30.0
_SHOWN_CHARS = 200


class _Answer(msgspec.Struct, frozen=True):
    fenced: tuple[Fenced, ...]


class _Error(msgspec.Struct, frozen=True):
    message: str


class _Refused(msgspec.Struct, frozen=True):
    error: _Error


class _NotTaken(KVRoomError):
    """A worker did not take the word; the text says why."""


def run_fence(options: argparse.Namespace) -> int:
    """Tell every worker, and print what each of them made of it."""
    body = _body(options.where)
    status = run_until_interrupted(_fence(options.urls, body))
    return 1 if status is None else status


def _body(where: str) -> dict[str, str]:
    """Return the body of `/fence` for a host, or for an address with a port."""
    try:
        return {"host": read_host(where)}
    except ConfigurationError:
        return {"peer": str(parse_address(where))}


async def _fence(urls: Sequence[str], body: dict[str, str]) -> int:
    async with http_session(aiohttp.ClientTimeout(total=ANSWER_WITHIN_S)) as session:
        return max(await asyncio.gather(*(_tell(session, url, body) for url in urls)))


async def _tell(session: aiohttp.ClientSession, url: str, body: dict[str, str]) -> int:
    try:
        async with request(session, "POST", url, "/fence", json=body) as response:
            answer = _read(response.status, await response.read())
    except asyncio.TimeoutError:
        return _not_taken(url, f"no answer within {ANSWER_WITHIN_S:g} s")
    except aiohttp.ClientError as error:
        return _not_taken(url, f"no answer: {http_fault(error)}; is the worker up?")
    except _NotTaken as error:
        return _not_taken(url, str(error))
    for one in answer.fenced:
        pages = f"{one.pages} {'page' if one.pages == 1 else 'pages'}"
        outcome = f"{pages} released" if one.proven else (
            f"{pages} wait on: bytes that it had sent are not all taken in, or its process is seen to run"
        )  # fmt: skip
        print(f"{url}: {''.join(c if c.isprintable() else '?' for c in one.peer)} is fenced, {outcome}")
    return 0 if all(one.proven for one in answer.fenced) else 1


def _read(status: int, body: bytes) -> _Answer:
    try:
        if status == 400:
            raise _NotTaken(msgspec.json.decode(body, type=_Refused).error.message)
        if status == 200:
            return msgspec.json.decode(body, type=_Answer)
    except msgspec.DecodeError:
        pass
    said = body[:_SHOWN_CHARS].decode(errors="replace")
    raise _NotTaken(f"answered {status}: {said!r}; is it a kvroom worker (not its router)?")


def _not_taken(url: str, why: str) -> int:
    print(f"kvroom fence: {url}: {why}", file=sys.stderr)
    return 1
