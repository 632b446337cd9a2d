"""Transfers: the futures that `submit` returns, and the base class of transports' own records of them.

Only the transport completes these futures; they cannot be cancelled.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks

Transfer = Future[int]
"""Resolves to the number of bytes moved, or to a `TransportError`. Poll with `done()`, wait with `result(timeout)`."""


def started() -> Transfer:
    """Return a running future, which cannot be cancelled."""
    future: Transfer = Future()
    future.set_running_or_notify_cancel()
    return future


def finished(nbytes: int) -> Transfer:
    """Return a future that is completed already."""
    future = started()
    future.set_result(nbytes)
    return future


def failed(error: TransportError) -> Transfer:
    """Return a future that has failed already; no byte was moved."""
    future = started()
    future.set_exception(error)
    return future


class TransferRecord:
    """A transfer in flight.

    `error` is the error that it will end with, or None if all bytes land. A transport derives its own record
    from this class and adds its progress. It calls `finish` once, when no further byte of the transfer is read or
    written.
    """

    def __init__(self, blocks: Blocks, grant: bytes = b"") -> None:
        self.blocks = blocks
        self.nbytes = blocks.nbytes
        self.grant = grant
        self.future = started()
        self.error: TransportError | None = None
        self.afterwards: Callable[[], None] | None = None
        """Called by `finish` before the future completes."""

    def fail(self, error: TransportError) -> None:
        """Record the error that the transfer will end with. A later call does not replace it."""
        self.error = self.error or error

    def finish(self) -> None:
        """Complete the future with the number of bytes or the error."""
        afterwards, self.afterwards = self.afterwards, None  # break the cycle: the callback may refer to this record
        if afterwards is not None:
            afterwards()
        if self.error is None:
            self.future.set_result(self.nbytes)
        else:
            self.future.set_exception(self.error)
