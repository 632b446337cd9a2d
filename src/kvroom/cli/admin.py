"""Admin addresses of workers: found from the URL that an operator gives, and asked with his token.

    a router     lists its workers at `/workers`
    a worker     names its admin URL in `/server_info`
    otherwise    the URL is an admin URL itself, or a `StatusServer`'s

The token answers one challenge only, that of an admin address, and it goes to hosts that the operator has named, or
that the router has which he named. What a worker says about itself decides neither: it could name any host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import aiohttp
import msgspec

from kvroom.cli.ports import bound
from kvroom.errors import ConfigurationError, KVRoomError
from kvroom.http import Query, http_fault, request
from kvroom.network import (
    ADMIN_REALM,
    ADMIN_TOKEN_FILE_VARIABLE,
    ADMIN_TOKEN_VARIABLE,
    API_KEY_FILE_VARIABLE,
    API_KEY_VARIABLE,
    NAMES,
    HostPort,
    is_loopback,
    read_server_url,
)

ANSWER_WITHIN_S = 10.0
_VARIABLES = f"{ADMIN_TOKEN_FILE_VARIABLE} or {ADMIN_TOKEN_VARIABLE}"
_KEY_VARIABLES = f"{API_KEY_FILE_VARIABLE} or {API_KEY_VARIABLE}"
SaidT = TypeVar("SaidT")


class Unanswered(KVRoomError):
    """A server did not answer, or not us. The text ends a sentence about it."""


class AdminWindow(NamedTuple):
    """Where one worker shows its rooms. `named`: as the operator or the router has it. `url`: its admin URL."""

    named: str
    url: str
    is_trusted: bool
    """The token may be sent there."""


class Answer(NamedTuple):
    """One response, read to its end."""

    status: int
    body: bytes
    challenge: str


class _Listed(msgspec.Struct, frozen=True):
    url: str


class _Workers(msgspec.Struct, frozen=True):
    workers: tuple[_Listed, ...]


class _ServerInfo(msgspec.Struct, frozen=True):
    admin_url: str


@dataclass(frozen=True)
class AdminClient:
    """Asks for admin addresses and what they show. `token` b"": the operator has set none.

    `api_keys` are those of clients; with the first one a router that has keys lists its workers.
    """

    session: aiohttp.ClientSession
    token: bytes = field(repr=False)
    api_keys: Sequence[bytes] = field(default=(), repr=False)

    async def workers(self, url: str) -> Sequence[str]:
        """Return the URLs of the workers of a router; `url` itself if it is no router's. `Unanswered`."""
        answer = await self._send(url, "GET", "/workers")
        if answer.status == 401 and not _wants_token(answer):
            if not self.api_keys:
                raise Unanswered(f"it lists its workers only with its first API key: set {_KEY_VARIABLES} to that")
            answer = await self._send(url, "GET", "/workers", headers=_bearer(self.api_keys[0]))
            if answer.status == 401:
                raise Unanswered(f"it refuses the API key of {_KEY_VARIABLES}: give the first one of the router")
        listed = _read(answer, _Workers)
        return [url] if listed is None else [one.url for one in listed.workers]

    async def window(self, url: str) -> AdminWindow:
        """Return where the worker at `url` shows its rooms; at `url` itself if that is no worker's client URL.

        `Unanswered` if it does not answer, or if its admin address cannot be reached from here.
        """
        told = _read(await self._send(url, "GET", "/server_info"), _ServerInfo)
        if told is None:
            return AdminWindow(url, url, is_trusted=True)
        try:
            named, admin = read_server_url(url), read_server_url(told.admin_url)
        except ConfigurationError as error:
            raise Unanswered(f"its admin URL cannot be used: {error}") from None
        if not is_loopback(admin.host):
            if admin.host == named.host:
                return AdminWindow(url, str(admin), is_trusted=True)
            try:  # the addresses of the host that was named, as it is dialled
                found = await asyncio.wrap_future(NAMES.look_up(named.host, named.port or 0))
            except OSError:
                found = []
            addresses = {HostPort.of_socket(each.address).host for each in found}
            return AdminWindow(url, str(admin), admin.host in addresses)
        if not await asyncio.to_thread(_is_of_this_machine, named.host):
            raise Unanswered(
                f"its admin address {admin} is loopback on another host: run this command there, or start the worker "
                "with --admin-host"
            )
        return AdminWindow(url, str(admin), is_trusted=True)

    async def ask(self, window: AdminWindow, path: str, query: Query | None = None) -> Answer:
        """Ask an admin address, with the token if it wants one. `Unanswered`, also where the token is not right."""
        return await self._admitted(window, "GET", path, query=query)

    async def tell(self, window: AdminWindow, path: str, body: Mapping[str, str]) -> Answer:
        """Post a JSON object to an admin address, as `ask` does."""
        return await self._admitted(window, "POST", path, json=body)

    async def _admitted(self, window: AdminWindow, method: str, path: str, **options: Any) -> Answer:
        answer = await self._send(window.url, method, path, **options)
        if not _wants_token(answer):
            return answer
        if not window.is_trusted:
            raise Unanswered(
                f"its admin address {window.url} is on another host than {window.named}, and the token goes to no host "
                f"that was not named: give {window.url}"
            )
        if not self.token:
            raise Unanswered(f"its admin address {window.url} needs a token: set {_VARIABLES} to that of the worker")
        answer = await self._send(window.url, method, path, headers=_bearer(self.token), **options)
        if _wants_token(answer):
            raise Unanswered(f"its admin address {window.url} refuses the token of {_VARIABLES}: it has another one")
        return answer

    async def _send(self, url: str, method: str, path: str, **options: Any) -> Answer:
        try:
            async with request(self.session, method, url, path, **options) as response:
                challenge = response.headers.get("WWW-Authenticate", "")
                return Answer(response.status, await response.read(), challenge)
        except asyncio.TimeoutError:
            raise Unanswered(f"no answer within {self.session.timeout.total:g} s; is the worker up?") from None
        except aiohttp.ClientError as error:
            raise Unanswered(f"no answer: {http_fault(error)}; is the worker up?") from None
        except ConfigurationError as error:  # a URL that a router listed
            raise Unanswered(str(error)) from None


def _bearer(token: bytes) -> dict[str, str]:
    return {"Authorization": f"Bearer {token.decode()}"}


def _read(answer: Answer, expected: type[SaidT]) -> SaidT | None:
    """Return what a server says about itself; None if it says nothing of this kind."""
    if answer.status != 200:
        return None
    try:
        return msgspec.json.decode(answer.body, type=expected)
    except msgspec.DecodeError:
        return None


def _wants_token(answer: Answer) -> bool:
    return answer.status == 401 and answer.challenge == f'Bearer realm="{ADMIN_REALM}"'


def _is_of_this_machine(host: str) -> bool:
    """Return True if this machine has an address of `host`: then its loopback is that of the server there."""
    try:
        with bound(host, 0, "the worker"):
            return True
    except ConfigurationError:
        return False
