"""Proof between the directory and those that ask it, in both directions, when there is a shared secret.

    Authorization: KVRoom <unix seconds>:<64 hex digits of a nonce>:<64 hex digits of HMAC-SHA256>     of a request
    KVRoom-Answer: <64 hex digits of HMAC-SHA256>                                                      of its answer

The signature of a request covers method, path with query, body, time and nonce. A request is good for
`REPLAY_WINDOW_S` to either side of the directory's clock. Within that window it could be repeated by an attacker who
recorded it; what a repeat can do is refresh an entry that was true at most that long ago.

The signature of an answer covers the nonce of its request, the status and the body. The nonce is fresh and stands
under the request's signature, so an answer is good for one request, of that method, path and body. A decode rank dials
what the directory lists, and a client may have named the directory: so nothing is believed that is not signed.

The directory signs no answer to a request whose own signature is wrong: it would sign a nonce of a stranger's choice.
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
    """The part of a request's signature that its answer depends on: the time in Unix seconds, and the nonce."""

    time_s: int
    nonce: bytes


def sign(secret: bytes, method: str, path: str, body: bytes, signed: Signed) -> str:
    """Return the header's value. `path` with its query as it is sent; the nonce is new for each request."""
    mac = auth.prove(secret, _REQUEST_LABEL, _parts(method, path, body, signed))
    return f"KVRoom {signed.time_s}:{signed.nonce.hex()}:{mac.hex()}"


def check(secret: bytes, header: str | None, method: str, path: str, body: bytes) -> Signed:
    """Raise `AuthenticationError` unless the header was made by `sign` with this secret, at whatever time."""
    if header is None:
        raise AuthenticationError(
            f"the request is not signed: give this worker the directory's secret, {auth.SECRET_SETTING}"
        )
    form = _FORM.fullmatch(header)
    if form is None:
        raise AuthenticationError(
            f"the {HEADER} header is malformed: it reads KVRoom <unix seconds>:<64 hex digits>:<64 hex digits>"
        )
    signed = Signed(int(form[1]), bytes.fromhex(form[2]))
    if not auth.verify(bytes.fromhex(form[3]), secret, _REQUEST_LABEL, _parts(method, path, body, signed)):
        raise AuthenticationError(
            f"the signature is wrong: give this worker the directory's secret, {auth.SECRET_SETTING}"
        )
    return signed


def check_time(signed: Signed, now_s: float) -> None:
    """Raise `AuthenticationError` unless a request was signed within the window around `now_s`, in Unix seconds."""
    if abs(signed.time_s - now_s) > REPLAY_WINDOW_S:
        raise AuthenticationError(
            f"the request was signed at {signed.time_s}, here it is {now_s:.0f}: set the clocks to within "
            f"{REPLAY_WINDOW_S} s"
        )


def sign_answer(secret: bytes, nonce: bytes, status: int, body: bytes) -> str:
    """Return the answer's header's value. `nonce` of a request whose signature is right."""
    return auth.prove(secret, _ANSWER_LABEL, (nonce, str(status).encode(), body)).hex()


def is_proven(secret: bytes, header: str | None, nonce: bytes, status: int, body: bytes) -> bool:
    """Return True if the header was made by `sign_answer` with this secret for this answer to this request."""
    if header is None or _ANSWER_FORM.fullmatch(header) is None:
        return False
    return auth.verify(bytes.fromhex(header), secret, _ANSWER_LABEL, (nonce, str(status).encode(), body))


def _parts(method: str, path: str, body: bytes, signed: Signed) -> tuple[bytes, ...]:
    return method.upper().encode(), path.encode(), body, str(signed.time_s).encode(), signed.nonce
