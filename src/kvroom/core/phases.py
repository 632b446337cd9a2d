"""Every phase of a room and every transition between them, as two tables, and nothing else.

Phases only go forward, and a room never leaves a terminal phase. A transition that is not listed raises an error and
changes nothing. The state diagrams in docs/rooms.md are generated from `SINK` and `SOURCE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum, auto


class KVPoll(IntEnum):
    """The state of a room as an engine polls it. Names and values are those of SGLang's `KVPoll`."""

    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4


class Side(Enum):
    """The two halves of a room. Operators read the values in labels of metrics, `/rooms`, logs and failures."""

    SOURCE = "prefill"
    SINK = "decode"

    __hash__ = object.__hash__  # faster, see Phase


class Phase(Enum):
    """The phase of a room. A room passes through the members in this order, and skips some."""

    NEW = auto()  # no number assigned yet
    OPENED = auto()  # sink: no offer made yet; the engine may have no pages yet (see Renew)
    EXPECTED = auto()  # source: no offer yet; the engine may send chunks already, which wait
    OFFERED = auto()  # sink: the sources may write, and none has reported bytes
    READY = auto()  # source: an offer is here, no transfer was submitted
    RECEIVING = auto()  # sink: a source has reported bytes
    SENDING = auto()  # source: a transfer was submitted
    VERIFYING = auto()  # every byte has landed, and the two sides compare their checksums
    LANDED = auto()  # sink, terminal: every byte is here
    SENT = auto()  # source, terminal: every byte has landed
    DRAINING = auto()  # failed, but a source may still write (sink), or a transfer still read (source)
    QUARANTINED = auto()  # failed, and the drain was not proven within drain_s
    RELEASED = auto()  # terminal: failed and drained

    __hash__ = object.__hash__  # the hash of Enum is a Python function, and a room looks phases up many times


class Event(Enum):
    """The events that move a room from one phase to the next."""

    ADMIT = auto()  # the table gave it a number
    OFFER = auto()  # the offer was sent (sink) or taken (source)
    SUBMIT = auto()  # a transfer was submitted
    PROGRESS = auto()  # a source reported bytes
    VERIFY = auto()  # every byte is accounted for, and the sink has asked for a checksum
    COMPLETE = auto()  # every byte is accounted for, and the checksums, if asked for, agree
    GIVE_UP = auto()  # abort, timeout, lost peer, broken transfer, clear before the end
    QUIET = auto()  # drained: no writer and no reader is left, by proof
    OVERDUE = auto()  # the drain was not proven within drain_s

    __hash__ = object.__hash__  # faster, see Phase


Table = Mapping[Phase, Mapping[Event, Phase]]

_DRAIN: dict[Phase, Mapping[Event, Phase]] = {
    Phase.DRAINING: {Event.QUIET: Phase.RELEASED, Event.OVERDUE: Phase.QUARANTINED},
    Phase.QUARANTINED: {Event.QUIET: Phase.RELEASED, Event.OVERDUE: Phase.QUARANTINED},
    Phase.RELEASED: {},
}


SINK: Table = {
    Phase.NEW: {Event.ADMIT: Phase.OPENED, Event.GIVE_UP: Phase.RELEASED},
    Phase.OPENED: {Event.OFFER: Phase.OFFERED, Event.GIVE_UP: Phase.RELEASED},
    Phase.OFFERED: {
        Event.PROGRESS: Phase.RECEIVING,
        Event.VERIFY: Phase.VERIFYING,
        Event.COMPLETE: Phase.LANDED,
        Event.GIVE_UP: Phase.DRAINING,
    },
    Phase.RECEIVING: {
        Event.PROGRESS: Phase.RECEIVING,
        Event.VERIFY: Phase.VERIFYING,
        Event.COMPLETE: Phase.LANDED,
        Event.GIVE_UP: Phase.DRAINING,
    },
    Phase.VERIFYING: {Event.COMPLETE: Phase.LANDED, Event.GIVE_UP: Phase.DRAINING},
    Phase.LANDED: {},
    **_DRAIN,
}

SOURCE: Table = {
    Phase.NEW: {Event.ADMIT: Phase.EXPECTED, Event.GIVE_UP: Phase.RELEASED},
    Phase.EXPECTED: {Event.OFFER: Phase.READY, Event.GIVE_UP: Phase.RELEASED},
    Phase.READY: {
        Event.SUBMIT: Phase.SENDING,
        Event.VERIFY: Phase.VERIFYING,
        Event.COMPLETE: Phase.SENT,  # the sink had every token already
        Event.GIVE_UP: Phase.DRAINING,
    },
    Phase.SENDING: {
        Event.SUBMIT: Phase.SENDING,
        Event.VERIFY: Phase.VERIFYING,
        Event.COMPLETE: Phase.SENT,
        Event.GIVE_UP: Phase.DRAINING,
    },
    Phase.VERIFYING: {Event.COMPLETE: Phase.SENT, Event.GIVE_UP: Phase.DRAINING},
    Phase.SENT: {},
    **_DRAIN,
}

SUCCEEDED = frozenset({Phase.LANDED, Phase.SENT})
GIVEN_UP = frozenset({Phase.DRAINING, Phase.QUARANTINED, Phase.RELEASED})
TERMINAL = SUCCEEDED | {Phase.RELEASED}
ENDED = GIVEN_UP | SUCCEEDED
