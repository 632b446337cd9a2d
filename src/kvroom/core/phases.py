"""Every phase of a room and every transition between them. All of them live here, and nothing else does.

Phases only go forward, terminal phases absorb; a transition that is not listed raises and changes nothing. The state
diagrams in the documentation are generated from `SINK` and `SOURCE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum, auto


class KVPoll(IntEnum):
    """What an engine sees of a room. Names and values are those of SGLang's `KVPoll`."""

    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4


class Side(Enum):
    """The two halves of a room. The values are what operators read: labels of metrics, `/rooms`, logs and failures."""

    SOURCE = "prefill"
    SINK = "decode"

    __hash__ = object.__hash__  # as that of a phase


class Phase(Enum):
    """Where a room stands. The order of the members is the order in which a room can pass through them."""

    NEW = auto()  # made, but no room number assigned yet
    OPENED = auto()  # sink: pages are the engine's alone, no peer was shown them
    EXPECTED = auto()  # source: no offer yet
    OFFERED = auto()  # sink: the sources may write
    READY = auto()  # source: the offer is here, nothing submitted
    RECEIVING = auto()  # sink: some bytes are known to have landed
    SENDING = auto()  # source: transfers were submitted
    VERIFYING = auto()  # every byte has landed, and the two sides compare their checksums
    LANDED = auto()  # sink, terminal: every byte is here
    SENT = auto()  # source, terminal: every byte has landed
    DRAINING = auto()  # given up, but somebody may still write or read
    QUARANTINED = auto()  # given up, and the drain was not proven in time
    RELEASED = auto()  # terminal: given up, and nobody writes or reads

    __hash__ = object.__hash__  # Enum's own is written in Python, and a phase is looked up many times for each room


class Event(Enum):
    """What moves a room from one phase to the next."""

    ADMIT = auto()  # the table gave it a number
    OFFER = auto()  # the offer was sent (sink) or taken (source)
    SUBMIT = auto()  # a transfer was submitted
    PROGRESS = auto()  # a source reported bytes
    VERIFY = auto()  # every byte is accounted for, and the sink has asked for a checksum
    COMPLETE = auto()  # every byte is accounted for, and the checksums, if asked for, agree
    GIVE_UP = auto()  # abort, deadline, lost peer, broken transfer, clear before the end
    QUIET = auto()  # proven: nobody writes or reads any more
    OVERDUE = auto()  # the drain was not proven in time

    __hash__ = object.__hash__  # as that of a phase


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
