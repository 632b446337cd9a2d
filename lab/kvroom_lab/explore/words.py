"""What happens in a world, in words: the lines of a trace."""

from __future__ import annotations

from kvroom.core import inputs as asked
from kvroom.core.messages import Peer

from .world import Action, Flight, Said, World


class Words:
    """Names the managers of one kind of world."""

    def __init__(self, world: World) -> None:
        self._names = [world.peer_at(index).address for index in range(len(world.managers))]

    def name(self, index: int) -> str:
        return self._names[index]

    def line(self, action: Action) -> str:
        """One line of a trace."""
        kind, *what = action
        return getattr(self, f"_say_{kind}", self._say)(kind, *what)

    def _say(self, kind: str, index: int) -> str:
        words = {"open": "opens the room", "expire": "runs into a deadline", "crash": "dies", "restart": "starts anew",
                 "pause": "sees some time pass"}  # fmt: skip
        return f"{self.name(index)} {words[kind]}"

    def _say_ask(self, _: str, index: int, owner: int, what: asked.Input) -> str:
        return f"{self.name(index)}, room {owner}: {what}"

    def _say_deliver(self, _: str, peer: Peer, index: int, said: Said, keep: bool) -> str:
        return f"{self.name(index)} hears from {peer}: {_spoken(said)}{', which may come again' if keep else ''}"

    def _say_drop(self, _: str, peer: Peer, index: int, said: Said) -> str:
        return f"{self.name(index)} will not hear from {peer}: {_spoken(said)}"

    def _say_land(self, _: str, flight: Flight) -> str:
        return f"transfer {flight.transfer} of {flight.source} for generation {flight.generation} lands"

    def _say_break_off(self, _: str, flight: Flight) -> str:
        return f"transfer {flight.transfer} of {flight.source} for generation {flight.generation} breaks"

    def _say_break_link(self, _: str, a: int, b: int, both: bool = False) -> str:
        return f"the link of {self.name(a)} and {self.name(b)} is lost{'' if both else ', which the first one notices'}"

    def _say_notice(self, _: str, index: int, peer: Peer) -> str:
        return f"{self.name(index)} notices that its link with {peer} is lost"

    def _say_connect(self, _: str, a: int, b: int) -> str:
        return f"{self.name(a)} and {self.name(b)} are linked again"

    def _say_fence(self, _: str, index: int, peer: Peer) -> str:
        return f"{self.name(index)} has proof that {peer} is cut off"


def _spoken(said: Said) -> str:
    failure = getattr(said.message, "failure", None)
    detail = "" if failure is None else f" «{failure.detail}»"
    return f"{said.seq}. {type(said.message).__name__} of generation {said.message.generation}{detail}"
