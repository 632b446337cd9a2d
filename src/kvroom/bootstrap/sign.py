"""Who may ask the directory: a request is signed with the shared secret when there is one.

    Authorization: KVRoom <unix seconds>:<64 hex digits of HMAC-SHA256>

The signature covers method, path with query, body and time. A request is good for `REPLAY_WINDOW_S` to either side of
the directory's clock. Within that window it could be repeated by somebody who recorded it; what a repeat can do is
refresh an entry that was true at most that long ago. Answers are not signed: a decode rank believes a rank only after
the handshake of the link, in which both prove the secret.
"""

from __future__ import annotations

import re

from kvroom.errors import AuthenticationError
from kvroom.wire import auth

HEADER = "Authorization"
REPLAY_WINDOW_S = 30
_LABEL = b"kvroom bootstrap request"
_FORM = re.compile(r"KVRoom ([0-9]{1,12}):([0-9a-f]{64})")


def sign(secret: bytes, method: str, path: str, body: bytes, now_s: float) -> str:
    """The header's value. `path` with its query as it is sent; `now_s` in Unix seconds."""
    time = str(int(now_s))
    return f"KVRoom {time}:{_mac(secret, method, path, body, time).hex()}"


def mac_of(header: str) -> bytes:
    """Return the bytes that a header made by `sign` proves the secret with."""
    return bytes.fromhex(header[-2 * auth.PROOF_BYTES :])


def check(secret: bytes, header: str | None, method: str, path: str, body: bytes, now_s: float) -> None:
    """Raise `AuthenticationError` unless the header was made by `sign` with this secret within the window."""
    if header is None:
        raise AuthenticationError(
            f"the request is not signed: give this worker the directory's secret, {auth.SECRET_SETTING}"
        )
    form = _FORM.fullmatch(header)
    if form is None:
        raise AuthenticationError(f"the {HEADER} header is malformed: it reads KVRoom <unix seconds>:<64 hex digits>")
    time, mac = form[1], bytes.fromhex(form[2])
    if not auth.verify(mac, secret, _LABEL, *_parts(method, path, body, time)):
        raise AuthenticationError(
            f"the signature is wrong: give this worker the directory's secret, {auth.SECRET_SETTING}"
        )
    if abs(int(time) - now_s) > REPLAY_WINDOW_S:
        raise AuthenticationError(
            f"the request was signed at {time}, here it is {now_s:.0f}: set the clocks to within {REPLAY_WINDOW_S} s"
        )


def _mac(secret: bytes, method: str, path: str, body: bytes, time: str) -> bytes:
    return auth.prove(secret, _LABEL, *_parts(method, path, body, time))


def _parts(method: str, path: str, body: bytes, time: str) -> tuple[bytes, ...]:
    return method.upper().encode(), path.encode(), body, time.encode()
