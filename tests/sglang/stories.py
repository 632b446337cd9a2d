"""One disturbed request of a real pair: its way to the moment of the disturbance, and the checks afterwards."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from answers import Judge
from asking import Answer, abort, both, generate, new_room
from fleet import wait_until
from servers import Fleet, Server

Side = Literal["prefill", "decode"]
Moment = Literal["alone", "waiting", "computing", "stopped", "running"]
WHOLE_S = 60
_salts = itertools.count()
_OPEN = ("EXPECTED", "OPENED", "OFFERED", "RECEIVING", "READY", "SENDING")
_READY = ("READY",)
_MOVING = ("SENDING",)


async def until(true: Callable[[], bool], or_say: Callable[[], str], within_s: float = WHOLE_S) -> None:
    """Wait until `true()` is true, while other tasks continue."""
    await asyncio.to_thread(wait_until, true, within_s, or_say)


def phases(server: Server, room: int) -> list[str]:
    """Return the phases of a server's rooms with this number."""
    return [view["phase"] for view in server.rooms()["open"] if view["room"] == room]


def leftovers(server: Server) -> dict[str, Any]:
    """Return everything that a server keeps of any request, in kvroom's tables and in SGLang's pool and queues."""
    said, load = server.rooms(), server.load()
    counts = {name: load[name] for name in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")}
    kept = {**said["rooms"], **said["requests"], **counts, "open": said["open"]}
    return {name: value for name, value in kept.items() if value}


@dataclass
class Story:
    """One request of `prompt` on a pair. Its legs are tasks, so that one can be cancelled as a client leaves."""

    pair: Fleet
    judge: Judge
    prompt: tuple[int, ...]

    def __post_init__(self) -> None:
        self.room = new_room(self.pair.prefill)
        self.salt = f"story {next(_salts)}"
        self.legs: dict[Side, asyncio.Task[Answer]] = {}
        self.blocker: asyncio.Task[tuple[Answer, Answer]] | None = None
        self.stopped: Server | None = None

    @property
    def number(self) -> int:
        number: int = self.room["bootstrap_room"]
        return number

    def server(self, side: Side) -> Server:
        return self.pair.prefill if side == "prefill" else self.pair.decode

    def begin(self, side: Side, **options: Any) -> None:
        """Send one leg. Its client reads a stream, so that the server notices immediately when the client leaves."""
        call = generate(
            self.server(side).url, self.prompt, room=self.room, salt=self.salt, stream=True,
            rid=f"{side}-{self.number}", **options,
        )  # fmt: skip
        self.legs[side] = asyncio.create_task(call)

    async def come_to(self, moment: Moment, side: Side, longest: Sequence[int]) -> None:
        """Send the legs that `moment` needs, and wait for it. `side` is the side of the disturbance.

        - alone: only the leg of `side` was sent
        - waiting: the prefill side computes another prompt first
        - computing: the first chunks have moved
        - stopped: the same, and the other side's processes are stopped
        - running: the decode side has the prompt and computes tokens
        """
        if moment == "alone":
            self.begin(side)
            await self._until(side, _OPEN)
            return
        if moment == "waiting":
            before = new_room(self.pair.prefill)
            call = both(self.pair.prefill, self.pair.decode, longest, room=before, salt=f"{self.salt} before")
            self.blocker = asyncio.create_task(call)
            await self._until("prefill", _MOVING, before["bootstrap_room"])
        self.begin("prefill")
        self.begin("decode", max_tokens=64 if moment == "running" else 16)
        if moment == "running":
            await self._until("decode", _OPEN)
            await self._until("decode", ())
            return
        await self._until("prefill", _READY if moment == "waiting" else _MOVING)
        if moment == "stopped":
            self.stopped = self.server("decode" if side == "prefill" else "prefill")
            self.stopped.running.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let the stopped processes continue."""
        if self.stopped is not None:
            self.stopped.running.signal(signal.SIGCONT)

    async def _until(self, side: Side, wanted: Sequence[str], room: int | None = None) -> None:
        """Wait until the room is in one of these phases on this side, or, without phases, until it is gone."""
        server, number = self.server(side), self.number if room is None else room
        await until(
            lambda: any(phase in wanted for phase in phases(server, number)) or not (wanted or phases(server, number)),
            lambda: f"room {number} is {phases(server, number)} on {server.name}, not {wanted}",
        )

    async def leave(self, side: Side) -> None:
        """Close the connection of one leg's client."""
        self.legs[side].cancel()
        await asyncio.gather(self.legs[side], return_exceptions=True)

    async def abort(self, side: Side) -> None:
        """Abort one leg by its request id."""
        assert await abort(self.server(side), f"{side}-{self.number}") == 200

    async def outcome(self, side: Side) -> Answer | None:
        """Return the answer to one leg; None if it was never sent, or if its client has left."""
        leg = self.legs.get(side)
        if leg is None or leg.cancelled():
            return None
        return await leg

    def check(self, side: Side, answer: Answer | None) -> None:
        """Check that a leg ended with the right tokens or with one clear error."""
        if answer is None or (side == "prefill" and answer.right):
            return
        if answer.right:
            self.judge.check(self.prompt, answer)
            return
        assert answer.detail, f"{side} ended without a reason: {answer}"
        named = f"room {self.number}" in answer.detail or "bort" in answer.detail or "connection" in answer.detail
        assert named, f"{side} does not say why: {answer.detail}"


async def empty(server: Server) -> None:
    """Wait until a server keeps nothing of any request."""
    await until(lambda: not leftovers(server), lambda: f"{server.name} keeps {leftovers(server)}")


async def whole(pair: Fleet, judge: Judge, prompt: tuple[int, ...]) -> None:
    """Wait until both servers keep nothing, and check that they serve another request and keep nothing of it."""
    for again in (False, True):
        for server in pair.servers:
            assert server.running.alive, f"{server.name} has ended:\n{server.running.said()}"
            await empty(server)
        if not again:
            first, answer = await both(pair.prefill, pair.decode, prompt, salt=f"next {next(_salts)}")
            assert first.right, first
            judge.check(prompt, answer)
