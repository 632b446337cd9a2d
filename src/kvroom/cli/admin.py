"""Find the admin addresses of workers from the URL that an operator gives, and query them with the operator's token.

    a router     lists its workers at `/workers`
    a worker     names its admin URL in `/server_info`
    otherwise    the URL is itself an admin URL, or that of a `StatusServer`

The token is sent only in answer to the challenge of an admin address, and only to hosts that the operator has named or
that a router lists which the operator has named. The admin URL in a worker's `/server_info` is not enough: a malicious
worker could name any host there and collect the token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import aiohttp
import msgspec

from kvroom.errors import ConfigurationError
from kvroom.http import Query, describe_http_error, request
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

from .exit_status import CommandError, ExitStatus
from .ports import bound

ANSWER_WITHIN_S = 10.0
_VARIABLES = f"{ADMIN_TOKEN_FILE_VARIABLE} or {ADMIN_TOKEN_VARIABLE}"
_KEY_VARIABLES = f"{API_KEY_FILE_VARIABLE} or {API_KEY_VARIABLE}"
ReadT = TypeVar("ReadT")


class Unanswered(CommandError):
    """A server did not answer, or refused to answer this client. The text continues a sentence that names the URL.

    Args:
        reason: the text.
        role: the role of the worker if its router or the worker itself has named it, or "".
    """

    status = ExitStatus.NO_ANSWER

    def __init__(self, reason: str, role: str = "") -> None:
        super().__init__(reason)
        self.role = role


class AdminAddress(NamedTuple):
    """The admin address of one worker."""

    named: str
    """The worker's URL as the operator gave it or as the router lists it."""
    url: str
    """The admin URL."""
    is_trusted: bool
    """True if the token may be sent to `url`."""
    role: str = ""
    """The worker's role, `prefill` or `decode`, if it names one in `/server_info`."""


class Answer(NamedTuple):
    """One HTTP response with its whole body. `challenge` is its `WWW-Authenticate` header, or ""."""

    status: int
    body: bytes
    challenge: str


class ListedWorker(msgspec.Struct, frozen=True):
    """A worker in a router's list."""

    url: str
    """Its client URL."""
    worker_type: str = ""
    """Its role, `prefill` or `decode`, if the router names it."""


class _Workers(msgspec.Struct, frozen=True):
    workers: tuple[ListedWorker, ...]


class _ServerInfo(msgspec.Struct, frozen=True):
    admin_url: str
    disaggregation_mode: str = ""


@dataclass(frozen=True)
class AdminClient:
    """Client of routers and of admin addresses. `token` is b"" if the operator has set none.

    `api_keys` are the keys of clients. A router with API keys lists its workers only for its first key.
    """

    session: aiohttp.ClientSession
    token: bytes = field(repr=False)
    api_keys: Sequence[bytes] = field(default=(), repr=False)

    async def workers(self, url: str) -> Sequence[str]:
        """Return the URLs of a router's workers, or `url` alone if it is not a router; the errors of `listed`."""
        listed = await self.listed(url)
        return [url] if listed is None else [one.url for one in listed]

    async def listed(self, url: str) -> Sequence[ListedWorker] | None:
        """Return the workers that a router lists, or None if `url` is not a router.

        Raises `Unanswered` if the server does not answer or asks for another API key.
        """
        answer = await self._send(url, "GET", "/workers")
        if answer.status == 401 and not _wants_token(answer):
            if not self.api_keys:
                raise Unanswered(f"it lists its workers only for its first API key: set {_KEY_VARIABLES} to that key")
            answer = await self._send(url, "GET", "/workers", headers=_bearer(self.api_keys[0]))
            if answer.status == 401:
                raise Unanswered(f"it refused the API key of {_KEY_VARIABLES}: use the router's first key")
        listed = _read(answer, _Workers)
        return None if listed is None else listed.workers

    async def admin_address(self, url: str) -> AdminAddress:
        """Return the admin address of the worker at `url`: `url` itself, unless that is a worker's client URL.

        Raises `Unanswered` if the worker does not answer, or if its admin address cannot be reached from this machine.
        """
        info = _read(await self._send(url, "GET", "/server_info"), _ServerInfo)
        if info is None:
            return AdminAddress(url, url, is_trusted=True)
        role = info.disaggregation_mode if info.disaggregation_mode in ("prefill", "decode") else ""
        try:
            named, admin = read_server_url(url), read_server_url(info.admin_url)
        except ConfigurationError as error:
            raise Unanswered(f"its admin URL is invalid: {error}") from None
        if not is_loopback(admin.host):
            if admin.host == named.host:
                return AdminAddress(url, str(admin), is_trusted=True, role=role)
            # The host that was named may be a name of the same machine: compare addresses as a client resolves them.
            try:
                found = await asyncio.wrap_future(NAMES.look_up(named.host, named.port or 0))
            except OSError:
                found = []
            addresses = {HostPort.of_socket(each.address).host for each in found}
            return AdminAddress(url, str(admin), admin.host in addresses, role)
        if not await asyncio.to_thread(_is_of_this_machine, named.host):
            raise Unanswered(
                f"its admin address {admin} is loopback on another host: run this command there, or start the worker "
                "with --admin-host",
                role,
            )
        return AdminAddress(url, str(admin), is_trusted=True, role=role)

    async def get(self, where: AdminAddress, path: str, query: Query | None = None) -> Answer:
        """Send a GET to an admin address, with the token if the address demands one.

        Raises `Unanswered` if there is no answer, if a token is needed and none is set, and if the token is refused.
        """
        return await self._authorized(where, "GET", path, query=query)

    async def post(self, where: AdminAddress, path: str, body: Mapping[str, str]) -> Answer:
        """Send a POST with a JSON object to an admin address; the token and the errors are those of `get`."""
        return await self._authorized(where, "POST", path, json=body)

    async def _authorized(self, where: AdminAddress, method: str, path: str, **options: Any) -> Answer:
        answer = await self._send(where.url, method, path, **options)
        if not _wants_token(answer):
            return answer
        if not where.is_trusted:
            raise Unanswered(
                f"its admin address {where.url} is on another host than {where.named}, and the token is sent only to "
                f"hosts that were named: give {where.url}"
            )
        if not self.token:
            raise Unanswered(f"its admin address {where.url} needs a token: set {_VARIABLES} to the worker's token")
        answer = await self._send(where.url, method, path, headers=_bearer(self.token), **options)
        if _wants_token(answer):
            raise Unanswered(
                f"its admin address {where.url} refused the token of {_VARIABLES}: set it to the worker's token"
            )
        return answer

    async def _send(self, url: str, method: str, path: str, **options: Any) -> Answer:
        try:
            async with request(self.session, method, url, path, **options) as response:
                challenge = response.headers.get("WWW-Authenticate", "")
                return Answer(response.status, await response.read(), challenge)
        except asyncio.TimeoutError:
            raise Unanswered(
                f"no answer: timed out after {self.session.timeout.total:g} s; is the worker up?"
            ) from None
        except aiohttp.ClientConnectionError as error:
            raise Unanswered(f"no answer: {describe_http_error(error)}; is the worker up?") from None
        except aiohttp.ClientError as error:  # bytes came, and they are no HTTP response
            raise Unanswered(f"{describe_http_error(error)}; is it a kvroom worker or its router?") from None
        except ConfigurationError as error:  # a URL that a router listed
            raise Unanswered(str(error)) from None


def _bearer(token: bytes) -> dict[str, str]:
    return {"Authorization": f"Bearer {token.decode()}"}


def _read(answer: Answer, expected: type[ReadT]) -> ReadT | None:
    """Decode the body of an answer; None if the status is not 200 or the body is not an `expected`."""
    if answer.status != 200:
        return None
    try:
        return msgspec.json.decode(answer.body, type=expected)
    except msgspec.DecodeError:
        return None


def _wants_token(answer: Answer) -> bool:
    return answer.status == 401 and answer.challenge == f'Bearer realm="{ADMIN_REALM}"'


def _is_of_this_machine(host: str) -> bool:
    """Return True if `host` names an address of this machine, whose loopback is then also that of the server."""
    try:
        with bound(host, 0, "the worker"):
            return True
    except ConfigurationError:
        return False
