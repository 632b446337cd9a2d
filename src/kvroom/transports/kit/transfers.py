"""Transfers: the futures that `submit` returns, and what a transport notes of one that has begun.

Only their transport finishes these futures: they cannot be cancelled from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks

Transfer = Future[int]
"""Resolves to the number of bytes moved, or to a `TransportError`. Poll with `done()`, wait with `result(timeout)`."""


def started() -> Transfer:
    """Return a future that only its transport can finish: it cannot be cancelled from outside."""
    future: Transfer = Future()
    future.set_running_or_notify_cancel()
    return future


def finished(nbytes: int) -> Transfer:
    """Return a future that is done already."""
    future = started()
    future.set_result(nbytes)
    return future


def failed(error: TransportError) -> Transfer:
    """Return a future that failed already: nothing was moved."""
    future = started()
    future.set_exception(error)
    return future


class TransferRecord:
    """One transfer that has begun. `error` is what it will end with; None if all of its bytes land.

    A transport derives its own record from this one and adds how far it has come. It calls `finish` once, when no byte
    of the transfer is read or written any more.
    """

    def __init__(self, blocks: Blocks, grant: bytes = b"") -> None:
        self.blocks = blocks
        self.nbytes = blocks.nbytes
        self.grant = grant
        self.future = started()
        self.error: TransportError | None = None
        self.afterwards: Callable[[], None] | None = None
        """Called by `finish` before the future is done."""

    def fail(self, error: TransportError) -> None:
        """Let the transfer end with this error, if it has none yet."""
        self.error = self.error or error

    def finish(self) -> None:
        """Tell how the transfer ended."""
        afterwards, self.afterwards = self.afterwards, None  # it may know this record: neither shall keep the other
        if afterwards is not None:
            afterwards()
        if self.error is None:
            self.future.set_result(self.nbytes)
        else:
            self.future.set_exception(self.error)
