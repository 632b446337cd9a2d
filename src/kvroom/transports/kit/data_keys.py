"""The keys of data connections: each transport instance has a pair of its own, and any two instances share another.

The public key is the instance's endpoint. It travels in the description, over the authenticated link. The data key of
two instances is HKDF-SHA256 over the X25519 result of both pairs, with a label and both public keys in ascending order.
Both ends compute it and neither sends it, so a process that overheard both descriptions, or was given them, has nothing
with which to take part in a data connection.
"""

from __future__ import annotations

import hmac

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kvroom.transports.base import MalformedDescription

PUBLIC_KEY_BYTES = 32
PROOF_BYTES = 32
_DATA_KEY_BYTES = 32
_LABEL = b"kvroom data key 1"


class DataKey:
    """The key that `own` and `peer`, two public keys, have in common. It proves things, and shows itself to nobody."""

    def __init__(self, own: bytes, peer: bytes, key: bytes) -> None:
        self.own, self.peer = own, peer
        self._key = key

    def proof(self, role: bytes, transcript: bytes) -> bytes:
        """Return proof that a holder of this key, in this role, has taken part in this conversation."""
        return hmac.digest(self._key, role + transcript, "sha256")

    def is_proven(self, proof: bytes, role: bytes, transcript: bytes) -> bool:
        """Return True if the proof is that of a holder of this key, in this role, about this conversation."""
        return hmac.compare_digest(proof, self.proof(role, transcript))


class InstanceKey:
    """A new pair for one instance of the transport of this name. The private part never leaves the process."""

    def __init__(self, transport: str) -> None:
        self._transport = transport
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()

    def shared_with(self, public: bytes) -> DataKey:
        """Return the data key with the owner of this public key.

        Raise `MalformedDescription` for what is no public key, and for a point of low order: with such a one the
        result is the same for every private key, so that any process could compute it.
        """
        if len(public) != PUBLIC_KEY_BYTES:
            raise MalformedDescription(
                f"{self._transport}: the peer's description has a public key of {len(public)} bytes, not"
                f" {PUBLIC_KEY_BYTES}"
            )
        try:
            common = self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise MalformedDescription(
                f"{self._transport}: the peer's description has a public key of low order ({public.hex()}), which"
                " keeps no secret"
            ) from None
        info = _LABEL + b"".join(sorted((self.public, public)))
        key = HKDF(algorithm=SHA256(), length=_DATA_KEY_BYTES, salt=None, info=info).derive(common)
        return DataKey(self.public, public, key)
