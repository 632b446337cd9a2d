"""A pair of servers as tests of faults see it: requests of either leg, moments to wait for, how an end is judged."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from clients import NEW_TOKENS, REMOTE_DECODE, Answer, complete, in_turn
from fixtures import Truth, new_room
from fleet import Pair, Server, wait_until
from prompts import Prompt

_SALTS = map(str, itertools.count())
Leg = asyncio.Task[Answer]


class Tasks:
    """Requests in flight. Those that have not ended at the end of the block are cancelled, as by clients that leave."""

    def __init__(self) -> None:
        self._started: list[asyncio.Task[Any]] = []

    def start(self, request: Any) -> asyncio.Task[Any]:
        self._started.append(asyncio.ensure_future(request))
        return self._started[-1]

    async def __aenter__(self) -> Tasks:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._started:
            task.cancel()
        await asyncio.gather(*self._started, return_exceptions=True)


async def until(true: Callable[[], bool], or_say: Callable[[], str], within_s: float = 60) -> None:
    """`wait_until` beside running requests."""
    await asyncio.to_thread(wait_until, true, within_s, or_say)


def leftovers(server: Server) -> dict[str, Any]:
    """Return what the server's worker keeps of any request."""
    said = server.rooms()
    kept = {**said["rooms"], **said["requests"], "open": said["open"]}
    return {name: value for name, value in kept.items() if value}


@dataclass(frozen=True)
class Scene:
    """One pair under one policy, and how its answers are judged."""

    pair: Pair
    policy: str
    truth: Truth

    @property
    def prefill(self) -> Server:
        return self.pair.prefill

    @property
    def decode(self) -> Server:
        return self.pair.decode

    # -- requests: two have never the same salt, so that no prefix is found in a cache; the legs of one have -----------

    async def prefilled(self, prompt: Prompt) -> dict[str, Any]:
        """In turn, the first leg: what the decode side is to be told, and the salt, which no server looks for there."""
        salt = next(_SALTS)
        answer = await complete(self.prefill.url, prompt, max_tokens=1, params=REMOTE_DECODE, salt=salt)
        assert answer.right, answer
        assert answer.params is not None
        return {**answer.params, "salt": salt}

    async def decoded(self, prompt: Prompt, params: dict[str, Any], **options: Any) -> Answer:
        """The decode side's leg, in either way."""
        return await complete(
            self.decode.url, prompt, params={"do_remote_prefill": True, **params}, salt=params["salt"], **options
        )

    async def pushed(self, prompt: Prompt, params: dict[str, Any]) -> Answer:
        """At once, the prefill side's leg."""
        told = {**params, "do_remote_decode": True}
        return await complete(self.prefill.url, prompt, max_tokens=1, params=told, salt=params["salt"])

    async def in_turn(self, prompt: Prompt, **options: Any) -> Answer:
        return await in_turn(self.prefill.url, self.decode.url, prompt, salt=next(_SALTS), **options)

    async def at_once(self, prompt: Prompt) -> Answer:
        """Both legs at the same time; what the decode side answers."""
        params = self.room()
        first, answer = await asyncio.gather(self.pushed(prompt, params), self.decoded(prompt, params))
        assert first.right, first
        return answer

    async def plain(self, server: Server, prompt: Prompt, **options: Any) -> Answer:
        """A request that this server serves alone."""
        return await complete(server.url, prompt, salt=next(_SALTS), **options)

    def room(self) -> dict[str, Any]:
        return {**new_room(self.prefill), "salt": next(_SALTS)}

    @asynccontextmanager
    async def in_the_middle(self, prompt: Prompt, params: dict[str, Any]) -> AsyncIterator[tuple[Leg, Leg]]:
        """At once, both legs as tasks, when some of the blocks have come and others are not computed yet."""
        async with Tasks() as tasks:
            legs = tasks.start(self.pushed(prompt, params)), tasks.start(self.decoded(prompt, params))
            await self.until_phase(self.decode, params, "RECEIVING")
            yield legs

    # -- waiting for something to be so --------------------------------------------------------------------------------

    async def until_phase(self, server: Server, params: dict[str, Any], phase: str) -> None:
        """Until its room stands in this phase."""
        number = params["bootstrap_room"]

        def there() -> bool:
            return any(one["room"] == number and one["phase"] == phase for one in server.rooms()["open"])

        await until(there, lambda: f"room {number} of {server.name} in {phase}: {server.rooms()}")

    # -- what must be true ---------------------------------------------------------------------------------------------

    def right(self, answer: Answer, prompt: Prompt) -> None:
        """The whole answer, and the right one as far as the reference goes."""
        assert answer.right, answer
        assert answer.tokens[:NEW_TOKENS] == self.truth[prompt], f"{answer}, not {self.truth[prompt]}"

    def failed(self, answer: Answer, prompt: Prompt, detail: str, room: int | None) -> None:
        """As the policy says; `cause` and the room are told in the log, and in the reply where there is one."""
        words = ["cannot be loaded", detail, *([] if room is None else [f"room {room}"])]
        assert self.decode.running.lines(*words), f"no line with {words}: {self.decode.running.said()}"
        if self.policy == "fail":
            assert answer.status == 500, answer
            return
        self.right(answer, prompt)
        assert answer.params is not None
        assert detail in answer.params["failure"]
        assert room is None or answer.params["bootstrap_room"] == room

    def gave_up(self, server: Server, params: dict[str, Any], detail: str) -> None:
        """The server's log says that this room ended with this cause."""
        words = f"room {params['bootstrap_room']} failed", detail
        wait_until(lambda: server.running.lines(*words), 30, lambda: f"no line with {words}: {server.running.said()}")

    def nothing_is_left(self, *servers: Server) -> None:
        """No block is held, and every count of the rooms is 0."""
        for server in servers or self.pair.servers:
            server.wait_for_usage(0)
            wait_until(lambda server=server: leftovers(server) == {}, 30, lambda server=server: f"{leftovers(server)}")
