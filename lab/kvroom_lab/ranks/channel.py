"""Questions and answers between a test and the processes that it started: one line of JSON each, over a socket."""

from __future__ import annotations

import socket
from typing import Any

import msgspec

ANSWER_S = 120.0  # nothing that is asked may take longer: then something hangs, and who asked is told what


class RankDied(Exception):
    """The process at the other end is gone."""


class Channel:
    """One end. Not for several threads at once."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._stream = connection.makefile("rb")

    def say(self, value: Any) -> None:
        """Send a value. `RankDied` if nobody is there."""
        try:
            self._socket.sendall(msgspec.json.encode(value) + b"\n")
        except OSError as error:
            raise RankDied(f"nobody listens: {error}") from error

    def hear(self) -> Any:
        """Wait for a value. `RankDied` when the other end is closed. After a `TimeoutError` it is of no use."""
        try:
            line = self._stream.readline()
        except ConnectionError as error:
            raise RankDied(f"nobody speaks: {error}") from error
        if not line.endswith(b"\n"):
            raise RankDied("the process has ended")
        return msgspec.json.decode(line)

    def close(self) -> None:
        """Close this end. Idempotent."""
        self._stream.close()
        self._socket.close()


def pair() -> tuple[Channel, socket.socket]:
    """A channel and the socket of its other end, to be given to a process."""
    ours, theirs = socket.socketpair()
    ours.settimeout(ANSWER_S)
    return Channel(ours), theirs
