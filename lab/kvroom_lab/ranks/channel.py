"""Questions and answers between a test and the processes that it started: one line of JSON each, over a socket."""

from __future__ import annotations

import socket
from typing import Any

import msgspec

ANSWER_S = 120.0  # no question takes longer unless the process hangs


class RankDied(Exception):
    """The process at the other end is gone."""


class Channel:
    """One end of a channel. Do not use it from several threads at the same time."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._stream = connection.makefile("rb")

    def send(self, value: Any) -> None:
        """Send a value. Raise `RankDied` if the other end is closed."""
        try:
            self._socket.sendall(msgspec.json.encode(value) + b"\n")
        except OSError as error:
            raise RankDied(f"the other end is closed: {error}") from error

    def receive(self) -> Any:
        """Wait for a value.

        Raise `RankDied` if the other end is closed. Do not use the channel after a `TimeoutError`.
        """
        try:
            line = self._stream.readline()
        except ConnectionError as error:
            raise RankDied(f"the connection failed: {error}") from error
        if not line.endswith(b"\n"):
            raise RankDied("the process has ended")
        return msgspec.json.decode(line)

    def close(self) -> None:
        """Close this end. Calling it again does nothing."""
        self._stream.close()
        self._socket.close()


def pair() -> tuple[Channel, socket.socket]:
    """Return a channel and the socket of its other end, which a new process inherits."""
    ours, theirs = socket.socketpair()
    ours.settimeout(ANSWER_S)
    return Channel(ours), theirs
