"""Deadlines and limits of the rooms. Every wait has a deadline, every container has a limit, and each can be set."""

from __future__ import annotations

from enum import Enum

import msgspec

from kvroom.errors import ConfigurationError


class Wait(Enum):
    """A wait of a room. The value is the field of `Timeouts` that bounds it, and failures name it, too."""

    BOOTSTRAP = "bootstrap_s"
    WAITING = "waiting_s"
    STALL = "stall_s"
    DRAIN = "drain_s"
    OFFER = "offer_s"
    RENEW = "renew_s"

    __hash__ = object.__hash__  # the hash of Enum is a Python function, and a room looks waits up several times


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """The deadlines of a room, in seconds, each above 0. A room whose deadline runs out fails and names the setting.

    A timeout ends a request, but never proves a drain: pages that are not drained go to quarantine.
    """

    bootstrap_s: float = 60.0
    """Prefill side: time for a decode worker to offer pages, counted again from each renewal (`Renew`). Decode side:
    time for the links to all prefill ranks. Also the lifetime of an early offer."""
    waiting_s: float = 300.0
    """Decode side: time for the engine to offer pages once the links are up, which renewals do not extend; then from
    the offer to the first bytes, and for a chunk that the prefill engine has not computed yet. Prefill side: time for
    the engine to send its next chunk."""
    stall_s: float = 60.0
    """Decode side: time from one report to the next while bytes are in flight. Prefill side: time for a submitted
    transfer to end. On both sides also the time for a checksum."""
    drain_s: float = 10.0
    """After a failure: time for the drain. Then the pages are quarantined, and the proof is asked for again each time
    that this time has passed."""
    decline_s: float = 5.0
    """Lifetime of a decode side's early failure (`Decline`) for a room that the prefill engine has not opened yet: the
    longest gap between the two requests of a room for which the prefill side learns the cause without a timeout."""
    offer_s: float = 0.05
    """Decode side: time for the engine to offer pages, once the links are up, before the first renewal is sent. An
    engine that offers within this time costs no further message."""
    renew_s: float = 5.0
    """Decode side: time from one renewal to the next. Set it well below the `bootstrap_s` of the prefill side."""

    def __post_init__(self) -> None:
        _all_positive(self)

    def of(self, wait: Wait) -> float:
        """Return the seconds that bound a wait."""
        seconds: float = getattr(self, wait.value)
        return seconds


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits on the state that peers and engines can make a manager keep, each above 0.

    An addition over a limit is refused with an error that names the limit, and nothing of it is kept.
    """

    rooms: int = 1 << 20
    """Rooms of both sides together, until they are cleared and drained."""
    early_arrivals: int = 1 << 14
    """Offers kept for rooms that the prefill engine has not opened yet, and the same number of declines. When that is
    reached, an offer is refused, and a decline replaces the oldest one."""
    early_arrivals_per_peer: int = 1 << 12
    """The same limit for one decode worker, so that one worker cannot use up the limit of all."""
    early_bytes: int = 256 << 20
    """Bytes of memory for these offers together, counted as about 40 bytes for each page."""
    early_bytes_per_peer: int = 64 << 20
    """The same limit for one decode worker: about 1.6 million pages."""

    def __post_init__(self) -> None:
        _all_positive(self)


def _all_positive(settings: msgspec.Struct) -> None:
    for name in settings.__struct_fields__:
        value = getattr(settings, name)
        if not value > 0:
            raise ConfigurationError(f"invalid {name} = {value!r}: give a number above 0")
