"""The identity of this machine that a manager states to its peers, so that they recognise it after a reboot.

The operator sets it in `KVROOM_MACHINE_ID` and guarantees that it is unique: no clone of this machine has it, and no
virtual machine or sandbox that boots separately within this machine. Without the variable it is derived from the ids of
firmware and system, if both can be read (`kvroom.transports.kit.machine.this_machine`). Peers get a digest only.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvroom.errors import ConfigurationError
from kvroom.transports.kit import machine

MACHINE_ID_VARIABLE = "KVROOM_MACHINE_ID"
_MAX_CHARS = 200
_REMEDY = "set a value that no other machine has, such as the UID of a Kubernetes node, or unset it"


def load_machine(environ: Mapping[str, str]) -> str:
    """Return the digest that identifies this machine, or "" if it cannot be distinguished from others.

    Args:
        environ: environment variables, of which `KVROOM_MACHINE_ID` is read.

    Raises:
        ConfigurationError: the variable holds a text that cannot identify one machine: empty, too long, a template that
            was not filled in, or a known placeholder.
    """
    text = environ.get(MACHINE_ID_VARIABLE)
    if text is None:
        return machine.this_machine()
    stated = text.strip()
    if not (0 < len(stated) <= _MAX_CHARS and stated.isprintable()):
        raise ConfigurationError(
            f"{MACHINE_ID_VARIABLE} has {len(stated)} characters, expected 1 to {_MAX_CHARS} printable ones: {_REMEDY}"
        )
    if "$" in stated or "{{" in stated:  # Kubernetes leaves a reference in the value if it cannot resolve it
        raise ConfigurationError(f"{MACHINE_ID_VARIABLE} is {stated!r}, a template that was not filled in: {_REMEDY}")
    if machine.is_placeholder(stated):
        raise ConfigurationError(f"{MACHINE_ID_VARIABLE} is {stated!r}, which many machines have: {_REMEDY}")
    return machine.digest("stated", stated)


class ThisMachine:
    """This machine and the processes on it; `digest` is that of `load_machine`."""

    def __init__(self, digest: str) -> None:
        self._digest = digest

    def process(self) -> machine.Process:
        """Return the identity of this process."""
        return machine.Process.current(self._digest)

    def look_up(self, process: machine.Process) -> machine.Fate:
        """Return whether another process of this machine is running, gone or unknown, looked up now."""
        return machine.look_up(process, self._digest)
