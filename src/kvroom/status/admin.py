"""Admission to an admin address: what is shown there, and may be done there, is for the operator alone.

With a token, a request needs `Authorization: Bearer TOKEN`. Without one the address is on loopback, where every process
of the machine is trusted, and what is kept out is a web page in a browser of this machine. Such a page reaches loopback
in two ways, and both can be told from the headers:

    under a name of its own that resolves to 127.0.0.1 (DNS rebinding): `Host` has that name
    by a request across sites: browsers add `Origin` (Fetch standard, 3.2) or `Sec-Fetch-Site` (Fetch Metadata)
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from kvroom.errors import ConfigurationError
from kvroom.wire.address import is_loopback, read_listen_host, read_server_url
from kvroom.wire.auth import ADMIN_REALM, ADMIN_TOKEN_FILE_VARIABLE, ADMIN_TOKEN_VARIABLE, bears, require_admin_token

from .answers import error_response

_OWN_SITE = ("none", "same-origin")
_SHOWN_CHARS = 100
_WHICH_TOKEN = f"with the token of its {ADMIN_TOKEN_FILE_VARIABLE} or {ADMIN_TOKEN_VARIABLE}"


@dataclass(frozen=True)
class Admission:
    """Who may ask an admin address that listens at `host`. `ConfigurationError` beyond loopback without a token."""

    host: str = "127.0.0.1"
    token: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        require_admin_token(self.host, self.token)

    def middleware(self) -> Middleware:
        """Return the middleware that refuses all others, before a body is read and whatever the path."""

        @web.middleware
        async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
            if not self.token:
                refusal = self._refuse_pages(request)
                return await handler(request) if refusal is None else refusal
            if bears(request.headers.getall("Authorization", []), [self.token]):
                return await handler(request)
            response = error_response(401, f"this admin address needs `Authorization: Bearer TOKEN`, {_WHICH_TOKEN}")
            response.headers["WWW-Authenticate"] = f'Bearer realm="{ADMIN_REALM}"'
            return response

        return admit

    def _refuse_pages(self, request: web.Request) -> web.Response | None:
        hosts = request.headers.getall("Host", [])
        is_ours = is_own_page = False
        if len(hosts) == 1 and "/" not in hosts[0]:  # a URL is no value of this header
            with suppress(ConfigurationError):
                host = read_server_url(hosts[0]).host
                is_ours = is_loopback(host) or host == read_listen_host(self.host)
        if not is_ours:
            shown = ", ".join(hosts)[:_SHOWN_CHARS]
            return error_response(403, f"Host {shown!r} is not loopback: ask this admin address as 127.0.0.1")
        origins = request.headers.getall("Origin", [])
        sites = request.headers.getall("Sec-Fetch-Site", [])
        with suppress(ConfigurationError):  # a page is ours if it came from the server that it now asks
            is_own_page = all(read_server_url(origin) == read_server_url(hosts[0]) for origin in origins)
        if not is_own_page or any(site not in _OWN_SITE for site in sites):
            return error_response(403, "a request of another web site is refused here: ask with curl or kvroom")
        return None
