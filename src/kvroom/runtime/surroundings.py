"""The world of a driver: the links, and what it cannot do by itself.

`manager.KVManager` and `link.Links` are the real ones, `kvroom.testing` has simulated ones.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from kvroom.core.messages import Message, Peer
from kvroom.transports.kit.machine import Fate, Process
from kvroom.wire.frames import Inquiry

T = TypeVar("T")


class Messenger(Protocol):
    """The links, as far as the driver needs them."""

    def host_of(self, peer: Peer) -> str: ...
    def send(self, peer: Peer, message: Message | Inquiry, *, again: bool = False) -> bool: ...
    def drop(self, peer: Peer, cause: str) -> None: ...


class Surroundings(Protocol):
    """What the driver cannot do by itself."""

    def now(self) -> float:
        """Seconds, from a clock that does not run backwards."""

    def post(self, call: Callable[[], None]) -> bool:
        """Run `call` in the driver's thread, soon; may be called from any thread. False: it is too late for that."""

    def run_blocking(self, call: Callable[[], T]) -> Future[T]:
        """Run `call` in some other thread."""

    def redial(self, peer: Peer) -> None:
        """Try to link with a lost peer again. Failing is no event: the next deadline asks anew."""

    def set_alarm(self, at: float | None) -> None:
        """Call `Driver.wake` at this time (None: not at all); replaces the alarm set before."""

    def process(self) -> Process:
        """Return the identity of this process, with the digest of its machine where that is known."""

    def look_up(self, process: Process) -> Fate:
        """Return what became of another process, looked up now. Takes microseconds."""
