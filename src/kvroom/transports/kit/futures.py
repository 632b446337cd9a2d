"""The futures that `submit` returns. Only their transport finishes them: they cannot be cancelled from outside."""

from __future__ import annotations

from concurrent.futures import Future

from kvroom.errors import TransportError

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
