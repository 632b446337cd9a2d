"""Signatures of requests to the directory and of its answers, when there is a shared secret.

    Authorization: KVRoom <unix seconds>:<64 hex digits of a nonce>:<64 hex digits of HMAC-SHA256>     of a request
    KVRoom-Answer: <64 hex digits of HMAC-SHA256>                                                      of its answer

The signature of a request covers method, path with query, body, time and nonce. A request is valid within
`REPLAY_WINDOW_S` before and after the directory's clock. Within that window an attacker who has recorded it could
repeat it, but a repetition can only refresh an entry that was true at most that long ago.

The signature of an answer covers the nonce of its request, the status and the body. The nonce is new for each request
and covered by the request's signature, so an answer is valid for one request with one method, path and body. Unsigned
answers are not used: a client may have chosen the directory, and a decode rank dials the addresses that it lists.

The directory does not sign the answer to a request with a wrong signature: it would sign a nonce chosen by a stranger.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from kvroom.errors import AuthenticationError
from kvroom.wire import auth

HEADER = "Authorization"
ANSWER_HEADER = "KVRoom-Answer"
REPLAY_WINDOW_S = 30
_REQUEST_LABEL = b"kvroom bootstrap request"
_ANSWER_LABEL = b"kvroom bootstrap answer"
_FORM = re.compile(r"KVRoom (0|[1-9][0-9]{0,11}):([0-9a-f]{64}):([0-9a-f]{64})")
_ANSWER_FORM = re.compile(r"[0-9a-f]{64}")


class Signed(NamedTuple):
    """The values in a request's header beside its signature: the time in Unix seconds, and the nonce."""

    time_s: int
    nonce: bytes


def sign(secret: bytes, method: str, path: str, body: bytes, signed: Signed) -> str:
    """Return the value of the request's header. `path` includes the query as sent; the nonce must be new."""
    mac = auth.prove(secret, _REQUEST_LABEL, _parts(method, path, body, signed))
    return f"KVRoom {signed.time_s}:{signed.nonce.hex()}:{mac.hex()}"


def check(secret: bytes, header: str | None, method: str, path: str, body: bytes) -> Signed:
    """Return the time and nonce of a header that `sign` made with this secret; otherwise raise `AuthenticationError`.

    The time is not checked here: see `check_time`.
    """
    if header is None:
        raise AuthenticationError(
            f"the request is not signed: give this worker the directory's secret, {auth.SECRET_SETTING}"
        )
    form = _FORM.fullmatch(header)
    if form is None:
        raise AuthenticationError(
            f"invalid {HEADER} header: expected KVRoom <unix seconds>:<64 hex digits>:<64 hex digits>"
        )
    signed = Signed(int(form[1]), bytes.fromhex(form[2]))
    if not auth.verify(bytes.fromhex(form[3]), secret, _REQUEST_LABEL, _parts(method, path, body, signed)):
        raise AuthenticationError(
            f"the request has an invalid signature: give this worker the directory's secret, {auth.SECRET_SETTING}"
        )
    return signed


def check_time(signed: Signed, now_s: float) -> None:
    """Raise `AuthenticationError` unless a request was signed within the window around `now_s`, in Unix seconds."""
    if abs(signed.time_s - now_s) > REPLAY_WINDOW_S:
        raise AuthenticationError(
            f"the request was signed at {signed.time_s}, but the directory's clock is at {now_s:.0f}: set the clocks "
            f"to within {REPLAY_WINDOW_S} s"
        )


def sign_answer(secret: bytes, nonce: bytes, status: int, body: bytes) -> str:
    """Return the value of the answer's header. `nonce` is that of a request whose signature was verified."""
    return auth.prove(secret, _ANSWER_LABEL, (nonce, str(status).encode(), body)).hex()


def is_proven(secret: bytes, header: str | None, nonce: bytes, status: int, body: bytes) -> bool:
    """Return True if the header was made by `sign_answer` with this secret for this answer to this request."""
    if header is None or _ANSWER_FORM.fullmatch(header) is None:
        return False
    return auth.verify(bytes.fromhex(header), secret, _ANSWER_LABEL, (nonce, str(status).encode(), body))


def _parts(method: str, path: str, body: bytes, signed: Signed) -> tuple[bytes, ...]:
    return method.upper().encode(), path.encode(), body, str(signed.time_s).encode(), signed.nonce
