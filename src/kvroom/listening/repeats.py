"""Rate limiting of log records that a peer or stranger can cause at will: one a second of each kind, with a count.

A kind is a level, a text before its arguments are filled in, and the peer that the record is about (`extra["peer"]`),
if there is one. The first record of a kind is written unchanged. Those that follow within a second are counted, and the
next record that is written states their number. An endless repetition therefore costs one line a second, and a single
event is never lost. The number of kinds is limited, too: beyond the limit, all peers share one kind.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter  # takes no parameter in Python 3.10

INTERVAL_S = 1.0
MAX_KINDS = 256

_Kind = tuple[int, str, str]  # level, text, peer


class _LastRecord(NamedTuple):
    at_s: float
    left_out: int


class Repeats(_Adapter):
    """A logger that writes at most one record of each kind per `interval_s` seconds. May be used from any thread.

    `clock` is a monotonic clock in seconds.
    """

    def __init__(
        self,
        logger: logging.Logger,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(logger, {})
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._written: OrderedDict[_Kind, _LastRecord] = OrderedDict()  # oldest first

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log as `logging.Logger.log` does, or only count the record."""
        if not self.isEnabledFor(level):
            return
        peer = (kwargs.get("extra") or {}).get("peer", "")
        left_out = self._left_out((level, str(msg), str(peer)))
        if left_out is None:
            return
        more = f" (and {left_out} more like this, not shown)" if left_out else ""
        self.logger.log(level, f"{msg}{more}", *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Return the record unchanged: the fields in `extra` are those of the call."""
        return msg, kwargs

    def _left_out(self, kind: _Kind) -> int | None:
        """Return the number of records of this kind left out since the last one written; None: leave this one out."""
        now_s = self._clock()
        with self._lock:
            if kind not in self._written and len(self._written) >= MAX_KINDS:
                oldest, written = next(iter(self._written.items()))
                if written.left_out == 0 and written.at_s + self._interval_s <= now_s:
                    del self._written[oldest]
                else:  # no room for another kind: use the one that all peers share
                    kind = (kind[0], kind[1], "")
            before = self._written.get(kind)
            if before is not None and now_s < before.at_s + self._interval_s:
                self._written[kind] = before._replace(left_out=before.left_out + 1)
                return None
            self._written.pop(kind, None)
            self._written[kind] = _LastRecord(now_s, 0)
            return before.left_out if before is not None else 0
