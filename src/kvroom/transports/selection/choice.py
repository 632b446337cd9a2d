"""The rules by which `auto` selects transports on a machine, and the reasons that it gives for and against each.

The rules are pure functions of reports, so they also apply to the reports of another machine. Only `report_on` probes
this machine.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Literal

import msgspec

from kvroom.tested import TESTED
from kvroom.transports import REGISTRY, probe
from kvroom.transports.kit.probing import Missing

Runs = Literal["yes", "no", "double"]


class TransportReport(msgspec.Struct, frozen=True):
    """One transport on one machine: its entry in the registry and the result of its probe."""

    transport: str
    """The name in the registry."""
    runs: Runs
    """`double` if only a double of its hardware can run."""
    auto: bool
    """True if `auto` may choose it."""
    basic: bool
    """True if it needs no package and no hardware."""
    reach: Literal["process", "machine", "network"]
    """The largest distance between the two ends."""
    part: str
    """The package that does the work, with its version."""
    double: str
    """The module of an installed double of its hardware, or ""."""
    devices: tuple[str, ...]
    """The kinds of memory that it moves there: "cpu", "cuda", "npu"."""
    fast: bool
    """True if the machine has hardware that only this transport drives well."""
    missing: tuple[Missing, ...]
    """The missing requirements; empty if it can run."""
    notes: tuple[str, ...]
    """Further facts for operators."""
    exposes: str = ""
    """The way in which processes without the secret could reach registered memory, or ""; see `ProbeResult`."""
    tested: tuple[str, ...] = ()
    """The versions of the package that kvroom is tested with; empty if the transport needs no package."""

    def moves(self, kinds: Set[str]) -> bool:
        """Return True if the transport runs on the machine and moves memory of all these kinds.

        Args:
            kinds: Kinds of memory: "cpu", "cuda", "npu".
        """
        return self.runs == "yes" and kinds <= set(self.devices)

    def lacks(self) -> str:
        """Return the first missing requirement and the number of others, for logs and for answers to clients."""
        first, *more = [missing.what for missing in self.missing] or ["something that it does not name"]
        return f"{first} and {len(more)} more" if more else first


class Verdict(msgspec.Struct, frozen=True):
    """The decision of `auto` on one transport, with its reason."""

    transport: str
    taken: bool
    """True if it becomes a candidate."""
    reason: str
    """The reason for or against it, as a sentence about "it"."""


def report_on(name: str, double: str = "") -> TransportReport:
    """Probe one transport on this machine. `double` is the module of an installed double of its hardware, or ""."""
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
        tested=TESTED.get(finding.part.partition(" ")[0], ()),
    )


def verdicts(rows: Sequence[TransportReport], kinds: Set[str], trusted_fabric: bool = False) -> list[Verdict]:
    """Decide on each transport that `auto` may choose, in order of preference.

    Args:
        rows: The reports of one machine.
        kinds: The kinds of memory to move ("cpu", "cuda", ...).
        trusted_fabric: True if the operator trusts every host that can reach the engines' ports and fabrics.

    Returns:
        One verdict for each report whose `auto` is True, in the order of the reports.
    """
    mine = [row for row in rows if row.auto]
    anywhere = any(row.basic and row.reach == "network" and row.moves(kinds) for row in mine)
    found = []
    for row in mine:
        taken = False
        if row.runs != "yes":
            reason = f"it cannot run: missing {row.lacks()}"
        elif strange := ", ".join(sorted(kinds - set(row.devices))):
            reason = f"it does not move {strange} memory"
        elif row.basic:
            taken, reason = True, "it needs no package and no hardware"
        elif row.fast:
            taken, reason = True, "this machine has hardware that it drives best"
        elif not anywhere:
            taken, reason = True, f"no basic transport moves {', '.join(sorted(kinds))} memory to other machines"
        else:
            reason = "no RDMA or NVLink here, so it would be slower than local and tcp"
        if taken and row.exposes and not trusted_fabric:
            taken, reason = False, f"it {row.exposes}; --trusted-fabric allows it"
        found.append(Verdict(row.transport, taken, reason))
    return found
