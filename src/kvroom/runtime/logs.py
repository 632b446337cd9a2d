"""Log records that say which room they are about, and two ways to write them down.

The fields (`room`, `side`, `phase`, `peer`, `generation`) travel in the record and not only in its text, so that a
collector can filter by them.
"""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Any

from kvroom.core.causes import Cause
from kvroom.core.messages import Peer
from kvroom.core.room import Room
from kvroom.listening.repeats import Repeats

FIELDS = ("room", "side", "phase", "peer", "generation", "cause")
EXPECTED_CAUSES = frozenset({Cause.ABORTED, Cause.CLEARED, Cause.CLOSED})
"""Somebody wanted these ends: they are told at INFO, every other failure at WARNING."""


def room_log(logger: logging.Logger, room: Room) -> logging.LoggerAdapter[logging.Logger]:
    """Return a logger for a record about a room as it stands now. A caller that logs often looks at the level first."""
    return logging.LoggerAdapter(logger, _fields(room))


def peer_log(logger: logging.Logger | Repeats, peer: Peer) -> logging.LoggerAdapter[Any]:
    """Return a logger for a record about a peer and no room in particular."""
    return logging.LoggerAdapter(logger, {"peer": str(peer)})


def log_failure(logger: logging.Logger, room: Room, number: int | None) -> None:
    """Tell once why a room failed. `number`: the one that its engine gave it, also where the table has refused it."""
    failure = room.failure
    assert failure is not None  # it has failed
    level = logging.INFO if failure.cause in EXPECTED_CAUSES else logging.WARNING
    if logger.isEnabledFor(level):
        extra = {**_fields(room), "room": number, "peer": failure.peer, "cause": failure.cause.value}
        logger.log(level, "%s", failure.sentence(number), extra=extra, stacklevel=2)


def _fields(room: Room) -> dict[str, object]:
    peers = ", ".join(sorted(map(str, room.involved()))) or None
    fields = (room.number, room.side.value, room.phase.name, peers, room.generation)
    return dict(zip(FIELDS, fields, strict=False))  # without a cause


class TextFormatter(logging.Formatter):
    """One line for people, with the fields at its end: `WARNING kvroom...: what happened [room=7 side=decode ...]`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in _given(record).items())
        return super().formatMessage(record) + (f" [{fields}]" if fields else "")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (UTC), `level`, `logger`, `message`, the fields, `exception` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_given(record),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said)


FORMATTERS: dict[str, type[logging.Formatter]] = {"text": TextFormatter, "json": JsonFormatter}


def configure_logs(level: str, style: str) -> None:
    """Write this process's records on stderr: ours from `level` on, those of other libraries from WARNING on."""
    handler = logging.StreamHandler()
    handler.setFormatter(FORMATTERS[style]())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("kvroom").setLevel(level.upper())


def _given(record: logging.LogRecord) -> dict[str, Any]:
    values = ((name, getattr(record, name, None)) for name in FIELDS)
    return {name: value for name, value in values if value is not None}
