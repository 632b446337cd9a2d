"""What the ranks of one engine agree on: of each room the state of the rank that is furthest behind.

The law: ranks that get an answer get the same one, and no rank waits for ever. Where one gets an error because another
is silent or gone, all get one, with this call or, if their answer was on its way already, with the next. A room that
failed on one rank has failed on all, and all of them can say on which and why.

    one exchange       which rooms (a digest), and of each the least of (status, rank)
    only if it failed  which rooms each rank has, to name the difference; or the causes of what failed

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
"""The most that one rank gives to `Carrier.gather`."""
MAX_CAUSE_CHARS = 1000
FIRST_VALUES = 256
"""The first exchange has this length on every rank, so that ranks with different numbers of rooms can still meet."""
_HEAD = 2
_CAUSES_CHARS = MAX_BODY_BYTES // 8
_NAMED = 5

State = tuple[KVPoll, str | None]
"""What a rank says of a room: its status, and the cause if it failed."""


class AgreementError(KVRoomError):
    """The ranks of an engine have no common answer.

    They named different rooms (nothing else happened, and they may agree again), or one is silent or gone, which the
    text names (then this and every later call fails).
    """


class RankConsensus(NamedTuple):
    """What holds for a room on every rank: the least status, and the lowest rank that has it."""

    status: KVPoll
    rank: int
    detail: str | None = None
    """Why it failed, in the words of that rank. None unless it did."""

    def sentence(self, room: int) -> str:
        """What every rank can say of the room."""
        if self.status is KVPoll.Failed:
            return f"room {room} failed on rank {self.rank}: {self.detail}"
        return f"room {room} is {self.status.name} on rank {self.rank}"


class Carrier(Protocol):
    """Carries numbers between ranks in lockstep. Every method raises `AgreementError`, and always from then on."""

    rank: int
    size: int

    def least(self, values: Sequence[int]) -> list[int]:
        """Element by element the least of all ranks. `values` are int64, as many on every rank."""

    def gather(self, body: bytes) -> list[bytes]:
        """What each rank gave, by rank: at most `MAX_BODY_BYTES` each."""

    def close(self) -> None:
        """Give the connections back. Idempotent."""


class Agreement:
    """One per rank, over its `carrier`. For one thread."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier

    def agree(self, states: Mapping[int, State]) -> dict[int, RankConsensus]:
        """The common state of each room. All ranks call it in lockstep, with the same rooms in any order.

        Raises `AgreementError`, and `LimitExceeded` for more than `MAX_ROOMS` rooms: on all ranks alike.
        """
        rooms = sorted(states)
        size, rank = self._carrier.size, self._carrier.rank
        values = [int(states[room][0]) * size + rank for room in rooms]
        first = values[: FIRST_VALUES - _HEAD]
        packed = b"".join(room.to_bytes(8, "big") for room in rooms)
        digest = int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "big") >> 1
        # A digest and its negative: the least of both are the least and the largest that the ranks have.
        head = self._carrier.least([digest, -digest, *first, *[0] * (FIRST_VALUES - _HEAD - len(first))])
        if head[0] != -head[1]:
            bodies = self._carrier.gather(msgspec.msgpack.encode(rooms[:MAX_ROOMS]))
            theirs = [set(_decoded(one, body, _room_lists)) for one, body in enumerate(bodies)]
            common = set.intersection(*theirs)
            named = []  # what each rank has besides the rooms that all of them have
            for one, its in enumerate(theirs):
                if extra := sorted(its - common):
                    more = f" and {len(extra) - _NAMED} more" if len(extra) > _NAMED else ""
                    named.append(f"rank {one} has {', '.join(map(str, extra[:_NAMED]))}{more}")
            raise AgreementError(
                f"the ranks of this engine ask about different rooms: besides the {len(common)} that all have, "
                f"{'; '.join(named) or f'some has more than {MAX_ROOMS}'}; call agree with the same rooms on every rank"
            )
        if len(rooms) > MAX_ROOMS:
            raise LimitExceeded(f"{len(rooms)} rooms to agree on, allowed are {MAX_ROOMS}: ask about fewer at once")
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
        """Fill the causes in. Each comes from one rank: the one that the others have learned of."""
        ours = [
            room
            for room, one in found.items()
            if one.status is KVPoll.Failed and one.rank == self._carrier.rank and states[room][1]
        ]
        chars = min(MAX_CAUSE_CHARS, _CAUSES_CHARS // max(len(ours), 1))
        told = {room: (states[room][1] or "")[:chars] for room in ours}
        for rank, body in enumerate(self._carrier.gather(msgspec.msgpack.encode(told))):
            causes = _decoded(rank, body, _cause_lists)
            for room, one in found.items():
                if one.status is KVPoll.Failed and one.rank == rank:
                    found[room] = one._replace(detail=causes.get(room, "it gave no cause"))


_T = TypeVar("_T")
_room_lists = msgspec.msgpack.Decoder(Annotated[list[RoomNumber], Meta(max_length=MAX_ROOMS)])
_cause_lists = msgspec.msgpack.Decoder(dict[int, str])


def _decoded(rank: int, body: bytes, decoder: msgspec.msgpack.Decoder[_T]) -> _T:
    try:
        return decoder.decode(body)
    except UNDECODABLE as error:
        raise AgreementError(f"rank {rank} sent {len(body)} bytes that say nothing: {error}") from None
