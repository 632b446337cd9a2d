"""`RoomView`: the state of one room as other threads and other processes get to see it, a frozen copy."""

from __future__ import annotations

import msgspec

from kvroom.core.room import Room


class RoomView(msgspec.Struct, frozen=True):
    """One room at the moment when the manager copied its state. Times are seconds, relative to that moment."""

    room: int
    """The room's number."""
    generation: int | None
    """The number of this use of the room; None on a prefill side that has no offer yet."""
    side: str
    """The side of this manager: `prefill` or `decode`."""
    phase: str
    """The name of the room's `Phase`."""
    status: str
    """The name of the `KVPoll` value that the engine sees."""
    peers: tuple[str, ...]
    """Addresses of the peers that take part, sorted."""
    pages: int
    """Pages that the room holds now."""
    nbytes: int
    """Bytes moved so far."""
    cleared: bool
    """True if the engine has cleared the room; it is then kept for its drain only."""
    waits_for: str | None
    """The event that the room waits for; None if it waits for nothing."""
    waits_until_s: float | None
    """Seconds until the room's deadline; None if it has none."""
    failure: str | None
    """The sentence of its failure; None if it has not failed."""
    cause: str | None
    """The cause of its failure, the value of a `kvroom.Cause`; None if it has not failed."""
    identity: dict[str, str]
    """The identity of the request as this side states it: digests by name."""
    peer_identity: dict[str, str]
    """The identity of the request as the other side states it; empty until it has."""
    timeline: tuple[tuple[str, float], ...]
    """Each phase that the room entered, with the seconds since then, oldest first."""
    request_id: str | None = None
    """The id of the request, as the engine gave it; None if it gave none."""
    traceparent: str | None = None
    """The request's place in a distributed trace, as the engine gave it; None if it gave none."""


def view_of(room: Room, now_s: float) -> RoomView:
    """Copy the state of a room that is in the table. In the loop's thread; `now_s` is the time of its clock."""
    assert room.number is not None  # it is in the table
    return RoomView(
        room=room.number,
        generation=room.generation,
        side=room.side.value,
        phase=room.phase.name,
        status=room.status.name,
        peers=tuple(sorted(str(peer) for peer in room.involved())),
        pages=len(room.held_pages),
        nbytes=room.nbytes,
        cleared=room.cleared,
        waits_for=room.awaited,
        waits_until_s=room.timer.at - now_s if room.timer else None,
        failure=room.failure.sentence(room.number) if room.failure else None,
        cause=room.failure.cause.value if room.failure else None,
        identity=dict(room.identity.fields) if room.identity else {},
        peer_identity=dict(room.peer_identity.fields) if room.peer_identity else {},
        request_id=room.trace.request_id if room.trace else None,
        traceparent=room.trace.traceparent if room.trace else None,
        timeline=tuple((step.phase.name, now_s - step.at) for step in room.history),
    )
