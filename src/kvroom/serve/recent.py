"""The costs of the last hand-offs. Their number is limited: the oldest one is dropped."""

from __future__ import annotations

from collections import deque

import msgspec

from kvroom.engine.request import Request

from .replies import Body

KEPT = 256


class Recent:
    """A ring of the costs of hand-offs, newest last."""

    def __init__(self, kept: int = KEPT) -> None:
        self._costs: deque[Body] = deque(maxlen=kept)
        self._total = 0

    def note(self, request: Request, index: int, cost: msgspec.Struct) -> Body:
        """Store a cost. Return it as JSON-ready fields, with its room and the index of the sequence in its call."""
        fields = {"index": index, "room": request.bootstrap_room, **msgspec.to_builtins(cost)}
        self._costs.append({"request_id": request.request_id, **fields})
        self._total += 1
        return fields

    def body(self) -> Body:
        """Return the `total` number of stored costs and the list of `recent` ones."""
        return {"total": self._total, "recent": list(self._costs)}
