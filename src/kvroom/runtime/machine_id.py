"""The identity of this machine that a manager states to its peers, so that they know one that has booted again.

It is what the operator states in `KVROOM_MACHINE_ID`, and vouches for: no other machine has it, however alike it is,
and nothing that boots by itself within this machine does. Without the variable it is what firmware and system say, if
both can be read (`kvroom.transports.kit.machine.this_machine`). Peers get to see a digest only.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvroom.errors import ConfigurationError
from kvroom.transports.kit import machine

MACHINE_ID_VARIABLE = "KVROOM_MACHINE_ID"
_MAX_CHARS = 200
_REMEDY = "write what no other machine has, such as the UID of a Kubernetes node, or unset it"


def load_machine(environ: Mapping[str, str]) -> str:
    """Return the digest of this machine, "" where it cannot be told from others. `ConfigurationError` for a text that
    cannot be the identity of one machine.
    """
    text = environ.get(MACHINE_ID_VARIABLE)
    if text is None:
        return machine.this_machine()
    stated = text.strip()
    if not (0 < len(stated) <= _MAX_CHARS and stated.isprintable()):
        raise ConfigurationError(
            f"{MACHINE_ID_VARIABLE} has {len(stated)} characters, it takes 1 to {_MAX_CHARS} printable ones: {_REMEDY}"
        )
    if "$" in stated or "{{" in stated:  # Kubernetes leaves a reference as it is when it cannot resolve it
        raise ConfigurationError(f"{MACHINE_ID_VARIABLE} is {stated!r}, a template that was not filled in: {_REMEDY}")
    if machine.is_placeholder(stated):
        raise ConfigurationError(f"{MACHINE_ID_VARIABLE} is {stated!r}, which many machines have: {_REMEDY}")
    return machine.digest("stated", stated)


class ThisMachine:
    """This machine under the digest that `load_machine` returns, and the processes on it."""

    def __init__(self, digest: str) -> None:
        self._digest = digest

    def process(self) -> machine.Process:
        """Return the identity of this process."""
        return machine.Process.current(self._digest)

    def look_up(self, process: machine.Process) -> machine.Fate:
        """Return what became of another process of this machine."""
        return machine.look_up(process, self._digest)
