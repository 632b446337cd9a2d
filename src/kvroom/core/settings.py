"""Deadlines and limits of the rooms. Every wait has one and every container has one; each can be set."""

from __future__ import annotations

from enum import Enum

import msgspec

from kvroom.errors import ConfigurationError


class Wait(Enum):
    """One wait of a room. The value is the field of `Timeouts` that bounds it: failures and settings use one name."""

    BOOTSTRAP = "bootstrap_s"
    WAITING = "waiting_s"
    STALL = "stall_s"
    DRAIN = "drain_s"
    OFFER = "offer_s"
    RENEW = "renew_s"

    __hash__ = object.__hash__  # Enum's own is written in Python, and a wait is looked up several times for each room


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """How long a room may stay where it is, in seconds. Running out ends the room with a cause, never in silence.

    A timeout ends a request. It never proves a drain: undrained pages go to quarantine instead.
    """

    bootstrap_s: float = 60.0
    """Source: until the offer comes; a sink that says that it will make one (`Renew`) lets it wait so long anew. Sink:
    until the links to its sources are up. Also the life of an early offer."""
    waiting_s: float = 300.0
    """Sink: for the engine to offer pages once the links are up, however often it renews; then from the offer to the
    first bytes, and for a chunk that the prefill engine has not computed yet. Source: for the engine to send its next
    chunk."""
    stall_s: float = 60.0
    """Sink: from one report to the next, while bytes are on their way. Source: for a submitted transfer to finish."""
    drain_s: float = 10.0
    """After a failure: for the writers to fall quiet, before their pages are quarantined (and asked for again)."""
    decline_s: float = 5.0
    """The life of an early `Decline`: how far the two requests of a room may come apart. Nobody waits for it."""
    offer_s: float = 0.05
    """Sink: how long its engine may take to offer pages, the links being up, before it tells its sources that it has
    none yet (`Renew`). An engine that offers at once costs no further message."""
    renew_s: float = 5.0
    """Sink: from one `Renew` to the next. Choose it well below the `bootstrap_s` of the sources."""

    def __post_init__(self) -> None:
        _all_positive(self)

    def of(self, wait: Wait) -> float:
        """Return the seconds that bound a wait."""
        seconds: float = getattr(self, wait.value)
        return seconds


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much may be kept. Over a limit the answer is a named error, and nothing of the excess is kept."""

    rooms: int = 1 << 20
    """Rooms in the table, both sides together."""
    early_arrivals: int = 1 << 14
    """Offers kept for rooms that the prefill engine has not opened yet. Of declines as many; the oldest make room."""
    early_arrivals_per_peer: int = 1 << 12
    """The same, of one decode worker, so that one cannot use up the room of all."""
    early_bytes: int = 256 << 20
    """Memory of these offers together, as `messages.Offer.kept_bytes` counts it: 40 bytes for each page."""
    early_bytes_per_peer: int = 64 << 20
    """The same, of one decode worker: 1.6 million pages."""

    def __post_init__(self) -> None:
        _all_positive(self)


def _all_positive(settings: msgspec.Struct) -> None:
    for name in settings.__struct_fields__:
        value = getattr(settings, name)
        if not value > 0:
            raise ConfigurationError(f"{name} = {value!r}: give a number above 0")
