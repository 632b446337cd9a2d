"""The identity of what a room hands over: digests of everything that decides the KV cache of a request.

The two legs of a request reach the two engines on different ways. If a client or a router gives one room number to two
prompts, their lengths may still be equal, and the decode side would continue the KV cache of another prompt. So each
engine states what its leg asks for, as digests by name, and a room compares them before anything is used.

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
"""In the place of a digest: the engine can say that there is no adapter, salt or image."""
_DIGEST_BYTES = 16
_MAX_FIELDS = 32
_Name = Annotated[str, Meta(min_length=1, max_length=64)]
_Digest = Annotated[str, Meta(min_length=1, max_length=64)]


class KVIdentity(msgspec.Struct, frozen=True, array_like=True):
    """Digests of everything that decides the KV cache of one request, as (name, digest) pairs sorted by name; see `of`.

    Two sides compare the fields that both state. `tokens` is in every identity that `of` makes, so prompts are always
    compared. A field that only one side states is shown by `kvroom rooms` and refuses nothing: an engine that cannot
    name its adapter, for instance, can still take part.
    """

    fields: Annotated[tuple[tuple[_Name, _Digest], ...], Meta(max_length=_MAX_FIELDS)] = ()

    @classmethod
    def of(cls, tokens: Sequence[int], **fields: str | Sequence[str] | None) -> KVIdentity:
        """Return the identity of a prompt.

        Args:
            tokens: the token ids of the whole prompt, a sequence or an integer array of one dimension, also where an
                engine hands over fewer. Placeholders of images count as tokens; what they stand for is a field.
            fields: whatever else decides the KV cache, by name: a text, or a sequence of texts whose order counts.
                None: this engine cannot say, so the field is not stated. An empty text says that there is none, which
                differs from an adapter or a salt on the other side. Engines of kvroom use the names `adapter`,
                `cache_salt` and `images`. What is the same for all requests of an engine (model, element type, rope
                settings) belongs into `KVLayout.model`, which is compared when two engines link.

        Raises `LocalRoomError` for tokens that are no integers, or for too many or too long names.
        """
        if len(fields) >= _MAX_FIELDS or any(not 0 < len(name) <= 64 for name in fields):
            raise LocalRoomError(f"an identity has up to {_MAX_FIELDS - 1} fields with names of up to 64 characters")
        stated = {name: _digest_of_texts(name, value) for name, value in fields.items() if value is not None}
        stated[TOKENS] = _digest_of_tokens(tokens)
        return cls(tuple(sorted(stated.items())))

    def __bool__(self) -> bool:
        """Return True if the tokens are stated, as a room requires."""
        return self.get(TOKENS) is not None

    @property
    def travels(self) -> bool:
        """Return True if a peer will take it: it states its tokens, and every name and digest is within its limits."""
        try:
            return bool(_identities.decode(_encoder.encode(self)))
        except (msgspec.MsgspecError, TypeError, UnicodeError):
            return False

    def get(self, name: str) -> str | None:
        """Return the digest of a field, or None if it is not stated."""
        return next((digest for known, digest in self.fields if known == name), None)

    def shared(self, other: KVIdentity) -> tuple[str, ...]:
        """Return the names of the fields that both state, sorted."""
        return tuple(name for name, _ in self.fields if other.get(name) is not None)


_encoder, _identities = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(KVIdentity)


def mismatch(prefill: KVIdentity, decode: KVIdentity) -> str | None:
    """Return a sentence on the first field in which two identities differ, tokens before others; None if none does.

    Tokens that only one side states differ, too. The sentence has no digest, because it reaches the clients of both
    sides: one of them may have guessed the other's room number, and could try with a digest which prompt is behind it.
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
    """Return how many tokens a prompt has, as its digest says it."""
    if digest is None:
        return "not stated"
    count = digest.partition(":")[0]
    return f"{count} ids" if count.isdecimal() else "no list of ids"


def _stated(digest: str | None) -> str:
    return "not stated" if digest is None else "none" if digest == NONE else "set"


def _digest_of_tokens(tokens: Sequence[int]) -> str:
    """Return `count:digest` of token ids, so that a sentence about two of them shows whether their lengths differ.

    The digest is BLAKE2b with 16 bytes over the ids as little-endian int64. A list becomes an `array` first, which is
    faster than NumPy and refuses what is no integer; NumPy would cut a float.
    """
    try:
        ids = np.asarray(tokens if hasattr(tokens, "__array__") or isinstance(tokens, array) else array("q", tokens))
    except (TypeError, ValueError, OverflowError):
        ids = np.empty(0, object)
    if isinstance(tokens, str | bytes | bytearray) or ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise LocalRoomError(
            f"an identity was given tokens of type {type(tokens).__name__}: give a flat sequence of integer token ids"
        )
    return f"{len(ids)}:{blake2b(ids.astype('<i8', copy=False).tobytes(), digest_size=_DIGEST_BYTES).hexdigest()}"


def _digest_of_texts(name: str, value: str | Sequence[str]) -> str:
    """Return the digest of a text, or of texts each of which follows its length: ("a", "b") differs from ("ab",).

    "none" for an empty text and for no texts.
    """
    parts = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(part, str) for part in parts):
        raise LocalRoomError(f"an identity was given {name}={value!r}: give a text or a sequence of texts")
    if not any(parts):
        return NONE
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
