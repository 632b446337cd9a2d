"""The name of a request outside of kvroom: its id, and its place in a distributed trace.

A room carries it for logs and views. Nothing is decided by it, and no message contains it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from kvroom.errors import LocalRoomError

_SHOWN_CHARS = 80
_ID = re.compile(r"[!-~]{1,128}")
# W3C Trace Context, 3.2: version, trace-id, parent-id and flags. Version ff is invalid. A later version may append
# fields, which are not kept.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class RequestTrace(NamedTuple):
    """The id of a request and, if its client takes part in a distributed trace, the client's `traceparent`."""

    request_id: str
    """1 to 128 visible ASCII characters."""
    traceparent: str | None = None
    """The first four fields of the header of that name (W3C Trace Context), or None."""

    @staticmethod
    def is_id(text: object) -> bool:
        """Return True for 1 to 128 visible ASCII characters: a text without spaces and line ends."""
        return isinstance(text, str) and _ID.fullmatch(text) is not None

    @staticmethod
    def read_traceparent(text: str) -> str | None:
        """Return the first four fields of a valid `traceparent` header (W3C Trace Context); None for an invalid one."""
        found = _TRACEPARENT.match(text)
        if found is None:
            return None
        rest = text[found.end() :]
        # Version 00 has exactly four fields; in a later version further ones follow a hyphen.
        is_valid = not rest or (rest.startswith("-") and not text.startswith("00"))
        return found[0] if is_valid else None

    def checked(self) -> RequestTrace:
        """Return this value. Raise `LocalRoomError` for a text that could forge a line of a log."""
        if not self.is_id(self.request_id):
            raise LocalRoomError(
                f"invalid request id {repr(self.request_id)[:_SHOWN_CHARS]}: give 1 to 128 visible ASCII characters"
            )
        if self.traceparent is not None and self.read_traceparent(self.traceparent) != self.traceparent:
            raise LocalRoomError(
                f"invalid traceparent {repr(self.traceparent)[:_SHOWN_CHARS]}: give VERSION-TRACEID-PARENTID-FLAGS in "
                f"lower-case hexadecimal digits, or None"
            )
        return self
