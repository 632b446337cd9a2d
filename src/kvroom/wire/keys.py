"""Ed25519 key pairs that prove the origin of a statement: one for each run of a process and each transport instance.

A manager creates a key when it starts, states the public part in its hello, and signs each handshake with it. Its
incarnation is the first 8 bytes of SHA-256 over the public key, so no other process can take its place: to find another
key for an incarnation takes about 2^64 tries, and the incarnation is valid only until the process ends.
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64


class SigningKey:
    """A new key pair. The private part never leaves the process."""

    def __init__(self) -> None:
        self._private = Ed25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()

    def sign(self, label: bytes, transcript: bytes) -> bytes:
        """Return the signature over this label and transcript."""
        return self._private.sign(_signed(label, transcript))


class RunKey(SigningKey):
    """The key of a new run, and the incarnation that is derived from it."""

    def __init__(self) -> None:
        super().__init__()
        self.incarnation = incarnation_of(self.public)


def incarnation_of(public: bytes) -> int:
    """Return the incarnation of the owner of this public key."""
    return int.from_bytes(hashlib.sha256(public).digest()[:8], "big")


def is_signed(signature: bytes, public: bytes, label: bytes, transcript: bytes) -> bool:
    """Return True if the owner of this public key signed this label and transcript. An invalid key gives False."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _signed(label, transcript))
    except (InvalidSignature, ValueError):  # ValueError: the length is not that of a key
        return False
    return True


def _signed(label: bytes, transcript: bytes) -> bytes:
    return len(label).to_bytes(8, "big") + label + transcript
