"""The treatment of each room of a soak. Both processes compute it from the seed, so they need no messages about it.

A room has a kind; the kind determines what each engine does with the room and how it must end there. All room numbers
of a soak share a prefix, and all generations another, so any int that is found in a process can be recognised as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import msgspec

from kvroom.core.identity import KVIdentity
from kvroom.errors import ConfigurationError

PAGE_TOKENS = 16
MAX_PAGES = 32
REUSE_AFTER = 1000
MAX_ROOMS = 1 << 31
_PREFIX_SHIFT = 32
_MASK = (1 << 64) - 1


class End(Enum):
    """The end that a room must have on one side."""

    SUCCESS = "success"
    FAILURE = "failure"
    EITHER = "either"  # the treatment races with the end
    NONE = "none"  # this side never opens it


class Kind(Enum):
    """The treatment of a room: (name in reports, end of the source, end of the sink)."""

    PLAIN = ("plain", End.SUCCESS, End.SUCCESS)
    # aborts
    BEFORE_INIT = ("both abort before a number is assigned", End.FAILURE, End.FAILURE)
    AFTER_METADATA = ("both abort after the metadata", End.FAILURE, End.FAILURE)
    SINK_ABORTS = ("the sink aborts between two chunks", End.FAILURE, End.FAILURE)
    SINK_ABORTS_RACING = ("the sink aborts while the source sends", End.EITHER, End.EITHER)
    SINK_DECLINES = ("the sink aborts before its metadata", End.FAILURE, End.FAILURE)
    SOURCE_ABORTS = ("the source aborts between two chunks", End.FAILURE, End.FAILURE)
    SOURCE_ABORTS_QUEUED = ("the source aborts right after queueing everything", End.EITHER, End.EITHER)
    # faults
    TRANSFER_ERROR = ("a transfer fails in the middle", End.FAILURE, End.FAILURE)
    LINK_CUT = ("the link's connection is cut", End.EITHER, End.EITHER)
    SINK_CLEARS = ("the sink clears in the middle", End.EITHER, End.EITHER)
    SOURCE_CLEARS = ("the source clears in the middle", End.FAILURE, End.FAILURE)
    PREFILL_NEVER = ("the prefill side never opens it", End.NONE, End.FAILURE)
    DECODE_NEVER = ("the decode side never opens it", End.FAILURE, End.NONE)
    DUPLICATE = ("both sides open it a second time while it is open", End.SUCCESS, End.SUCCESS)
    REUSED = ("an earlier room had its number", End.SUCCESS, End.SUCCESS)
    AGAIN_AT_ONCE = ("aborted and opened again immediately", End.EITHER, End.EITHER)
    # rooms within other kinds
    AGAIN = ("opened again immediately", End.EITHER, End.EITHER)
    MEETING = ("both sides wait for each other", End.EITHER, End.EITHER)

    def __init__(self, title: str, source: End, sink: End) -> None:
        self.title = title
        self.source = source
        self.sink = sink


# Kinds with their weights. A cut link fails every open room, so it is rare.
ABORTS: tuple[tuple[Kind, int], ...] = (
    (Kind.BEFORE_INIT, 10),
    (Kind.AFTER_METADATA, 15),
    (Kind.SINK_ABORTS, 20),
    (Kind.SINK_ABORTS_RACING, 20),
    (Kind.SINK_DECLINES, 10),
    (Kind.SOURCE_ABORTS, 15),
    (Kind.SOURCE_ABORTS_QUEUED, 10),
)
FAULTS: tuple[tuple[Kind, int], ...] = (
    (Kind.TRANSFER_ERROR, 20),
    (Kind.LINK_CUT, 1),
    (Kind.SINK_CLEARS, 15),
    (Kind.SOURCE_CLEARS, 15),
    (Kind.PREFILL_NEVER, 8),
    (Kind.DECODE_NEVER, 8),
    (Kind.DUPLICATE, 13),
    (Kind.REUSED, 10),
    (Kind.AGAIN_AT_ONCE, 10),
)


class Request(NamedTuple):
    """One room of `tokens` tokens. The sink has the first `prefix` already; the source's first chunk has `first`."""

    number: int
    stamp: int  # determines its bytes; no other room of the soak has it
    kind: Kind
    tokens: int
    prefix: int
    first: int

    @property
    def identity(self) -> KVIdentity:
        """Return an identity that both uses of a number share: either use may meet either one of the other side."""
        return KVIdentity.of((self.number, self.tokens))

    @property
    def pages(self) -> int:
        """Return the number of pages that the source needs; the sink needs no more."""
        return -(-self.tokens // PAGE_TOKENS)


class Mix(msgspec.Struct, frozen=True, kw_only=True):
    """`rooms` rooms, of which the share `aborts` is aborted and the share `faults` meets a fault."""

    rooms: int
    seed: int = 1
    aborts: float = 0.10
    faults: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.rooms <= MAX_ROOMS:
            raise ConfigurationError(f"{self.rooms} rooms: give a number in [1, {MAX_ROOMS}]")
        if not (self.aborts >= 0 and self.faults >= 0 and self.aborts + self.faults <= 1):
            raise ConfigurationError(
                f"shares {self.aborts} and {self.faults}: give two of at least 0, at most 1 in all"
            )

    @property
    def number_prefix(self) -> int:
        """Return the upper bits of every room number of this soak: the number shifted right by 32."""
        return scramble(self.seed, 1) >> 33 | 1 << 30

    @property
    def generation_prefix(self) -> int:
        """Return the upper bits of every generation of this soak: the generation shifted right by 32."""
        return scramble(self.seed, 2) >> 32 | 1 << 31

    def kind(self, index: int) -> Kind:
        """Return the kind of room `index`."""
        draw = scramble(self.seed, 4 * index + 4)
        share = (draw >> 32) / 2**32
        if share < self.aborts:
            return _choose(ABORTS, draw)
        if share < self.aborts + self.faults:
            return _choose(FAULTS, draw)
        return Kind.PLAIN

    def request(self, index: int) -> Request:
        """Return room `index`."""
        kind, number = self.kind(index), self.number(index)
        if kind is Kind.REUSED and index >= REUSE_AFTER and self.kind(index - REUSE_AFTER) is Kind.PLAIN:
            number = self.number(index - REUSE_AFTER)
        draw = scramble(self.seed, 4 * index + 5)
        tokens = 2 + draw % (PAGE_TOKENS * _pages(draw >> 40) - 1)
        first = 1 + (draw >> 20) % (tokens - 1)
        prefix = (draw >> 8) % (tokens + 1) if kind is Kind.PLAIN and draw >> 60 == 0 else 0
        if kind is Kind.PLAIN and (draw >> 58) % 2:
            first = tokens  # in one chunk
        return Request(number, scramble(self.seed, 4 * index + 6), kind, tokens=tokens, prefix=prefix, first=first)

    def meeting(self, index: int) -> Request:
        """Return a room of one page, before room `index`, in which each side waits for the other."""
        number = self.number(MAX_ROOMS + index)
        return Request(
            number, scramble(self.seed, 4 * index + 7), Kind.MEETING, tokens=PAGE_TOKENS, prefix=0, first=PAGE_TOKENS
        )

    def number(self, index: int) -> int:
        """Return the number of room `index`. No earlier room has it; a later room of the kind REUSED may."""
        return self.number_prefix << _PREFIX_SHIFT | index

    def generation(self, count: int) -> int:
        """Return the generation of the `count`-th sink."""
        return self.generation_prefix << _PREFIX_SHIFT | count

    def owns(self, value: int) -> bool:
        """Return whether this is a room number or generation of this soak."""
        prefix = value >> _PREFIX_SHIFT
        return prefix == self.number_prefix or prefix == self.generation_prefix


def scramble(seed: int, index: int) -> int:
    """Return 64 pseudo-random bits: splitmix64 (Steele, Lea, Flood, OOPSLA 2014) at this index."""
    z = (seed * 0xD1342543DE82EF95 + index * 0x9E3779B97F4A7C15) & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31


def _choose(kinds: Sequence[tuple[Kind, int]], draw: int) -> Kind:
    place = draw % sum(weight for _, weight in kinds)
    for kind, weight in kinds:
        place -= weight
        if place < 0:
            return kind
    raise AssertionError("a place below the sum of the weights belongs to a kind")


def _pages(draw: int) -> int:
    """Return a room's number of pages: small for most rooms, up to `MAX_PAGES` for one in sixteen."""
    most = MAX_PAGES if draw % 16 == 0 else 8 if draw % 4 == 0 else 2
    return 1 + (draw >> 4) % most
