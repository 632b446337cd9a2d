"""Proof that a peer has the shared secret, without sending it: HMAC-SHA256 over a label and a transcript.

The label names the purpose and the direction of a proof, so that it is invalid for any other (no reflection). The
transcript must contain a fresh nonce of the verifying side (no replay). Each part follows its length, so that two
different lists of parts never give the same input.

An empty key is public and proves nothing; `require_secret` allows it only on loopback.
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
"""The realm in the challenge of admin addresses. A client must send the admin token to no other realm."""
API_KEY_VARIABLE = "KVROOM_API_KEY"
API_KEY_FILE_VARIABLE = "KVROOM_API_KEY_FILE"
NONCE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size
_REPEATED = 16  # letters in a row: long enough that no address, time or version contains them by chance


class TokenSource:
    """A source of unguessable byte strings of one size, drawn from the system in bulk. Thread-safe.

    A system call for each room would release the interpreter lock each time, and to get it back takes far longer than
    the call itself.
    """

    def __init__(self, size: int, bulk: int = 256) -> None:
        self._size = size
        self._bulk = bulk
        self._drawn: deque[bytes] = deque()

    def next(self) -> bytes:
        """Return `size` random bytes, different in each call."""
        while True:
            try:
                return self._drawn.pop()
            except IndexError:
                fresh = secrets.token_bytes(self._size * self._bulk)
                self._drawn.extend(fresh[i : i + self._size] for i in range(0, len(fresh), self._size))


def new_nonce() -> bytes:
    """Return `NONCE_BYTES` from the system's random source. Each side needs a new one for each connection."""
    return secrets.token_bytes(NONCE_BYTES)


def prove(key: bytes, label: bytes, transcript: tuple[bytes, ...]) -> bytes:
    """Return the proof of `PROOF_BYTES` for this label and transcript, which requires `key` (RFC 2104, SHA-256)."""
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in (label, *transcript):
        mac.update(len(part).to_bytes(8, "big"))
        mac.update(part)
    return mac.digest()


def verify(proof: bytes, key: bytes, label: bytes, transcript: tuple[bytes, ...]) -> bool:
    """Return True if `proof` is the result of `prove` for the same arguments. The comparison takes constant time."""
    return hmac.compare_digest(proof, prove(key, label, transcript))


def bears(authorization: Sequence[str], tokens: Sequence[bytes]) -> bool:
    """Return True if a request has exactly one `Authorization` header, `Bearer TOKEN`, with one of these tokens.

    Every token is compared in constant time, so that the duration reveals neither a token nor which one matched.

    Args:
        authorization: the values of all `Authorization` headers of the request.
        tokens: the tokens to accept.
    """
    if len(authorization) != 1:
        return False
    scheme, _, credentials = authorization[0].partition(" ")
    given = credentials.strip(" ").encode("utf-8", "surrogateescape")
    equal = [hmac.compare_digest(given, token) for token in tokens]
    return scheme.lower() == "bearer" and any(equal)


def repeats(text: str, *sent: bytes) -> bool:
    """Return True if a text from an unproven peer repeats a part of the proof, nonce or signature sent to it.

    Such a text must not be shown, because errors reach clients and logs, which the peer could not reach itself. The
    check finds 8 consecutive bytes as hex or base64, with any characters between the letters.
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
    """Raise `ConfigurationError` for a secret that is too short to be safe. An empty one, meaning none, is allowed."""
    if not isinstance(secret, bytes):
        raise ConfigurationError(f"the secret is of type {type(secret).__name__}: give bytes")
    if 0 < len(secret) < MIN_SECRET_BYTES:
        raise ConfigurationError(f"the secret has {len(secret)} bytes, too short to be safe: {SECRET_REMEDY}")


def require_secret(host: str, secret: bytes) -> None:
    """Check that a server at this host is protected by a secret.

    Raises:
        ConfigurationError: the secret is shorter than 16 bytes, or empty although `host` is not loopback.
    """
    check_secret(secret)
    if not secret and not is_loopback(host):
        raise ConfigurationError(
            f"address {host or '*'} is not loopback and needs a shared secret: set {SECRET_SETTING} to the same value "
            f"on every worker, or use 127.0.0.1"
        )


def require_admin_token(host: str, token: bytes) -> None:
    """Check that an admin address at this host is protected by a token.

    Raises:
        ConfigurationError: the token is shorter than 16 bytes, or empty although `host` is not loopback.
    """
    if not isinstance(token, bytes):
        raise ConfigurationError(f"the admin token is of type {type(token).__name__}: give bytes")
    if 0 < len(token) < MIN_SECRET_BYTES:
        raise ConfigurationError(f"the admin token has {len(token)} bytes, too short to be safe: {SECRET_REMEDY}")
    if not token and not is_loopback(host):
        raise ConfigurationError(
            f"admin address {host or '*'} is not loopback and needs a token: set {ADMIN_TOKEN_SETTING}, or use "
            "127.0.0.1"
        )
