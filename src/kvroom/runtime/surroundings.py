"""What a manager takes from the world around it: `Surroundings`, with the real ones as defaults.

The laboratory gives a manager simulated ones, so that the manager itself is the real one there, too. `Messenger` and
`LocalMachine` are as much of the links and of the machine as a driver needs.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvroom.bootstrap import client
from kvroom.bootstrap.directory import RankInfo
from kvroom.core.messages import Message, Peer
from kvroom.dialling.allowed import AllowList
from kvroom.transports.kit.machine import Fate, Process
from kvroom.wire.auth import TokenSource
from kvroom.wire.frames import Inquiry

from .link import LinkHandler, Listen
from .loop import EventLoop, LoopThread
from .machine_id import ThisMachine, load_machine

if TYPE_CHECKING:
    from .driver import Driver


class Messenger(Protocol):
    """The links, as far as the driver needs them."""

    def host_of(self, peer: Peer) -> str: ...
    def send(self, peer: Peer, message: Message | Inquiry, *, again: bool = False) -> bool: ...
    def drop(self, peer: Peer, detail: str) -> None: ...
    async def dial(self, address: str) -> Peer: ...


class LocalMachine(Protocol):
    """This machine, and the processes on it."""

    def process(self) -> Process:
        """Return the identity of this process, with the digest of its machine where that is known."""

    def look_up(self, process: Process) -> Fate:
        """Return what became of another process, looked up now. Takes microseconds."""


class Tokens(Protocol):
    """Bytes that were given to no other room."""

    def next(self) -> bytes: ...


class Listed(Protocol):
    """How a directory is asked for its ranks, as `kvroom.bootstrap.client.listed` does."""

    def __call__(
        self, bootstrap_addr: str, /, *, secret: bytes, allowed: AllowList | None
    ) -> Awaitable[list[RankInfo]]: ...


class Surroundings(NamedTuple):
    """See the module. What is called here is called once for each manager, but for `listening` and `listed`."""

    loop: Callable[[], EventLoop] = LoopThread
    machine: Callable[[], LocalMachine] = lambda: ThisMachine(load_machine(os.environ))
    incarnation: int | None = None  # None: that of a new key. A given one has no key, see `Links`
    generations: Callable[[], Tokens] = lambda: TokenSource(8)
    listening: Listen | None = None  # None: over real sockets
    listed: Listed = client.listed
    hearing: Callable[[Driver], LinkHandler] = lambda driver: driver  # returns what the links talk to
