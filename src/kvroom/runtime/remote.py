"""The state of one linked peer: its layout, the plans for it, and the transport's handle once it is connected.

All of it belongs to the link and is dropped with the link. Nothing here is kept for a room.
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
_MAX_PLANS = 16
"""Plans kept for one peer, one for each distinct `parts`. An honest peer needs a handful, so clearing at 16 limits the
memory that a hostile one can take."""


class PeerProfile(msgspec.Struct, frozen=True):
    """The description of itself that a manager sends when a link opens."""

    layout: KVLayout
    """The layout of its memory."""
    transport: str
    """The name of its transport."""
    description: bytes
    """How its transport is reached: the transport's own description, signed for this run (see `kit.claims`)."""
    process: Process
    """Its process and machine. After its loss, other managers of that machine look the process up."""


# Created at import: msgspec (0.22) inspects a type at its first use, and two threads that do so at the same time, as
# two managers would, can crash the process.
identities = msgspec.msgpack.Decoder(PeerProfile)


class Remote:
    """One linked peer. If the layouts or transports do not fit, `planner` is None and `error` is the reason."""

    def __init__(self, ours: KVLayout, identity: PeerProfile, planner: Planner | None, error: str | None) -> None:
        self.identity = identity
        self.host = ""
        """The numeric address at the other end of the link."""
        self.planner = planner
        self.error = error
        self.cause = Cause.INCOMPATIBLE
        self.again_s: float | None = None
        """The time from which connecting the transport may be tried again; None: `error` is final."""
        self.handle: int | None = None
        """The transport's handle; None until it is connected."""
        self.how = "not connected"
        """The transport that moves bytes to and from this peer, and why, for operators."""
        self.transport = ""
        """The name of that transport."""
        self.shares: dict[tuple[Peer, ...], tuple[asked.Share, ...]] = {}
        """The shares of each tuple of sources whose first member is this peer."""
        self.waiting: list[Callable[[], None]] = []
        """Calls that run once the transport is connected or the link is lost."""
        self._ours = ours
        self._planners: dict[Parts, Planner] = {}
        self._strips: dict[tuple[str, Parts], Strips] = {}

    @property
    def layout(self) -> KVLayout:
        """The layout of the peer's memory."""
        return self.identity.layout

    def planner_of(self, parts: Parts) -> Planner:
        """Return the planner for writing these parts of the peer's memory. `PlanError` for parts that do not exist."""
        if parts is None and self.planner is not None:
            return self.planner
        planner = self._planners.get(parts)
        if planner is None:
            planner = Planner(self._ours, self.layout, parts=_parts(parts))
            _keep(self._planners, parts, planner)
        return planner

    def strips_as_source(self, parts: Parts) -> Strips:
        """Return the strips of this side's memory that are written to this peer, for checksums."""
        return self._strips_of("source", parts)

    def strips_as_sink(self, parts: Parts) -> Strips:
        """Return the strips of this side's memory that this peer writes, for checksums."""
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
        """Return cause and reason for rooms that cannot be handed over. Only if `error` is set."""
        assert self.error is not None
        return self.cause, self.error


def shares_of(sources: Sequence[Remote], sinks: Sequence[int], ours: KVLayout) -> tuple[asked.Share, ...]:
    """Return the share of each source: the parts of this side's pages that it writes.

    `sinks[i]` is the number of ranks that offer to the i-th source. `PlanError` if the sources cannot fill the pages.
    """
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
