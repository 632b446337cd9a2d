"""Proof that a peer knows the shared secret, without sending it: HMAC-SHA256 over a label and a transcript.

The label says who proves what to whom, so that a proof made for one purpose or one direction is worth nothing in
another (no reflection). The transcript must hold a fresh nonce of the verifying side (no replay). Parts are length
prefixed, so that two different lists of parts never give the same input.

An empty key is a key that everybody knows: it proves nothing, and `require_secret` allows it on loopback only.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections import deque
from collections.abc import Sequence

from kvroom.errors import ConfigurationError

from .address import is_loopback

SECRET_VARIABLE = "KVROOM_SECRET"
SECRET_FILE_VARIABLE = "KVROOM_SECRET_FILE"
MIN_SECRET_BYTES = 16
SECRET_SETTING = f"{SECRET_VARIABLE} or {SECRET_FILE_VARIABLE} (in the library: the argument `secret`)"
SECRET_REMEDY = f"write one of at least {MIN_SECRET_BYTES} bytes, for example with `openssl rand -hex 32`"
ADMIN_TOKEN_VARIABLE = "KVROOM_ADMIN_TOKEN"
ADMIN_TOKEN_FILE_VARIABLE = "KVROOM_ADMIN_TOKEN_FILE"
ADMIN_TOKEN_SETTING = f"{ADMIN_TOKEN_FILE_VARIABLE} or {ADMIN_TOKEN_VARIABLE} (in the library: the argument `token`)"
ADMIN_REALM = "kvroom admin"
"""The realm in the challenge of admin addresses: to no other challenge is the token an answer."""
API_KEY_VARIABLE = "KVROOM_API_KEY"
API_KEY_FILE_VARIABLE = "KVROOM_API_KEY_FILE"
NONCE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size
_REPEATED = 16  # letters in a row: no address, time or version comes to so many of them by chance


class TokenSource:
    """Unguessable byte strings of one size, drawn from the system in bulk. Thread-safe.

    A system call for each room would hand the interpreter to another thread each time, and getting it back takes far
    longer than the call.
    """

    def __init__(self, size: int, bulk: int = 256) -> None:
        self._size = size
        self._bulk = bulk
        self._drawn: deque[bytes] = deque()

    def next(self) -> bytes:
        """`size` random bytes that nobody was given before."""
        while True:
            try:
                return self._drawn.pop()
            except IndexError:
                fresh = secrets.token_bytes(self._size * self._bulk)
                self._drawn.extend(fresh[i : i + self._size] for i in range(0, len(fresh), self._size))


def new_nonce() -> bytes:
    """`NONCE_BYTES` from the system's random source. Use one per connection and per side."""
    return secrets.token_bytes(NONCE_BYTES)


def prove(key: bytes, label: bytes, transcript: tuple[bytes, ...]) -> bytes:
    """`PROOF_BYTES` that only a holder of `key` can make for this label and transcript (RFC 2104, SHA-256)."""
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in (label, *transcript):
        mac.update(len(part).to_bytes(8, "big"))
        mac.update(part)
    return mac.digest()


def verify(proof: bytes, key: bytes, label: bytes, transcript: tuple[bytes, ...]) -> bool:
    """Whether `proof` is what `prove` gives for the same arguments, compared in constant time."""
    return hmac.compare_digest(proof, prove(key, label, transcript))


def bears(authorization: Sequence[str], tokens: Sequence[bytes]) -> bool:
    """Return True if the `Authorization` headers of a request are one, `Bearer TOKEN`, with one of these tokens.

    Each token is compared, in constant time, so that the time tells neither a token nor which of them was meant.
    """
    if len(authorization) != 1:
        return False
    scheme, _, credentials = authorization[0].partition(" ")
    given = credentials.strip(" ").encode("utf-8", "surrogateescape")
    equal = [hmac.compare_digest(given, token) for token in tokens]
    return scheme.lower() == "bearer" and any(equal)


def repeats(text: str, *sent: bytes) -> bool:
    """Return True if a text that a stranger sent holds a part of what we had sent to it: a proof, a nonce, a signature.

    Such a text must not be shown: an error travels further than the answer did, to clients and into logs. Found are
    8 bytes in a row, as hex or base64, whatever stands between the letters.
    """
    letters = _bare(text)
    for value in sent:
        codes = (_bare(value.hex()), *(_bare(base64.b64encode(value[skip:]).decode()) for skip in range(3)))
        for code in codes:
            if any(code[start : start + _REPEATED] in letters for start in range(len(code) - _REPEATED + 1)):
                return True
    return False


def _bare(text: str) -> str:
    return re.sub(r"[^0-9a-z]", "", text.lower())


def check_secret(secret: bytes) -> None:
    """Raise `ConfigurationError` for a secret that is too short to protect anything; none at all is allowed here."""
    if not isinstance(secret, bytes):
        raise ConfigurationError(f"the secret is of type {type(secret).__name__}: give bytes")
    if 0 < len(secret) < MIN_SECRET_BYTES:
        raise ConfigurationError(f"the secret has {len(secret)} bytes, too short to be safe: {SECRET_REMEDY}")


def require_secret(host: str, secret: bytes) -> None:
    """Raise `ConfigurationError` unless there is a secret, long enough, or `host` is loopback."""
    check_secret(secret)
    if not secret and not is_loopback(host):
        raise ConfigurationError(
            f"address {host or '*'} is not loopback and needs a shared secret: set {SECRET_SETTING} to the same one on "
            f"every worker, or use 127.0.0.1"
        )


def require_admin_token(host: str, token: bytes) -> None:
    """Raise `ConfigurationError` unless there is an admin token, long enough, or `host` is loopback."""
    if not isinstance(token, bytes):
        raise ConfigurationError(f"the admin token is of type {type(token).__name__}: give bytes")
    if 0 < len(token) < MIN_SECRET_BYTES:
        raise ConfigurationError(f"the admin token has {len(token)} bytes, too short to be safe: {SECRET_REMEDY}")
    if not token and not is_loopback(host):
        raise ConfigurationError(
            f"admin address {host or '*'} is not loopback and needs a token: set {ADMIN_TOKEN_SETTING}, or use "
            "127.0.0.1"
        )
