"""The client of the directory, for both sides. Every failure is one `BootstrapError` that names address and remedy.

With a secret, only a signed answer is used (`kvroom.bootstrap.sign`). The text of any other answer appears nowhere,
because a client may have chosen the server's address. An unsigned refusal still fails the call, since a directory with
a different secret cannot sign its refusal; the error then has a text of this module.
"""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import aiohttp
import msgspec

from kvroom.dialling.allowed import AllowList
from kvroom.dialling.dial import dial
from kvroom.dialling.http import describe_http_error, http_session, request
from kvroom.errors import BootstrapError
from kvroom.listening.descriptors import describe_dial_error
from kvroom.wire import auth
from kvroom.wire.address import HostPort, loopback_remedy, os_reason, parse_address
from kvroom.wire.frames import UNDECODABLE

from . import sign
from .directory import (
    DpRankHint,
    DpRankHints,
    DpRankQuery,
    NotReady,
    RankInfo,
    RouteList,
    Undecided,
    check_listed,
)

TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 4 << 20
_POLL_S = 0.2
_REGISTRATION_METHODS = ("PUT", "DELETE")
"""Methods that prefill ranks use, at the directory that they were started with. All others are queries for a room."""
_NO_DIRECTORY = "no reason given; is this a kvroom bootstrap directory?"
_UNPROVEN_REFUSAL = "; the refusal is not signed, so it may come from another server: check the address, too"
_T = TypeVar("_T")


async def register(bootstrap_addr: str, rank: RankInfo, *, secret: bytes = b"", timeout_s: float = TIMEOUT_S) -> str:
    """Register or refresh a prefill rank. Repeat the call, well within `RANK_TTL_S`, for as long as the rank lives.

    After an exception, the directory may or may not have the rank.

    Returns:
        The address of another engine's rank that was refused this place since the last refresh, or "".

    Raises:
        Undecided: The rank of another run holds the place and does not answer. Retry until its lease ends.
        BootstrapError: The directory does not answer, or refused the rank.
    """
    answer = await _ask(bootstrap_addr, "PUT", "/route", msgspec.json.encode(rank), secret=secret, timeout_s=timeout_s)
    return "" if answer == b"OK" else _printable(_decoded(bootstrap_addr, answer, _Registered).refused)


async def deregister(bootstrap_addr: str, rank: RankInfo, *, secret: bytes = b"", timeout_s: float = TIMEOUT_S) -> None:
    """End a registration immediately: the directory no longer lists this run of the rank."""
    await _ask(bootstrap_addr, "DELETE", "/route", msgspec.json.encode(rank), secret=secret, timeout_s=timeout_s)


async def listed(
    bootstrap_addr: str, *, secret: bytes = b"", timeout_s: float = TIMEOUT_S, allowed: AllowList | None = None
) -> list[RankInfo]:
    """Return the registered ranks by place (dp, cp, tp, pp): all ranks of the server, some of them, or none.

    `check_listed` has checked that they describe one server. A client may have chosen `bootstrap_addr`, so the address
    is contacted only if `allowed` contains it; otherwise `AddressNotAllowed` is raised.
    """
    answer = await _ask(bootstrap_addr, "GET", "/route", secret=secret, timeout_s=timeout_s, allowed=allowed)
    ranks = _decoded(bootstrap_addr, answer, RouteList).ranks
    check_listed(bootstrap_addr, ranks)
    return ranks


def check_complete(bootstrap_addr: str, ranks: Sequence[RankInfo]) -> None:
    """Raise `NotReady` if the directory lists fewer ranks than the prefill server has."""
    expected = ranks[0].server.ranks if ranks else 1
    if len(ranks) != expected:
        raise NotReady(
            f"bootstrap directory {bootstrap_addr} lists {len(ranks)} of {expected} prefill ranks: "
            "is the prefill worker up? Retry when all ranks have registered"
        )


async def lookup(bootstrap_addr: str, *, secret: bytes = b"", timeout_s: float = TIMEOUT_S) -> list[RankInfo]:
    """Return every rank of the prefill server, by place (dp, cp, tp, pp).

    Raises `NotReady` if a rank is missing or the directory does not answer.
    """
    ranks = await listed(bootstrap_addr, secret=secret, timeout_s=timeout_s)
    check_complete(bootstrap_addr, ranks)
    return ranks


async def register_dp_rank(
    bootstrap_addr: str, room: int, dp_rank: int, *, secret: bytes = b"", timeout_s: float = TIMEOUT_S
) -> None:
    """Store a hint that names the data-parallel rank of a room."""
    body = msgspec.json.encode(DpRankHint(room, dp_rank))
    await _ask(bootstrap_addr, "POST", "/register_dp_rank", body, secret=secret, timeout_s=timeout_s)


async def register_dp_ranks(
    bootstrap_addr: str, dp_ranks: Mapping[int, int], *, secret: bytes = b"", timeout_s: float = TIMEOUT_S
) -> None:
    """Store hints (room -> data-parallel rank) for at most `MAX_QUERIED_ROOMS` rooms.

    After an exception, the directory has all of the hints or none.
    """
    body = msgspec.json.encode(DpRankHints(dict(dp_ranks)))
    await _ask(bootstrap_addr, "POST", "/register_dp_ranks", body, secret=secret, timeout_s=timeout_s)


async def query_dp_ranks(
    bootstrap_addr: str,
    rooms: Iterable[int],
    *,
    wait_s: float = 0,
    secret: bytes = b"",
    timeout_s: float = TIMEOUT_S,
    allowed: AllowList | None = None,
) -> dict[int, int]:
    """Return room -> data-parallel rank for those of `rooms` (at most `MAX_QUERIED_ROOMS`) that have a hint.

    If none of them has a hint, the directory waits up to `wait_s` for the first one. The call times out after
    `wait_s + timeout_s`. `allowed` is used as in `listed`.
    """
    body = msgspec.json.encode(DpRankQuery(list(rooms), wait_s))
    answer = await _ask(
        bootstrap_addr, "POST", "/query_dp_ranks", body, secret=secret, timeout_s=wait_s + timeout_s, allowed=allowed
    )
    return _decoded(bootstrap_addr, answer, dict[int, int])


def wait_until_up(bootstrap_addr: str, patience_s: float) -> None:
    """Block until the bootstrap directory answers.

    For an engine whose own server starts the directory at about the same time.

    Args:
        bootstrap_addr: "host:port" of the directory.
        patience_s: Seconds to wait for its first answer.

    Raises:
        BootstrapError: The directory did not answer within `patience_s`, or another server listens at this address.
    """
    where = parse_address(bootstrap_addr)
    end = time.monotonic() + patience_s
    while True:
        connection = _Connection(where.host, where.port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", "/health")
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() > end:
                reason = os_reason(error) if isinstance(error, OSError) else f"no HTTP server ({type(error).__name__})"
                raise BootstrapError(
                    f"timed out after {patience_s:g} s: the bootstrap directory at {where} does not answer ({reason}); "
                    f"check its host and port"
                ) from None
            time.sleep(_POLL_S)
        else:
            if status == 200:
                return
            raise BootstrapError(
                f"the server at {where} is not a bootstrap directory (GET /health returned {status}): check the address"
            )
        finally:
            connection.close()


class _Connection(http.client.HTTPConnection):
    """A connection to the first address of the host that accepts."""

    def connect(self) -> None:
        self.sock = dial(HostPort(self.host, self.port), TIMEOUT_S)
        self.sock.settimeout(TIMEOUT_S)


async def _ask(
    address: str,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    secret: bytes,
    timeout_s: float,
    allowed: AllowList | None = None,
) -> bytes:
    """Send a request and return the body of the answer if its status is 200; otherwise raise.

    Each call opens a connection of its own: callers use the directory once per peer, or every few seconds.
    """
    where = parse_address(address)
    if allowed is not None:
        allowed.check(where)
    signed = sign.Signed(int(time.time()), auth.new_nonce())
    headers = {sign.HEADER: sign.sign(secret, method, path, body, signed)} if secret else {}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with (
            http_session(timeout, allowed) as session,
            request(session, method, where, path, data=body or None, headers=headers) as response,
        ):
            answer = await _read(response, where)
            status, proof = response.status, response.headers.get(sign.ANSWER_HEADER)
    except asyncio.TimeoutError:
        raise NotReady(
            f"timed out after {timeout_s} s: bootstrap directory {where} did not answer: is it up?"
        ) from None
    except aiohttp.ClientConnectorError as error:
        question = f"is it up?{loopback_remedy(where.host, error.os_error)}"
        raise NotReady(f"bootstrap directory {where}: {describe_dial_error(error.os_error, question)}") from None
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:  # the directory is closing or was killed
        raise NotReady(f"bootstrap directory {where}: {describe_http_error(error)}; is it up?") from None
    except aiohttp.ClientError as error:
        raise BootstrapError(
            f"bootstrap directory {where}: {describe_http_error(error)}; is there a bootstrap directory at this port?"
        ) from None
    unproven = bool(secret) and not sign.is_proven(secret, proof, signed.nonce, status, answer)
    if status != 200:
        refused = f"bootstrap directory {where} refused {method} {path} ({status})"
        if method in _REGISTRATION_METHODS and not unproven:
            raise _registration_refused(refused, answer)
        doubt = _UNPROVEN_REFUSAL if unproven else ""
        raise BootstrapError(f"{refused}: {_query_refused(status, signed=bool(secret))}{doubt}")
    if unproven:
        raise BootstrapError(
            f"ignored the answer of bootstrap directory {where} to {method} {path}, which has no valid signature: "
            f"check that the directory is at this address, and give it and this worker the same secret, "
            f"{auth.SECRET_SETTING}"
        )
    return answer


async def _read(response: aiohttp.ClientResponse, where: HostPort) -> bytes:
    answer = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        answer += chunk
        if len(answer) > MAX_ANSWER_BYTES:
            raise BootstrapError(
                f"the answer of bootstrap directory {where} is larger than {MAX_ANSWER_BYTES} bytes: is there a "
                f"bootstrap directory at this port?"
            )
    return bytes(answer)


class _Registered(msgspec.Struct):
    refused: str


class _RefusedBody(msgspec.Struct):
    error: str
    retry: bool = False


def _registration_refused(refused: str, answer: bytes) -> BootstrapError:
    """Return the error of a prefill rank, with the reason from its directory. With a secret, the reason was signed."""
    try:
        refusal = msgspec.json.decode(answer, type=_RefusedBody)
    except UNDECODABLE:
        refusal = _RefusedBody(_NO_DIRECTORY)
    return (Undecided if refusal.retry else BootstrapError)(f"{refused}: {_printable(refusal.error)}")


def _query_refused(status: int, *, signed: bool) -> str:
    """Return the reason of a refused query, derived from the status alone.

    The address of the directory comes with a request, so a client may choose any server that this machine can reach.
    The client also gets the error, and must not be able to read that server's answer through it.
    """
    if status == 401:
        error = "it does not accept the signature" if signed else "it accepts signed requests only"
        return (
            f"{error}: give this worker the directory's secret, {auth.SECRET_SETTING}, and set both clocks to within "
            f"{sign.REPLAY_WINDOW_S} s"
        )
    if status == 503:
        return "it has reached a limit of open files, waiting queries or hints; see its log, and retry"
    if 300 <= status < 400:
        return "it redirects to another address, which is not supported: give the address of the directory itself"
    return _NO_DIRECTORY


def _printable(text: str) -> str:
    """Return a text from the directory, escaped if it contains control characters."""
    return text if text.isprintable() else ascii(text)


def _decoded(address: str, answer: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(answer, type=kind)
    except UNDECODABLE as error:
        # msgspec's own messages name types and fields only. A message with a cause comes from the check of a field,
        # and may quote the answer.
        detail = "a field has an invalid value" if error.__cause__ is not None else str(error)
        raise BootstrapError(
            f"unexpected answer from bootstrap directory {address}: {detail}; is it a kvroom bootstrap directory?"
        ) from None
