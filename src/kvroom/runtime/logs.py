"""Log records with fields for room, peer and request, and two formats for them.

The fields (`FIELDS`) are attributes of the record and not only part of its text, so that a log collector can filter by
them.
"""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Any

from kvroom.core.causes import Cause
from kvroom.core.messages import Peer
from kvroom.core.room import Room
from kvroom.core.trace import RequestTrace
from kvroom.listening.repeats import Repeats

FIELDS = ("room", "side", "phase", "peer", "generation", "cause", "request_id", "traceparent")
EXPECTED_CAUSES = frozenset({Cause.ABORTED, Cause.CLEARED, Cause.CLOSED})
"""Causes of failures that an engine or operator intended. They are logged at INFO, all others at WARNING."""


def room_log(logger: logging.Logger, room: Room) -> logging.LoggerAdapter[logging.Logger]:
    """Return a logger whose records have the room's present state. Check the level first where many are logged."""
    return logging.LoggerAdapter(logger, _fields(room))


def peer_log(logger: logging.Logger | Repeats, peer: Peer) -> logging.LoggerAdapter[Any]:
    """Return a logger whose records have the field `peer`."""
    return logging.LoggerAdapter(logger, {"peer": str(peer)})


def log_failure(logger: logging.Logger, room: Room, number: int | None) -> None:
    """Log the failure of a room. `number` is the engine's: a room that the table refused has none of its own."""
    failure = room.failure
    assert failure is not None  # it has failed
    level = logging.INFO if failure.cause in EXPECTED_CAUSES else logging.WARNING
    if logger.isEnabledFor(level):
        extra = {**_fields(room), "room": number, "peer": failure.peer, "cause": failure.cause.value}
        logger.log(level, "%s", failure.sentence(number), extra=extra, stacklevel=2)


def _fields(room: Room) -> dict[str, object]:
    peers = ", ".join(sorted(map(str, room.involved()))) or None
    return {
        "room": room.number,
        "side": room.side.value,
        "phase": room.phase.name,
        "peer": peers,
        "generation": room.generation,
        **trace_fields(room.trace),
    }


def trace_fields(trace: RequestTrace | None) -> dict[str, str | None]:
    """Return the fields of a record about a request."""
    return {} if trace is None else trace._asdict()


def iso_time(record: logging.LogRecord) -> str:
    """Return the time of a record in UTC, in the form of ISO 8601 with milliseconds and zone."""
    return datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")


class TextFormatter(logging.Formatter):
    """One line of text: time (UTC), level, logger, message, and the fields at its end: `[room=7 side=decode ...]`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002 - the base class
        """Return the time with its zone, so that the logs of several machines can be compared."""
        return iso_time(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Append the fields to the message. A message of kvroom stays on one line.

        It may quote a client or peer, which could otherwise forge lines of the log.
        """
        fields = " ".join(f"{name}={value}" for name, value in _given(record).items())
        line = super().formatMessage(record) + (f" [{fields}]" if fields else "")
        if "kvroom" not in record.name.split("."):
            return line
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (UTC), `level`, `logger`, `message`, the fields, `exception` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one JSON object."""
        found: dict[str, Any] = {
            "time": iso_time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_given(record),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found)


FORMATTERS: dict[str, type[logging.Formatter]] = {"text": TextFormatter, "json": JsonFormatter}


def configure_logs(level: str, style: str) -> None:
    """Write this process's log to stderr: records of kvroom from `level` up, those of other libraries from WARNING up.

    Args:
        level: the name of a level, in any case, such as "info".
        style: a key of `FORMATTERS`: "text" or "json".
    """
    handler = logging.StreamHandler()
    handler.setFormatter(FORMATTERS[style]())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("kvroom").setLevel(level.upper())


def _given(record: logging.LogRecord) -> dict[str, Any]:
    values = ((name, getattr(record, name, None)) for name in FIELDS)
    return {name: value for name, value in values if value is not None}
