"""The identity of what a room hands over: digests of everything that decides the KV cache of a request.

The two legs of a request reach the two engines by different routes. If a client or a router gives one room number to
two prompts of equal length, the decode side would continue the KV cache of the other prompt. So each engine states the
request of its leg as named digests, and a room compares them before it writes or uses any byte.

Digests travel instead of values, because a value may be a secret (a cache salt) or long (a prompt).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from kvroom.errors import LocalRoomError

TOKENS = "tokens"
NONE = "none"
"""Stated in place of a digest if there is no adapter, salt or image; not stating the field means unknown."""
_DIGEST_BYTES = 16
_MAX_FIELDS = 32
_Name = Annotated[str, Meta(min_length=1, max_length=64)]
_Digest = Annotated[str, Meta(min_length=1, max_length=64)]


class KVIdentity(msgspec.Struct, frozen=True, array_like=True):
    """Digests of everything that decides the KV cache of one request, as (name, digest) pairs sorted by name; see `of`.

    A room compares the fields that both sides state. `of` always states `tokens`, so prompts are always compared. A
    field that only one side states is shown by `kvroom rooms` and never fails a room: an engine that cannot name its
    adapter, for example, can still take part.
    """

    fields: Annotated[tuple[tuple[_Name, _Digest], ...], Meta(max_length=_MAX_FIELDS)] = ()
    """(name, digest) pairs, sorted by name."""

    @classmethod
    def of(cls, tokens: Sequence[int], **fields: str | Sequence[str] | None) -> KVIdentity:
        """Return the identity of a prompt.

        Args:
            tokens: the token ids of the whole prompt, a sequence or an integer array of one dimension, also where an
                engine hands over fewer. Placeholders of images count as tokens; the images themselves are a field.
            fields: everything else that decides the KV cache, by name: a text, or a sequence of texts whose order
                counts. None: the engine does not have this information, and the field is not stated. An empty text
                states that there is none, which differs from an adapter or a salt on the other side. Engines of kvroom
                use the names `adapter`, `cache_salt` and `images`. Settings that are the same for all requests of an
                engine (model, element type, rope) belong in `KVLayout.model`, which two engines compare when they link.

        Returns:
            The identity, with digests in place of the values.

        Raises:
            LocalRoomError: `tokens` is not a flat sequence of integers, a value is not a text, or there are too many
                fields or too long names.
        """
        if len(fields) >= _MAX_FIELDS or any(not 0 < len(name) <= 64 for name in fields):
            raise LocalRoomError(
                f"an identity has up to {_MAX_FIELDS - 1} fields with names of 1 to 64 characters, got {len(fields)}"
            )
        stated = {name: _digest_of_texts(name, value) for name, value in fields.items() if value is not None}
        stated[TOKENS] = _digest_of_tokens(tokens)
        return cls(tuple(sorted(stated.items())))

    def __bool__(self) -> bool:
        """Return True if the tokens are stated, as a room requires."""
        return self.get(TOKENS) is not None

    @property
    def travels(self) -> bool:
        """Return True if a peer accepts it: it states its tokens, and every name and digest is within the limits."""
        try:
            return bool(_identities.decode(_encoder.encode(self)))
        except (msgspec.MsgspecError, TypeError, UnicodeError):
            return False

    def get(self, name: str) -> str | None:
        """Return the digest of a field, or None if it is not stated."""
        return next((digest for known, digest in self.fields if known == name), None)

    def shared(self, other: KVIdentity) -> tuple[str, ...]:
        """Return the names of the fields that both identities state, sorted."""
        return tuple(name for name, _ in self.fields if other.get(name) is not None)


_encoder, _identities = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(KVIdentity)


def mismatch(prefill: KVIdentity, decode: KVIdentity) -> str | None:
    """Return a sentence on the first field in which two identities differ, tokens first, or None if none differs.

    Tokens that only one side states differ, too. The sentence contains no digest, because it reaches the clients of
    both sides. A client that had guessed the other's room number could test guesses of its prompt against a digest.
    """
    names = {TOKENS, *prefill.shared(decode)}
    for name in sorted(names, key=lambda one: (one != TOKENS, one)):
        ours, theirs = prefill.get(name), decode.get(name)
        if ours is None or ours != theirs:
            first, second = (_count(ours), _count(theirs)) if name == TOKENS else (_stated(ours), _stated(theirs))
            if first == second:
                second = f"another ({second})"
            return (
                f"the two sides were given different requests: {name} is {first} on the prefill side and {second} on "
                f"the decode side; send both the same request"
            )
    return None


def _count(digest: str | None) -> str:
    """Return the number of tokens of a prompt, which stands before its digest."""
    if digest is None:
        return "not stated"
    count = digest.partition(":")[0]
    return f"{count} ids" if count.isdecimal() else "not a list of ids"


def _stated(digest: str | None) -> str:
    return "not stated" if digest is None else "none" if digest == NONE else "set"


def _digest_of_tokens(tokens: Sequence[int]) -> str:
    """Return `count:digest` of token ids, so that a sentence about two of them shows whether their lengths differ.

    The digest is BLAKE2b with 16 bytes over the ids as little-endian int64. A list becomes an `array` first, which is
    faster than NumPy and raises an error for a float, while NumPy would cut it to an integer.
    """
    try:
        ids = np.asarray(tokens if hasattr(tokens, "__array__") or isinstance(tokens, array) else array("q", tokens))
    except (TypeError, ValueError, OverflowError):
        ids = np.empty(0, object)
    if isinstance(tokens, str | bytes | bytearray) or ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise LocalRoomError(
            f"expected a flat sequence of integer token ids as tokens of an identity, got {type(tokens).__name__}"
        )
    return f"{len(ids)}:{blake2b(ids.astype('<i8', copy=False).tobytes(), digest_size=_DIGEST_BYTES).hexdigest()}"


def _digest_of_texts(name: str, value: str | Sequence[str]) -> str:
    """Return the digest of a text or of several texts, or `NONE` if all of them are empty.

    Each text follows its length, so that ("a", "b") and ("ab",) have different digests.
    """
    parts = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(part, str) for part in parts):
        raise LocalRoomError(f"expected a text or a sequence of texts as field {name} of an identity, got {value!r}")
    if not any(parts):
        return NONE
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
