"""What peers say about a room: frozen values, one tagged union, nothing else travels between rooms.

Every message carries the room's number and the *generation* that its sink minted, so that nothing said about an
earlier use of the number can touch a later one. Who said it is not in the message: the link knows (a `Peer`), and
a field that a peer fills in about itself could lie.
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
# A number of CPython in a tuple is a pointer and an object of 28 to 32 bytes. A part has four in a tuple of its own.
_NUMBER_BYTES = 40
# At least what a field of an identity, the name of a window or the message itself takes with all that belongs to it.
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
    """Why a room ended without success, as the side that noticed it tells it. Both sides print the same sentence.

    Texts that come from outside (an engine's cause, a transport's error) go through `fitting` first: a longer one would
    be refused by the peer, with the link.
    """

    side: Side
    phase: Text
    peer: Text
    cause: Cause
    detail: Text

    def sentence(self, room: int | None) -> str:
        number = "with no number yet" if room is None else str(room)
        where = f"on the {self.side.value} side in phase {self.phase}"
        return f"room {number} failed {where} (peer {self.peer}): {self.detail}"


class RoomUse(TypedDict):
    """The use of a room number that a message is about: the fields that all messages share, by name."""

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
    """Pages that may be written, for tokens [start, stop) of a request: what an engine offers, and what travels.

    `pages[0]` holds token `start`; page borders lie at multiples of the sink's page size, counted from token 0. Tokens
    [0, start) are on the sink already (`decode_prefix_len`). `grant` is the sink transport's leave to write.
    `checksum`: `Done` is to carry one, and the room ends only when the sink has found its own equal (`ChecksumsAgree`).
    `tokens` is the request's length where that is not `stop`: a sink may hold a part of the tokens only. `windows` are
    the pages of further groups.
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
        """Tokens of the request."""
        return self.stop if self.tokens is None else self.tokens

    def fields(self) -> dict[str, Any]:
        """Return by name what every offer has, and leave out what only this type of offer adds."""
        return {name: getattr(self, name) for name in Offered.__struct_fields__}


class Offer(Offered, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Sink to source: these pages may be written. Of a `_Message` it has the fields; a struct has one base.

    `identity` is of the request whose KV cache the sink expects; a source that has another one writes nothing. So many
    ranks offer to this source rank as `sinks` says; it has succeeded when all have their bytes. `parts` is what this
    source is to write, as `plan.Part`s; None: whatever the two share; (): nothing, it only reports.
    """

    room: RoomNumber
    generation: Generation
    identity: KVIdentity
    sinks: Annotated[int, Meta(ge=1, le=MAX_SINKS)] = 1
    parts: Annotated[tuple[PartNumbers, ...], Meta(max_length=4096)] | None = None

    @property
    def kept_bytes(self) -> int:
        """Count the memory of the decoded message: nearly all of it is in the numbers of its pages and parts."""
        pages = len(self.pages) + sum(len(window.pages) for window in self.windows)
        parts, texts = len(self.parts or ()), len(self.windows) + len(self.identity.fields)
        return _NUMBER_BYTES * (pages + 6 * parts) + _TEXT_BYTES * (texts + 1) + len(self.grant)


class Renew(_Message, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Sink to source: it still wants this room, and has no pages to offer yet.

    A source that waits for the offer waits anew. One that has failed says why (`Abort`); other answers there are none.
    """


class Progress(_Message, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Source to sink: the bytes of tokens up to `tokens` have landed, more will follow.

    `idle`: nothing is under way, because the prefill engine has not computed the next chunk yet.
    """

    tokens: Count
    idle: bool = False


class Done(_Message, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Source to sink: every byte that this source had to write has landed; it will write no more.

    `identity` is of the request whose KV cache it wrote; the source has compared it, and the sink does so, too. `aux`
    is small per-request metadata (the first token, logprobs, ...); its meaning is the engine's. `took_s` is the time
    from both sides being ready (offer taken, last chunk computed) to the last byte, on the source's clock.
    `checksum` is XXH3 (64 bits) over what this source was to write, in the order of `plan.hash_order`; 0 if not asked
    for.
    `spans`: the tokens [start, stop) that it had, sorted and apart, where they are not all that was offered: ranks that
    split a request's tokens (context parallel) report theirs, and together they must fill the offer. `windows`: the
    groups whose pages it had, where they are not all that were offered. `transport`: by what it wrote, in words, which
    only the side that writes knows; empty if it had nothing to write.
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
    """Sink to source, where a checksum was asked for: every source has reported, and every checksum agrees."""


class Abort(_Message, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Either way: this room is given up. A source that gets it stops submitting and answers `Quiesced`.

    Said by a source it proves nothing: transfers may be under way, or follow if the number is used again.
    """

    failure: Failure


class Decline(_Message, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Sink to source: this room has ended before any page was offered, and none will be. No answer is expected."""

    failure: Failure


class Quiesced(_Message, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Source to sink: for this generation nothing is in flight and nothing will ever be submitted again."""

    failure: Failure | None = None


Message = Offer | Renew | Progress | Done | ChecksumsAgree | Abort | Decline | Quiesced
