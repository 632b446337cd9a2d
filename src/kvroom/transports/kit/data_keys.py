"""The keys of data connections: each transport instance has its own key pair, and any two instances share a data key.

The pair is an Ed25519 pair. Its public key is the instance's endpoint, which the description names, and its private key
signs the description (`claims`). The data key of two instances is HKDF-SHA256 over the X25519 result of both pairs,
with a label and both public keys in ascending order. For X25519 the pair is converted as libsodium does: the private
key is the scalar of RFC 8032 section 5.1.5, the public one is mapped to the Montgomery curve by RFC 7748 section 4.1.

Both ends compute the data key and neither sends it, so a process that has seen both descriptions still cannot take
part in a data connection.
"""

from __future__ import annotations

import hashlib
import hmac

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kvroom.transports.base import MalformedDescription
from kvroom.wire.keys import PUBLIC_KEY_BYTES, SigningKey

PROOF_BYTES = 32
_DATA_KEY_BYTES = 32
_LABEL = b"kvroom data key 2"
_P = 2**255 - 19


class DataKey:
    """The key that the public keys `own` and `peer` share. It makes and checks proofs and is never exposed."""

    def __init__(self, own: bytes, peer: bytes, key: bytes) -> None:
        self.own, self.peer = own, peer
        self._key = key

    def proof(self, role: bytes, transcript: bytes) -> bytes:
        """Return the proof that a holder of this key took part in this transcript in this role."""
        return hmac.digest(self._key, role + transcript, "sha256")

    def is_proven(self, proof: bytes, role: bytes, transcript: bytes) -> bool:
        """Return True if `proof` is the one of this role and transcript."""
        return hmac.compare_digest(proof, self.proof(role, transcript))


class InstanceKey(SigningKey):
    """A new key pair of one transport instance, which can also derive data keys with other instances."""

    def __init__(self, transport: str) -> None:
        super().__init__()
        self._transport = transport
        scalar = hashlib.sha512(self._private.private_bytes_raw()).digest()[:32]  # X25519 clamps it
        self._exchanging = X25519PrivateKey.from_private_bytes(scalar)

    def shared_with(self, public: bytes) -> DataKey:
        """Return the data key shared with the owner of this public key.

        Raises:
            MalformedDescription: The key has the wrong size, or is a point of low order. With such a point, the result
                of the exchange is the same for every private key, so any process could compute it.
        """
        if len(public) != PUBLIC_KEY_BYTES:
            raise MalformedDescription(
                f"{self._transport}: the peer's description has a public key of {len(public)} bytes, not"
                f" {PUBLIC_KEY_BYTES}"
            )
        try:
            common = self._exchanging.exchange(X25519PublicKey.from_public_bytes(to_x25519(public)))
        except ValueError:
            raise MalformedDescription(
                f"{self._transport}: the peer's description has a public key of low order ({public.hex()}), which"
                " gives no secret"
            ) from None
        info = _LABEL + b"".join(sorted((self.public, public)))
        key = HKDF(algorithm=SHA256(), length=_DATA_KEY_BYTES, salt=None, info=info).derive(common)
        return DataKey(self.public, public, key)


def to_x25519(public: bytes) -> bytes:
    """Return the X25519 form of an Ed25519 public key, u = (1 + y) / (1 - y). Dividing by zero gives 0 (low order)."""
    y = int.from_bytes(public, "little") & (2**255 - 1)  # drop the sign of x, on which u does not depend
    return ((1 + y) * pow(1 - y, _P - 2, _P) % _P).to_bytes(32, "little")
