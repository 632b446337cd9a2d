"""Which transports `auto` takes, and why not the others, from what each of them says of a machine.

Apart from `look`, which asks them, this is pure: it works as well on what another machine has said.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Literal

import msgspec

from kvroom.transports import REGISTRY, probe
from kvroom.transports.kit.probing import Missing

Runs = Literal["yes", "no", "double"]


class TransportReport(msgspec.Struct, frozen=True):
    """One transport on one machine: its line in the registry and its finding. `runs`: "double" if only that can."""

    transport: str
    runs: Runs
    auto: bool
    basic: bool
    reach: Literal["process", "machine", "network"]
    part: str
    double: str
    devices: tuple[str, ...]
    fast: bool
    missing: tuple[Missing, ...]
    notes: tuple[str, ...]
    exposes: str = ""

    def moves(self, kinds: Set[str]) -> bool:
        """Whether it runs here and moves memory of all these kinds."""
        return self.runs == "yes" and kinds <= set(self.devices)

    def lacks(self) -> str:
        """What keeps it from running, in few words: these sentences end up in logs and in answers."""
        first, *more = [missing.what for missing in self.missing] or ["something that it does not name"]
        return f"{first} and {len(more)} more" if more else first


class Verdict(msgspec.Struct, frozen=True):
    """What `auto` makes of one transport."""

    transport: str
    taken: bool
    reason: str


def look(name: str, double: str = "") -> TransportReport:
    """Ask one transport of the registry about this machine. `double`: the module of an installed double of its part."""
    entry, finding = REGISTRY[name], probe(name)
    runs: Runs = "yes" if finding.runs else "double" if double else "no"
    return TransportReport(
        transport=name,
        runs=runs,
        auto=entry.auto,
        basic=entry.basic,
        reach=entry.reach,
        part=finding.part,
        double=double,
        devices=finding.devices,
        fast=finding.fast,
        missing=finding.missing,
        notes=finding.notes,
        exposes=finding.exposes,
    )


def verdicts(rows: Sequence[TransportReport], kinds: Set[str], trusted_fabric: bool = False) -> list[Verdict]:
    """Judge each transport that `auto` may choose, in its order, for memory of these kinds.

    `trusted_fabric`: the operator trusts all that reach the engines' ports and fabrics.
    """
    mine = [row for row in rows if row.auto]
    anywhere = any(row.basic and row.reach == "network" and row.moves(kinds) for row in mine)
    found = []
    for row in mine:
        taken = False
        if row.runs != "yes":
            reason = f"it cannot run, it lacks {row.lacks()}"
        elif strange := ", ".join(sorted(kinds - set(row.devices))):
            reason = f"it does not move {strange} memory"
        elif row.basic:
            taken, reason = True, "it needs no package and no hardware"
        elif row.fast:
            taken, reason = True, "there is hardware that it drives best"
        elif not anywhere:
            taken, reason = True, f"no basic transport moves {', '.join(sorted(kinds))} memory to other machines"
        else:
            reason = "there is no hardware that makes up for its engine"
        if taken and row.exposes and not trusted_fabric:
            taken, reason = False, f"it {row.exposes}; with --trusted-fabric it would be taken"
        found.append(Verdict(row.transport, taken, reason))
    return found
