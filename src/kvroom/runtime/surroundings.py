"""`Surroundings`: the loop, clock, network and machine of a manager. The defaults are the real ones.

The simulation passes simulated ones, so that it runs the real manager. `Messenger` and `LocalMachine` are the parts of
links and machine that a driver uses.
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
    """The part of `Links` that the driver uses; the methods are described there."""

    def host_of(self, peer: Peer) -> str: ...
    def send(self, peer: Peer, message: Message | Inquiry, *, again: bool = False) -> bool: ...
    def drop(self, peer: Peer, detail: str) -> None: ...
    async def dial(self, address: str) -> Peer: ...


class LocalMachine(Protocol):
    """This machine, and the processes on it."""

    def process(self) -> Process:
        """Return the identity of this process, with the digest of its machine if that is known."""

    def look_up(self, process: Process) -> Fate:
        """Return whether another process is running, gone or unknown, looked up now. Takes microseconds."""


class Tokens(Protocol):
    """A source of unique bytes."""

    def next(self) -> bytes:
        """Return bytes that it has not returned before."""


class Listed(Protocol):
    """Function that queries a directory for its ranks, as `kvroom.bootstrap.client.listed` does."""

    def __call__(
        self, bootstrap_addr: str, /, *, secret: bytes, allowed: AllowList | None
    ) -> Awaitable[list[RankInfo]]: ...


class Surroundings(NamedTuple):
    """Everything that a manager takes from outside. Each manager calls each factory once."""

    loop: Callable[[], EventLoop] = LoopThread
    """Creates the loop."""
    machine: Callable[[], LocalMachine] = lambda: ThisMachine(load_machine(os.environ))
    """Creates the view of the machine."""
    incarnation: int | None = None
    """The incarnation of the run. None: that of a new key. A given one has no key, see `Links`."""
    generations: Callable[[], Tokens] = lambda: TokenSource(8)
    """Creates the source of the rooms' generations, 8 bytes each."""
    listening: Listen | None = None
    """Opens the listening socket of the links. None: a real socket."""
    listed: Listed = client.listed
    """Queries a directory, once for each query."""
    handler: Callable[[Driver], LinkHandler] = lambda driver: driver
    """Returns the handler of the links for this driver; the simulation inserts one that records and breaks."""
