"""A pair of servers for tests of faults: requests of either leg, moments to wait for, and checks of the outcome."""

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
    """Requests in flight. Those that are not done at the end of the block are cancelled, as by clients that leave."""

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
    """Run `wait_until` while other tasks continue."""
    await asyncio.to_thread(wait_until, true, within_s, or_say)


def leftovers(server: Server) -> dict[str, Any]:
    """Return everything that the server's worker keeps of any request; empty if it keeps nothing."""
    said = server.rooms()
    kept = {**said["rooms"], **said["requests"], "open": said["open"]}
    return {name: value for name, value in kept.items() if value}


@dataclass(frozen=True)
class Scene:
    """One pair with one `kv_load_failure_policy`, and the checks of its answers."""

    pair: Pair
    policy: str
    truth: Truth

    @property
    def prefill(self) -> Server:
        return self.pair.prefill

    @property
    def decode(self) -> Server:
        return self.pair.decode

    # -- requests: each has a new salt, the same on both legs, so that no prefix is found in a cache -------------------

    async def prefilled(self, prompt: Prompt) -> dict[str, Any]:
        """Send the first leg of a request in turn. Return the parameters for the decode side, with the salt added."""
        salt = next(_SALTS)
        answer = await complete(self.prefill.url, prompt, max_tokens=1, params=REMOTE_DECODE, salt=salt)
        assert answer.right, answer
        assert answer.params is not None
        return {**answer.params, "salt": salt}

    async def decoded(self, prompt: Prompt, params: dict[str, Any], **options: Any) -> Answer:
        """Send the decode side's leg, in turn or at the same time."""
        return await complete(
            self.decode.url, prompt, params={"do_remote_prefill": True, **params}, salt=params["salt"], **options
        )

    async def pushed(self, prompt: Prompt, params: dict[str, Any]) -> Answer:
        """Send the prefill side's leg of a request whose legs are sent at the same time."""
        told = {**params, "do_remote_decode": True}
        return await complete(self.prefill.url, prompt, max_tokens=1, params=told, salt=params["salt"])

    async def in_turn(self, prompt: Prompt, **options: Any) -> Answer:
        return await in_turn(self.prefill.url, self.decode.url, prompt, salt=next(_SALTS), **options)

    async def at_once(self, prompt: Prompt) -> Answer:
        """Send both legs at the same time. Return the decode side's answer."""
        params = self.room()
        first, answer = await asyncio.gather(self.pushed(prompt, params), self.decoded(prompt, params))
        assert first.right, first
        return answer

    async def plain(self, server: Server, prompt: Prompt, **options: Any) -> Answer:
        """Send a request that this server serves alone."""
        return await complete(server.url, prompt, salt=next(_SALTS), **options)

    def room(self) -> dict[str, Any]:
        return {**new_room(self.prefill), "salt": next(_SALTS)}

    @asynccontextmanager
    async def in_the_middle(self, prompt: Prompt, params: dict[str, Any]) -> AsyncIterator[tuple[Leg, Leg]]:
        """Send both legs at the same time. Yield their tasks when only some of the blocks are computed and moved."""
        async with Tasks() as tasks:
            legs = tasks.start(self.pushed(prompt, params)), tasks.start(self.decoded(prompt, params))
            await self.until_phase(self.decode, params, "RECEIVING")
            yield legs

    # -- waiting for a state -------------------------------------------------------------------------------------------

    async def until_phase(self, server: Server, params: dict[str, Any], phase: str) -> None:
        """Wait until the room is in this phase."""
        number = params["bootstrap_room"]

        def there() -> bool:
            return any(one["room"] == number and one["phase"] == phase for one in server.rooms()["open"])

        await until(there, lambda: f"room {number} of {server.name} in {phase}: {server.rooms()}")

    # -- what must be true ---------------------------------------------------------------------------------------------

    def right(self, answer: Answer, prompt: Prompt) -> None:
        """Check that the answer is complete, and equal to the reference as far as that goes."""
        assert answer.right, answer
        assert answer.tokens[:NEW_TOKENS] == self.truth[prompt], f"{answer}, not {self.truth[prompt]}"

    def failed(self, answer: Answer, prompt: Prompt, detail: str, room: int | None) -> None:
        """Check the outcome that the policy demands. The log and the reply, if any, contain `detail` and the room."""
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
        """Check that the server's log names this room as failed, with this reason."""
        words = f"room {params['bootstrap_room']} failed", detail
        wait_until(lambda: server.running.lines(*words), 30, lambda: f"no line with {words}: {server.running.said()}")

    def nothing_is_left(self, *servers: Server) -> None:
        """Check that no block is held and that every count of the rooms is 0."""
        for server in servers or self.pair.servers:
            server.wait_for_usage(0)
            wait_until(lambda server=server: leftovers(server) == {}, 30, lambda server=server: f"{leftovers(server)}")
