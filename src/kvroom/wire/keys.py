"""The key of one run of a process. Its incarnation follows from the key, so that no other process can be that run.

A manager makes an Ed25519 key when it starts, states the public one in its hello, and signs each handshake with it.
The incarnation is the first 8 bytes of SHA-256 over the public key: another key for the same incarnation takes about
2^64 tries, and the incarnation is of use only until the process ends.
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64


class RunKey:
    """A new key. The private part never leaves the process."""

    def __init__(self) -> None:
        self._private = Ed25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()
        self.incarnation = incarnation_of(self.public)

    def sign(self, label: bytes, transcript: bytes) -> bytes:
        """Return the signature over this label and transcript."""
        return self._private.sign(_signed(label, transcript))


def incarnation_of(public: bytes) -> int:
    """Return the incarnation that the owner of this public key has, and no other process."""
    return int.from_bytes(hashlib.sha256(public).digest()[:8], "big")


def is_signed(signature: bytes, public: bytes, label: bytes, transcript: bytes) -> bool:
    """Return True if the owner of this public key has signed this label and transcript. Keys of any bytes are taken."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _signed(label, transcript))
    except (InvalidSignature, ValueError):  # ValueError: bytes of another length are no key
        return False
    return True


def _signed(label: bytes, transcript: bytes) -> bytes:
    return len(label).to_bytes(8, "big") + label + transcript
