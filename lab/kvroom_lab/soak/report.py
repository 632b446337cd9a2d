"""The results of a soak: one `SideReport` from each process, and the sum of both."""

from __future__ import annotations

import msgspec

from .leftovers import Leftovers

MIB = 1 << 20


class Memory(msgspec.Struct):
    """Resident bytes of one process: before the first room, after each tenth of the rooms, and with all cleared."""

    start: int
    tenths: list[int]
    end: int

    @property
    def growth(self) -> int:
        """Return the growth from the first tenth to the largest value after it, in bytes."""
        return max(*self.tenths[1:], self.end) - self.tenths[0] if len(self.tenths) > 1 else 0


class SideReport(msgspec.Struct):
    """One process at its end, when every room was cleared on both sides."""

    side: str
    transport: str
    opened: int
    succeeded: int
    failed: int
    failed_by_cause: dict[str, int]
    unexpected: int  # ended otherwise than their kind demands, without a cut link as the reason
    examples: list[str]
    excused: int  # failed because a link was cut
    unfinished: int  # had not ended when no room had ended for a minute
    checked_bytes: int
    wrong_bytes: int
    rooms_left: int  # in the table, including early arrivals
    pages_left: int
    leftovers: Leftovers
    memory: Memory
    seconds: float
    counters: dict[str, int]
    audit: dict[str, int]

    @property
    def good(self) -> bool:
        """Return whether nothing was wrong and nothing is left; memory is judged separately."""
        left = self.rooms_left + self.pages_left + self.leftovers.entries + self.leftovers.alive
        return not (self.unexpected + self.unfinished + self.wrong_bytes + left + sum(self.audit.values()))


class Report(msgspec.Struct):
    """The whole soak. Sums are over both sides."""

    good: bool
    rooms: int
    seed: int
    transport: str
    seconds: float
    kinds: dict[str, int]
    opened: int
    succeeded: int
    failed: int
    unexpected: int
    bytes_checked: int
    wrong_bytes: int
    rooms_left: int
    pages_left: int
    entries_left: int
    growth_bytes: int  # of the process that grew more
    sides: list[SideReport]


def combine(rooms: int, seed: int, kinds: dict[str, int], sides: list[SideReport], most_growth: int | None) -> Report:
    """Add both sides up.

    `most_growth` is the limit on a process's growth after the first tenth, in bytes (None: no limit).
    """
    growth = max(side.memory.growth for side in sides)
    return Report(
        good=all(side.good for side in sides) and (most_growth is None or growth <= most_growth),
        rooms=rooms,
        seed=seed,
        transport=next(side.transport for side in sides if side.side == "source"),
        seconds=max(side.seconds for side in sides),
        kinds=kinds,
        opened=sum(side.opened for side in sides),
        succeeded=sum(side.succeeded for side in sides),
        failed=sum(side.failed for side in sides),
        unexpected=sum(side.unexpected + side.unfinished for side in sides),
        bytes_checked=sum(side.checked_bytes for side in sides),
        wrong_bytes=sum(side.wrong_bytes for side in sides),
        rooms_left=sum(side.rooms_left for side in sides),
        pages_left=sum(side.pages_left for side in sides),
        entries_left=sum(side.leftovers.entries + side.leftovers.alive for side in sides),
        growth_bytes=growth,
        sides=sides,
    )


def resident_bytes() -> int:
    """Return the bytes of this process that are in physical memory now."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))
