"""Agreement of the ranks of one engine on the state of each room: that of the rank that is furthest behind.

The law: ranks that get an answer get the same one, and no rank waits without end. If one rank gets an error because
another is silent or gone, all ranks get one, from this call or, if their answer was already in flight, from the next. A
room that failed on one rank has failed on all, and every rank can name that rank and the reason.

    one exchange       the set of rooms (as a digest), and for each room the minimum of (status, rank)
    only on failure    the rooms of each rank, to name the difference; or the reasons of failed rooms

Nothing is kept between two calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple, Protocol, TypeVar

import msgspec
from msgspec import Meta

from kvroom.core.messages import RoomNumber
from kvroom.core.phases import KVPoll
from kvroom.errors import KVRoomError, LimitExceeded
from kvroom.wire.frames import UNDECODABLE

MAX_ROOMS = 1 << 16
MAX_BODY_BYTES = 2 << 20
"""Limit for the body that one rank passes to `Carrier.gather`."""
MAX_CAUSE_CHARS = 1000
FIRST_VALUES = 256
"""Length of the first exchange on every rank: ranks with different numbers of rooms must exchange equal lengths."""
_HEAD = 2
_CAUSES_CHARS = MAX_BODY_BYTES // 8
_NAMED = 5

State = tuple[KVPoll, str | None]
"""The state of a room on one rank: its status, and the reason if it failed."""


class AgreementError(KVRoomError):
    """The ranks of an engine have no common answer.

    Either they passed different rooms: then nothing has changed, and the next call may succeed. Or a rank is silent or
    gone: then the text names it, and this and every later call fails.
    """


class RankConsensus(NamedTuple):
    """The common state of a room, equal on every rank."""

    status: KVPoll
    """The least status of all ranks."""
    rank: int
    """The lowest rank that has it."""
    detail: str | None = None
    """The reason of the failure as that rank stated it; None if the room has not failed."""

    def sentence(self, room: int) -> str:
        """Return a sentence about the room that is equal on every rank.

        Args:
            room: the room's number.
        """
        if self.status is KVPoll.Failed:
            return f"room {room} failed on rank {self.rank}: {self.detail}"
        return f"room {room} is {self.status.name} on rank {self.rank}"


class Carrier(Protocol):
    """Exchanges numbers between ranks that call in lockstep.

    If a rank is silent or gone, `least` and `gather` raise `AgreementError`, and so does every later call.
    """

    rank: int
    """The index of this rank, in [0, `size`)."""
    size: int
    """The number of ranks."""

    def least(self, values: Sequence[int]) -> list[int]:
        """Return the minimum over all ranks, element by element.

        Args:
            values: int64 numbers, the same count on every rank.
        """

    def gather(self, body: bytes) -> list[bytes]:
        """Return the bodies of all ranks, by rank.

        Args:
            body: at most `MAX_BODY_BYTES` bytes; its length may differ between ranks.
        """

    def close(self) -> None:
        """Close the connections. Idempotent."""


class Agreement:
    """The agreement of one rank with the others. For one thread.

    Args:
        carrier: connects the ranks; the caller closes it.
    """

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier

    def agree(self, states: Mapping[int, State]) -> dict[int, RankConsensus]:
        """Return the common state of each room. All ranks call it in lockstep, with the same rooms in any order.

        Args:
            states: the state of each room on this rank, by room number.

        Returns:
            The common state of each room, by room number, in the order of `states`.

        Raises:
            AgreementError: the ranks passed different rooms, or a rank is silent or gone.
            LimitExceeded: there are more than `MAX_ROOMS` rooms. It is raised on all ranks.
        """
        rooms = sorted(states)
        size, rank = self._carrier.size, self._carrier.rank
        values = [int(states[room][0]) * size + rank for room in rooms]
        first = values[: FIRST_VALUES - _HEAD]
        packed = b"".join(room.to_bytes(8, "big") for room in rooms)
        digest = int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "big") >> 1
        # The minimum of the negated digest is the negated maximum, so the two are opposite only if all digests are
        # equal.
        head = self._carrier.least([digest, -digest, *first, *[0] * (FIRST_VALUES - _HEAD - len(first))])
        if head[0] != -head[1]:
            bodies = self._carrier.gather(msgspec.msgpack.encode(rooms[:MAX_ROOMS]))
            theirs = [set(_decoded(one, body, _room_lists)) for one, body in enumerate(bodies)]
            common = set.intersection(*theirs)
            named = []  # for each rank, the rooms that not all ranks have
            for one, its in enumerate(theirs):
                if extra := sorted(its - common):
                    more = f" and {len(extra) - _NAMED} more" if len(extra) > _NAMED else ""
                    named.append(f"rank {one} has {', '.join(map(str, extra[:_NAMED]))}{more}")
            raise AgreementError(
                f"the ranks of this engine passed different rooms: in addition to the {len(common)} that all have, "
                f"{'; '.join(named) or f'one has more than {MAX_ROOMS}'}; call agree with the same rooms on every rank"
            )
        if len(rooms) > MAX_ROOMS:
            raise LimitExceeded(
                f"{len(rooms)} rooms to agree on, and the limit is {MAX_ROOMS}: pass fewer rooms in one call"
            )
        least = head[_HEAD : _HEAD + len(first)]
        if len(rooms) > len(first):
            least += self._carrier.least(values[len(first) :])
        found = {
            room: RankConsensus(KVPoll(value // size), value % size) for room, value in zip(rooms, least, strict=True)
        }
        if any(one.status is KVPoll.Failed for one in found.values()):
            self._explain(found, states)
        return {room: found[room] for room in states}

    def _explain(self, found: dict[int, RankConsensus], states: Mapping[int, State]) -> None:
        """Exchange the reasons of failed rooms. For each room, the rank in its `RankConsensus` sends the reason."""
        ours = [
            room
            for room, one in found.items()
            if one.status is KVPoll.Failed and one.rank == self._carrier.rank and states[room][1]
        ]
        chars = min(MAX_CAUSE_CHARS, _CAUSES_CHARS // max(len(ours), 1))
        reasons = {room: (states[room][1] or "")[:chars] for room in ours}
        for rank, body in enumerate(self._carrier.gather(msgspec.msgpack.encode(reasons))):
            causes = _decoded(rank, body, _cause_lists)
            for room, one in found.items():
                if one.status is KVPoll.Failed and one.rank == rank:
                    found[room] = one._replace(detail=causes.get(room, "it stated no reason"))


_T = TypeVar("_T")
_room_lists = msgspec.msgpack.Decoder(Annotated[list[RoomNumber], Meta(max_length=MAX_ROOMS)])
_cause_lists = msgspec.msgpack.Decoder(dict[int, str])


def _decoded(rank: int, body: bytes, decoder: msgspec.msgpack.Decoder[_T]) -> _T:
    try:
        return decoder.decode(body)
    except UNDECODABLE as error:
        raise AgreementError(f"rank {rank} sent {len(body)} bytes that cannot be decoded: {error}") from None
