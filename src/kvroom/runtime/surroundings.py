"""What a driver needs besides its loop: the links, and the machine that it runs on.

`link.Links` and `machine_id.ThisMachine` are the real ones, the laboratory has simulated ones.
"""

from __future__ import annotations

from typing import Protocol

from kvroom.core.messages import Message, Peer
from kvroom.transports.kit.machine import Fate, Process
from kvroom.wire.frames import Inquiry


class Messenger(Protocol):
    """The links, as far as the driver needs them."""

    def host_of(self, peer: Peer) -> str: ...
    def send(self, peer: Peer, message: Message | Inquiry, *, again: bool = False) -> bool: ...
    def drop(self, peer: Peer, cause: str) -> None: ...
    async def dial(self, address: str) -> Peer: ...


class LocalMachine(Protocol):
    """This machine, and the processes on it."""

    def process(self) -> Process:
        """Return the identity of this process, with the digest of its machine where that is known."""

    def look_up(self, process: Process) -> Fate:
        """Return what became of another process, looked up now. Takes microseconds."""
