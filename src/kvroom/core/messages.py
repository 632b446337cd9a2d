"""The messages between rooms: frozen values in one tagged union. Nothing else travels between rooms.

Every message carries the room's number and the *generation* that its sink created, so that no message about an earlier
use of the number affects a later one. The sender is not in the message: the link supplies it as a `Peer`, because a
peer could put another's name into a field of its own.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypedDict

import msgspec
from msgspec import Meta

from .causes import Cause
from .identity import KVIdentity
from .phases import Side

# msgspec takes int64 bounds only: `lt=2**63` is written as its last value, and uint64 needs none in msgpack.
RoomNumber = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Generation = Annotated[int, Meta(ge=0)]
Checksum = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Page = Annotated[int, Meta(ge=0, lt=2**32)]
TEXT_CHARS = 1000
MAX_AUX_BYTES = 1 << 20
Text = Annotated[str, Meta(max_length=TEXT_CHARS)]
Spans = Annotated[tuple[tuple[Count, Count], ...], Meta(max_length=4096)]
PartNumbers = tuple[Count, Count, Count, Count]
MAX_SINKS = 4096
# In CPython a number in a tuple takes a pointer and an object of 28 to 32 bytes. A part is a tuple of four numbers.
_NUMBER_BYTES = 40
# Not less than the memory of one field of an identity, of one window's name, or of the message object itself.
_TEXT_BYTES = 512


class Peer(NamedTuple):
    """A remote manager: where it listens and which run of it this is. A restarted process is another peer."""

    address: str
    incarnation: int

    def __str__(self) -> str:
        return self.address


def fitting(text: str) -> str:
    """Return a text that a message can carry: cut to `TEXT_CHARS`, with "?" for what UTF-8 cannot express."""
    return text[:TEXT_CHARS].encode("utf-8", "replace").decode()


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """The failure of a room, as noted by the side that noticed it. Both sides print the same sentence.

    Texts from outside (an engine's reason, a transport's error) must go through `fitting` first: the peer refuses a
    longer text and ends the link.
    """

    side: Side
    phase: Text
    peer: Text
    cause: Cause
    detail: Text

    def sentence(self, room: int | None) -> str:
        """Return the sentence that engines, logs and clients read. Without a number (None) it says so."""
        number = "with no number yet" if room is None else str(room)
        where = f"on the {self.side.value} side in phase {self.phase}"
        return f"room {number} failed {where} (peer {self.peer}): {self.detail}"


class RoomUse(TypedDict):
    """The fields that all messages share: the room and the generation that a message is about."""

    room: int
    generation: int


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    room: RoomNumber
    generation: Generation


class Window(msgspec.Struct, frozen=True):
    """The pages of one further group (a sliding window, a per-request state); see `plan.KVGroup`."""

    group: Text
    pages: tuple[Page, ...]


class Offered(msgspec.Struct, frozen=True, kw_only=True):
    """Pages that may be written, for tokens [start, stop) of a request: the fields of an engine's offer and of `Offer`.

    `pages[0]` holds token `start`; page borders lie at multiples of the sink's page size, counted from token 0. Tokens
    [0, start) are on the sink already (`decode_prefix_len`). `grant` is the token with which the sink's transport
    permits the writes. `checksum`: `Done` must carry one, and the room succeeds only when the sink has computed the
    same (`ChecksumsAgree`). `tokens` is the request's length where it differs from `stop`: a sink may hold only a part
    of the tokens. `windows` are the pages of further groups.
    """

    start: Count
    stop: Count
    pages: tuple[Page, ...]
    grant: Annotated[bytes, Meta(max_length=4096)] = b""
    checksum: bool = False
    tokens: Count | None = None
    windows: Annotated[tuple[Window, ...], Meta(max_length=64)] = ()

    @property
    def length(self) -> int:
        """Return the number of tokens of the request."""
        return self.stop if self.tokens is None else self.tokens

    def fields(self) -> dict[str, Any]:
        """Return the fields of `Offered` by name, without those that a subclass adds."""
        return {name: getattr(self, name) for name in Offered.__struct_fields__}


class Offer(Offered, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Sink to source: these pages may be written. It repeats the fields of `_Message`, because a struct has one base.

    `identity` is that of the request whose KV cache the sink expects; a source with another one writes nothing. `sinks`
    is the number of ranks that offer to this source rank, which succeeds when all have their bytes. `parts` is the part
    that this source must write, as `plan.Part`s; None: all that the two layouts share; (): nothing, it only reports.
    """

    room: RoomNumber
    generation: Generation
    identity: KVIdentity
    sinks: Annotated[int, Meta(ge=1, le=MAX_SINKS)] = 1
    parts: Annotated[tuple[PartNumbers, ...], Meta(max_length=4096)] | None = None

    @property
    def kept_bytes(self) -> int:
        """Return the bytes of memory that the decoded message takes, nearly all for the numbers of pages and parts."""
        pages = len(self.pages) + sum(len(window.pages) for window in self.windows)
        parts, texts = len(self.parts or ()), len(self.windows) + len(self.identity.fields)
        return _NUMBER_BYTES * (pages + 6 * parts) + _TEXT_BYTES * (texts + 1) + len(self.grant)


class Renew(_Message, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Sink to source: the sink still wants this room, and has no pages to offer yet.

    A source that waits for the offer restarts this wait. A source that has failed answers `Abort` with its cause. There
    is no other answer.
    """


class Progress(_Message, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Source to sink: the bytes of tokens up to `tokens` have landed, more will follow.

    `idle`: nothing is in flight, because the prefill engine has not computed the next chunk yet.
    """

    tokens: Count
    idle: bool = False


class Done(_Message, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Source to sink: every byte that this source had to write has landed, and it will write no longer.

    `identity` is that of the request whose KV cache was written; the source has compared it, and the sink compares it
    again. `aux` is small per-request metadata (the first token, logprobs, ...) with a meaning set by the engine.
    `took_s` is the time from both sides being ready (offer taken, last chunk computed) to the last byte, on the
    source's clock. `checksum` is XXH3 (64 bits) over the bytes that this source had to write, in the order of
    `plan.hash_order`; 0 if the offer did not ask for one.

    `spans` are the tokens [start, stop) that this source had, sorted and disjoint, or () for all that was offered.
    Ranks that split a request's tokens (context parallel) report their own, and together they must fill the offer.
    `windows` are the groups whose pages it had, or None for all that were offered. `transport` is the name of the
    transport that wrote, which the sink cannot see; empty if there was nothing to write.
    """

    tokens: Count
    nbytes: Count
    identity: KVIdentity
    aux: Annotated[bytes, Meta(max_length=MAX_AUX_BYTES)] = b""
    took_s: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    checksum: Checksum = 0
    spans: Spans = ()
    windows: Annotated[tuple[Text, ...], Meta(max_length=64)] | None = None
    transport: Text = ""


class ChecksumsAgree(_Message, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Sink to source, if the offer asked for a checksum: every source has reported, and every checksum agrees."""


class Abort(_Message, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Either direction: the sender gave this room up. A source that gets it stops submitting and answers `Quiesced`.

    From a source it proves nothing: transfers may be in flight, or follow if the number is used again.
    """

    failure: Failure


class Decline(_Message, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Sink to source: this room ended before it offered pages, and it will offer none. It has no answer."""

    failure: Failure


class Quiesced(_Message, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Source to sink: for this generation nothing is in flight and nothing will ever be submitted again."""

    failure: Failure | None = None


Message = Offer | Renew | Progress | Done | ChecksumsAgree | Abort | Decline | Quiesced
