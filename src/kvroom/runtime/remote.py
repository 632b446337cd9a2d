"""How blocks reach one linked peer: its layout, our plans for it, and the transport's handle once it is connected.

All of it belongs to the link and goes with it; nothing here is kept for a room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from kvroom.core import inputs as asked
from kvroom.core.causes import Cause
from kvroom.core.messages import PartNumbers, Peer
from kvroom.plan import KVLayout, Part, Planner, Strip, shares, strips
from kvroom.transports.kit.machine import Process

Parts = tuple[PartNumbers, ...] | None
Strips = tuple[Strip, ...]
KeyT = TypeVar("KeyT")
T = TypeVar("T")
_MAX_PLANS = 16  # of one peer: one for each set of parts that it was ever offered; more is a peer at play


class PeerProfile(msgspec.Struct, frozen=True):
    """What managers tell each other when their link comes up: the memory to plan with, and how to reach it.

    `description` is the transport's, as a claim of this run. The `process` is looked up by other managers of its
    machine once it may be gone, and states which machine that is.
    """

    layout: KVLayout
    transport: str
    description: bytes
    process: Process


# Made at import, for msgspec (0.22) looks into a type at its first use: two managers that do so at once, each in its
# own thread, can crash the process.
identities = msgspec.msgpack.Decoder(PeerProfile)


class Remote:
    """Without a planner there is a fault, which says why no room can be handed over."""

    def __init__(self, ours: KVLayout, identity: PeerProfile, planner: Planner | None, error: str | None) -> None:
        self.identity = identity
        self.host = ""  # the numeric address at the other end of the link
        self.planner = planner
        self.error = error
        self.cause = Cause.INCOMPATIBLE
        self.again_s: float | None = None  # when a fault of the transport's may be gone; None: it stays
        self.handle: int | None = None
        self.how = "not connected"  # by which transport bytes travel between us, and why
        self.transport = ""  # the name of that transport
        self.shares: dict[tuple[Peer, ...], tuple[asked.Share, ...]] = {}  # by the sources that this one is first of
        self.waiting: list[Callable[[], None]] = []  # what came before the handle
        self._ours = ours
        self._planners: dict[Parts, Planner] = {}
        self._strips: dict[tuple[str, Parts], Strips] = {}

    @property
    def layout(self) -> KVLayout:
        return self.identity.layout

    def planner_of(self, parts: Parts) -> Planner:
        """Plans for writing these parts of the peer's memory. `PlanError` for parts that there are not."""
        if parts is None and self.planner is not None:
            return self.planner
        planner = self._planners.get(parts)
        if planner is None:
            planner = Planner(self._ours, self.layout, parts=_parts(parts))
            _keep(self._planners, parts, planner)
        return planner

    def strips_as_source(self, parts: Parts) -> Strips:
        """Our bytes that go to this peer, for checksums."""
        return self._strips_of("source", parts)

    def strips_as_sink(self, parts: Parts) -> Strips:
        """Our bytes that come from this peer."""
        return self._strips_of("sink", parts)

    def _strips_of(self, side: str, parts: Parts) -> Strips:
        found = self._strips.get((side, parts))
        if found is None:
            as_source = side == "source"
            pair = (self._ours, self.layout) if as_source else (self.layout, self._ours)
            found = strips(*pair, parts=_parts(parts))[0 if as_source else 1]
            _keep(self._strips, (side, parts), found)
        return found

    def refusal(self) -> tuple[Cause, str]:
        """Why no room can be handed over. Only where there is a fault."""
        assert self.error is not None
        return self.cause, self.error


def shares_of(sources: Sequence[Remote], sinks: Sequence[int], ours: KVLayout) -> tuple[asked.Share, ...]:
    """What each of these sources has to do with our pages; `sinks[i]` ranks offer to the i-th. `PlanError` if these
    together could not fill them."""
    layouts = [remote.layout for remote in sources]
    teams: dict[object, int] = {}
    found = []
    for layout, parts, count in zip(layouts, shares(layouts, ours), sinks, strict=True):
        numbers = None if parts is None else tuple((p.first, p.last, p.lo, p.hi) for p in parts)
        team = None
        if layout.split is not None and not layout.split.interleave:
            held = frozenset((region.layer, region.component, region.head_range) for region in layout.regions)
            team = teams.setdefault(held, len(teams))
        found.append(asked.Share(sinks=count, parts=numbers, team=team))
    return tuple(found)


def _parts(numbers: Parts) -> tuple[Part, ...] | None:
    return None if numbers is None else tuple(Part(*one) for one in numbers)


def _keep(kept: dict[KeyT, T], key: KeyT, value: T) -> None:
    if len(kept) >= _MAX_PLANS:
        kept.clear()
    kept[key] = value
