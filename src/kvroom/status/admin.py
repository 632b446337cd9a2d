"""Admission to the admin address, whose routes are for the operator only.

With a token, a request needs `Authorization: Bearer TOKEN`. Without one, the address is on loopback, where every
process of the machine is trusted. A web page in a browser on this machine is not trusted, and can reach loopback in two
ways, which the headers reveal:

    under its own host name, which resolves to 127.0.0.1 (DNS rebinding): `Host` has that name
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
    """The rule by which an admin address answers or refuses requests.

    Raises:
        ConfigurationError: the host is beyond loopback and there is no token, or the token is too short.
    """

    host: str = "127.0.0.1"
    """The host at which the address listens."""
    token: bytes = field(default=b"", repr=False)
    """The token that requests must carry; empty on loopback if none is required."""

    def __post_init__(self) -> None:
        require_admin_token(self.host, self.token)

    def middleware(self) -> Middleware:
        """Return a middleware of aiohttp that refuses all other requests, for every path and before a body is read.

        It answers 401 for a missing or wrong token, and 403 for a request of a web page.
        """

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
        if len(hosts) == 1 and "/" not in hosts[0]:  # `read_server_url` also takes URLs, which this header cannot hold
            with suppress(ConfigurationError):
                host = read_server_url(hosts[0]).host
                is_ours = is_loopback(host) or host == read_listen_host(self.host)
        if not is_ours:
            shown = ", ".join(hosts)[:_SHOWN_CHARS]
            return error_response(403, f"Host {shown!r} is not loopback: send the request to 127.0.0.1")
        origins = request.headers.getall("Origin", [])
        sites = request.headers.getall("Sec-Fetch-Site", [])
        with suppress(ConfigurationError):  # a page is trusted if it came from the server to which it sends the request
            is_own_page = all(read_server_url(origin) == read_server_url(hosts[0]) for origin in origins)
        if not is_own_page or any(site not in _OWN_SITE for site in sites):
            return error_response(403, "requests of other web sites are refused here: use curl or kvroom")
        return None
