"""The last sequences that ended here, with their costs or the reason of their failure.

Their number is limited: the oldest one is dropped. A request that was refused before its rooms were opened is not among
them, so that a flood of invalid requests does not replace the others.
"""

from __future__ import annotations

import time
from collections import deque

import msgspec

from kvroom.engine.request import Request

from .replies import Body

KEPT = 256


class Recent:
    """A ring of the last ends of sequences, newest last."""

    def __init__(self, kept: int = KEPT) -> None:
        self._entries: deque[Body] = deque(maxlen=kept)
        self._total = 0

    def note(self, request: Request, index: int, cost: msgspec.Struct) -> Body:
        """Store a success. Return its costs as JSON-ready fields, with room and index of the sequence in its call."""
        fields = {"index": index, "room": request.bootstrap_room, **msgspec.to_builtins(cost)}
        self._store(request, {**fields, "outcome": "succeeded", "error": None})
        return fields

    def note_failure(self, request: Request, index: int, error: str) -> None:
        """Store a failure with its sentence."""
        fields = {"index": index, "room": request.bootstrap_room, "outcome": "failed", "error": error}
        self._store(request, fields)

    def body(self) -> Body:
        """Return the `total` number of sequences that ended and the list of `recent` ones."""
        return {"total": self._total, "recent": list(self._entries)}

    def _store(self, request: Request, fields: Body) -> None:
        names = {name: value for name, value in request.trace._asdict().items() if value is not None}
        self._entries.append({**names, **fields, "ended_at": time.time()})
        self._total += 1
