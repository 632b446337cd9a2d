"""Asking the directory, from either side. Every failure is one `BootstrapError` that names address and remedy.

With a secret only a signed answer is believed (`kvroom.bootstrap.sign`), and no other is shown: a client may have named
the server. A refusal that is not signed still ends the question, with a remedy in our own words, because a directory
with another secret cannot prove its refusal.
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
_OF_ENGINES = ("PUT", "DELETE")
"""Requests of prefill ranks, to the directory that they were started with. All others are questions for a room."""
_NO_DIRECTORY = "no reason given; is this a kvroom bootstrap directory?"
_UNPROVEN_REFUSAL = "; the refusal is not signed, so it may come from another server: check the address, too"
_T = TypeVar("_T")


async def register(bootstrap_addr: str, rank: RankInfo, *, secret: bytes = b"", timeout_s: float = TIMEOUT_S) -> str:
    """Register or refresh a prefill rank. Call it again, well within `RANK_TTL_S`, for as long as the rank lives.

    Returns the address of another engine's rank that wanted this place since the last refresh and was refused, else "".
    Raises `Undecided` while the rank of an earlier run has the place and does not answer: try again until it is gone.
    When it raises, the directory may or may not have the rank.
    """
    answer = await _ask(bootstrap_addr, "PUT", "/route", msgspec.json.encode(rank), secret=secret, timeout_s=timeout_s)
    return "" if answer == b"OK" else _printable(_decoded(bootstrap_addr, answer, _Registered).refused)


async def deregister(bootstrap_addr: str, rank: RankInfo, *, secret: bytes = b"", timeout_s: float = TIMEOUT_S) -> None:
    """End a registration at once: no decode rank is sent to this run of the rank from now on."""
    await _ask(bootstrap_addr, "DELETE", "/route", msgspec.json.encode(rank), secret=secret, timeout_s=timeout_s)


async def listed(
    bootstrap_addr: str, *, secret: bytes = b"", timeout_s: float = TIMEOUT_S, allowed: AllowList | None = None
) -> list[RankInfo]:
    """Return every rank that is registered, by place (dp, cp, tp, pp): all of the server's, or fewer, or none.

    They fit the server that they describe: `check_listed`. A client may have named the address: it is asked only if it
    is `allowed`, else `AddressNotAllowed` is raised.
    """
    answer = await _ask(bootstrap_addr, "GET", "/route", secret=secret, timeout_s=timeout_s, allowed=allowed)
    ranks = _decoded(bootstrap_addr, answer, RouteList).ranks
    check_listed(bootstrap_addr, ranks)
    return ranks


def check_complete(bootstrap_addr: str, ranks: Sequence[RankInfo]) -> None:
    """Raise `NotReady` if a rank of the prefill server is missing from the list of its directory."""
    expected = ranks[0].server.ranks if ranks else 1
    if len(ranks) != expected:
        raise NotReady(
            f"bootstrap directory {bootstrap_addr} knows {len(ranks)} of {expected} prefill ranks: "
            "is the prefill worker up? Try again when all have registered"
        )


async def lookup(bootstrap_addr: str, *, secret: bytes = b"", timeout_s: float = TIMEOUT_S) -> list[RankInfo]:
    """Every rank of the prefill server, by place (dp, cp, tp, pp). `NotReady` if one is missing or nobody answers."""
    ranks = await listed(bootstrap_addr, secret=secret, timeout_s=timeout_s)
    check_complete(bootstrap_addr, ranks)
    return ranks


async def register_dp_rank(
    bootstrap_addr: str, room: int, dp_rank: int, *, secret: bytes = b"", timeout_s: float = TIMEOUT_S
) -> None:
    """Leave a hint which data-parallel rank a room was sent to."""
    body = msgspec.json.encode(DpRankHint(room, dp_rank))
    await _ask(bootstrap_addr, "POST", "/register_dp_rank", body, secret=secret, timeout_s=timeout_s)


async def register_dp_ranks(
    bootstrap_addr: str, dp_ranks: Mapping[int, int], *, secret: bytes = b"", timeout_s: float = TIMEOUT_S
) -> None:
    """Leave hints for at most `MAX_QUERIED_ROOMS` rooms, room -> rank. When it raises, all were left, or none."""
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
    """room -> data-parallel rank, for those of `rooms` (at most `MAX_QUERIED_ROOMS`) that have a hint.

    If none has one, the directory waits up to `wait_s` for the first. It has `timeout_s` besides to answer. `allowed`
    as for `listed`.
    """
    body = msgspec.json.encode(DpRankQuery(list(rooms), wait_s))
    answer = await _ask(
        bootstrap_addr, "POST", "/query_dp_ranks", body, secret=secret, timeout_s=wait_s + timeout_s, allowed=allowed
    )
    return _decoded(bootstrap_addr, answer, dict[int, int])


def wait_until_up(bootstrap_addr: str, patience_s: float) -> None:
    """Block until the directory answers, for an engine whose own server starts it at about the same time.

    Raises `BootstrapError` if it does not answer within `patience_s` seconds, or if something else listens there.
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
            raise BootstrapError(f"the server at {where} is no bootstrap directory: /health answered {status}")
        finally:
            connection.close()


class _Connection(http.client.HTTPConnection):
    """A connection to whichever address of the host answers first."""

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
    """The body of a 200. One connection per call: callers ask once per peer or every few seconds."""
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
        raise NotReady(f"bootstrap directory {where} did not answer within {timeout_s} s: is it up?") from None
    except aiohttp.ClientConnectorError as error:
        question = f"is it up?{loopback_remedy(where.host, error.os_error)}"
        raise NotReady(f"bootstrap directory {where}: {describe_dial_error(error.os_error, question)}") from None
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:  # one that is closing, or is killed
        raise NotReady(f"bootstrap directory {where}: {describe_http_error(error)}; is it up?") from None
    except aiohttp.ClientError as error:
        raise BootstrapError(
            f"bootstrap directory {where}: {describe_http_error(error)}; is there a bootstrap directory at this port?"
        ) from None
    unproven = bool(secret) and not sign.is_proven(secret, proof, signed.nonce, status, answer)
    if status != 200:
        asked = f"bootstrap directory {where} refused {method} {path} ({status})"
        if method in _OF_ENGINES and not unproven:
            raise _refused_engine(asked, answer)
        doubt = _UNPROVEN_REFUSAL if unproven else ""
        raise BootstrapError(f"{asked}: {_refused_question(status, signed=bool(secret))}{doubt}")
    if unproven:
        raise BootstrapError(
            f"the answer of bootstrap directory {where} to {method} {path} is not proven, and was ignored: it has no "
            f"valid signature; check that the directory is at this address, and give it and this worker the same "
            f"secret, {auth.SECRET_SETTING}"
        )
    return answer


async def _read(response: aiohttp.ClientResponse, where: HostPort) -> bytes:
    answer = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        answer += chunk
        if len(answer) > MAX_ANSWER_BYTES:
            raise BootstrapError(f"bootstrap directory {where} answered more than {MAX_ANSWER_BYTES} bytes")
    return bytes(answer)


class _Registered(msgspec.Struct):
    refused: str


class _RefusedBody(msgspec.Struct):
    error: str
    retry: bool = False


def _refused_engine(asked: str, answer: bytes) -> BootstrapError:
    """Return the error of a prefill rank, with the reason that its own directory gave: proven, if there is a secret."""
    try:
        refusal = msgspec.json.decode(answer, type=_RefusedBody)
    except UNDECODABLE:
        refusal = _RefusedBody(_NO_DIRECTORY)
    return (Undecided if refusal.retry else BootstrapError)(f"{asked}: {_printable(refusal.error)}")


def _refused_question(status: int, *, signed: bool) -> str:
    """Return why a question was refused, in our own words.

    The address of the directory comes with a request, so a client may name any server that this machine reaches. What
    that server says must not be readable through the error that the client gets.
    """
    if status == 401:
        error = "it does not accept our signature" if signed else "it answers signed requests only"
        return (
            f"{error}: give this worker the directory's secret, {auth.SECRET_SETTING}, and set both clocks to within "
            f"{sign.REPLAY_WINDOW_S} s"
        )
    if status == 503:
        return "it is at a limit, of open files, waiting queries or hints; see its log, and try again"
    if 300 <= status < 400:
        return "it redirects to another address, which is not followed: name the directory itself"
    return _NO_DIRECTORY


def _printable(text: str) -> str:
    """Return a text of the directory's in a form that is fit for an error or a log."""
    return text if text.isprintable() else ascii(text)


def _decoded(address: str, answer: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(answer, type=kind)
    except UNDECODABLE as error:
        # msgspec names types and fields. What a field's own check says (a cause) may quote the answer.
        detail = "a field with a value that cannot be" if error.__cause__ is not None else str(error)
        raise BootstrapError(f"bootstrap directory {address} answered what nobody asked for: {detail}") from None
