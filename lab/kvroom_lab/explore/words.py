"""The lines of a trace: each action of a world as an English sentence."""

from __future__ import annotations

from kvroom.core import inputs as asked
from kvroom.core.messages import Peer

from .world import Action, Envelope, Flight, World


class TraceLines:
    """Writes the lines of a trace, with the names of the managers of one kind of world."""

    def __init__(self, world: World) -> None:
        self._names = [world.peer_at(index).address for index in range(len(world.managers))]

    def name(self, index: int) -> str:
        return self._names[index]

    def line(self, action: Action) -> str:
        """Return the line of a trace that describes this action."""
        kind, *what = action
        return getattr(self, f"_line_{kind}", self._line)(kind, *what)

    def _line(self, kind: str, index: int) -> str:
        words = {"open": "opens the room", "expire": "reaches a deadline", "crash": "dies", "restart": "starts again",
                 "pause": "waits for a while"}  # fmt: skip
        return f"{self.name(index)} {words[kind]}"

    def _line_ask(self, _: str, index: int, owner: int, what: asked.Input) -> str:
        return f"{self.name(index)}, room {owner}: {what}"

    def _line_deliver(self, _: str, peer: Peer, index: int, envelope: Envelope, keep: bool) -> str:
        again = ", and it may arrive again" if keep else ""
        return f"{self.name(index)} receives from {peer}: {_contents(envelope)}{again}"

    def _line_drop(self, _: str, peer: Peer, index: int, envelope: Envelope) -> str:
        return f"{self.name(index)} never receives from {peer}: {_contents(envelope)}"

    def _line_land(self, _: str, flight: Flight) -> str:
        return f"transfer {flight.transfer} of {flight.source} for generation {flight.generation} lands"

    def _line_break_off(self, _: str, flight: Flight) -> str:
        return f"transfer {flight.transfer} of {flight.source} for generation {flight.generation} fails"

    def _line_break_link(self, _: str, a: int, b: int, both: bool = False) -> str:
        notice = "" if both else "; only the first one notices"
        return f"the link between {self.name(a)} and {self.name(b)} is lost{notice}"

    def _line_notice(self, _: str, index: int, peer: Peer) -> str:
        return f"{self.name(index)} notices that its link with {peer} is lost"

    def _line_connect(self, _: str, a: int, b: int) -> str:
        return f"{self.name(a)} and {self.name(b)} are linked again"

    def _line_fence(self, _: str, index: int, peer: Peer) -> str:
        return f"{self.name(index)} has proof that {peer} can no longer write"


def _contents(envelope: Envelope) -> str:
    failure = getattr(envelope.message, "failure", None)
    detail = "" if failure is None else f" «{failure.detail}»"
    return f"{envelope.seq}. {type(envelope.message).__name__} of generation {envelope.message.generation}{detail}"
