"""Random stories of two engines: requests come, leave, meet the wrong partner or none, in both ways of driving a pair.

In every story, each request ends once and reads only its own tokens, undisturbed requests get all of their tokens, and
in the end no block, room or entry is kept. Pools are small, so that engines preempt requests.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from schedulers import BLOCK, Engine, prompt, run

import sampling
from kvroom import Timeouts
from kvroom.transports.memory import MemoryTransport

QUICK = Timeouts(bootstrap_s=1.0, waiting_s=5.0, stall_s=5.0, drain_s=1.0, renew_s=0.2)
STUCK_S = 2 * QUICK.bootstrap_s
IN_TURN = {"do_remote_decode": True}
SEEDS = range(6)
"""The seeds of every run; the same number of others is drawn."""


@dataclass
class Want:
    """A request of the decode side. With `must`, nothing disturbs it, so it must get all its tokens.

    `source` is the prefill request that fills its blocks while it waits. If that is preempted, the room fails.
    """

    name: str
    max_tokens: int
    must: bool
    source: str = ""


class Story:
    """The requests of one seed, and the events that happen to them, of which one is drawn before each step."""

    def __init__(self, seed: int, prefill: Engine, decode: Engine) -> None:
        self.rng = random.Random(seed)
        self.prefill, self.decode = prefill, decode
        self.prompts: list[list[int]] = []
        # prefill requests in turn: name, prompt, and the action of the decode side
        self.handed: list[tuple[str, list[int], str]] = []
        self.wants: list[Want] = []
        self.mortal: list[tuple[Engine, str]] = []  # requests whose client may leave
        self.is_stuck = False
        """True if both pools were full of requests that wait for the other engine, which only deadlines can end.

        Prefilled prompts keep their blocks until the decode side has blocks for them, and requests of the decode side
        keep their blocks until their prompts are prefilled.
        """
        self._ran_s = time.monotonic()

    def act(self) -> None:
        """Carry out one random event."""
        kinds = ["turn", "turn", "once", "once", "plain", "leave", "nothing", "nothing"]
        if isinstance(self.prefill.manager.transport, MemoryTransport):
            kinds += ["hold", "release"]
        getattr(self, f"_{self.rng.choice(kinds)}")()

    def follow(self) -> None:
        """Take prefill requests that have ended to the decode side, or drop them."""
        for name, tokens, then in list(self.handed):
            if name in self.prefill.ended:
                self.handed.remove((name, tokens, then))
                self._take(self.prefill.ended[name].params, tokens, then)

    def watch(self) -> None:
        """Set `is_stuck` if both engines have requests, and none has run for `STUCK_S`, twice the lease of a prompt."""
        engines = self.prefill, self.decode
        if any(engine.scheduler.running or not engine.busy for engine in engines):
            self._ran_s = time.monotonic()
        self.is_stuck |= time.monotonic() - self._ran_s > STUCK_S

    def _take(self, params: Any, tokens: list[int], then: str) -> None:
        if not params or then == "never":
            return
        if then == "shorter":
            tokens = tokens[:-1]
        elif then == "other":
            tokens = [tokens[0] + 1, *tokens[1:]]
        self._want(tokens, params, must=then == "right", mortal=then == "leaves")

    def _turn(self) -> None:
        tokens = self._prompt()
        then = self.rng.choice(("right", "right", "right", "never", "shorter", "other", "leaves"))
        name = self.prefill.add(tokens, IN_TURN)
        self.handed.append((name, tokens, then))
        if self.rng.random() < 0.15:
            self.mortal.append((self.prefill, name))

    def _once(self) -> None:
        tokens = self._prompt()
        params = {**self.prefill.at, "bootstrap_room": self.rng.getrandbits(62)}
        then = self.rng.choice(("right", "right", "right", "alone", "absent", "other", "leaves", "prefill leaves"))
        first = self.rng.random() < 0.5
        source = self._produce(tokens, params, then) if then != "absent" and first else ""
        if then != "alone":
            other = [tokens[0] + 1, *tokens[1:]] if then == "other" else tokens
            self._want(other, params, must=then == "right", mortal=then == "leaves")
        if then != "absent" and not first:
            source = self._produce(tokens, params, then)
        if then != "alone":
            self.wants[-1].source = source

    def _produce(self, tokens: list[int], params: dict[str, Any], then: str) -> str:
        name = self.prefill.add(tokens, params, max_tokens=self.rng.choice((1, 8)))
        if then == "prefill leaves":
            self.mortal.append((self.prefill, name))
        return name

    def _plain(self) -> None:
        engine = self.rng.choice((self.prefill, self.decode))
        name = engine.add(self._prompt(), None, max_tokens=self.rng.randrange(1, 40))
        self.mortal.append((engine, name))

    def _leave(self) -> None:
        if self.mortal:
            engine, name = self.mortal.pop(self.rng.randrange(len(self.mortal)))
            engine.abort(name)

    def _nothing(self) -> None:
        pass

    def _hold(self) -> None:
        """Hold back the writes from now on, so that they arrive later."""
        self.prefill.faults.hold()

    def _release(self) -> None:
        self.prefill.faults.release()

    def _want(self, tokens: list[int], params: Any, *, must: bool, mortal: bool) -> None:
        max_tokens = self.rng.randrange(1, 40)
        name = self.decode.add(tokens, params, max_tokens=max_tokens)
        self.wants.append(Want(name, max_tokens, must))
        if mortal:
            self.mortal.append((self.decode, name))

    def _prompt(self) -> list[int]:
        """Return a prompt. Some begin like an earlier one, so that both sides find prefixes in their caches."""
        tokens = prompt(self.rng, self.rng.randrange(2, 9 * BLOCK))
        if self.prompts and self.rng.random() < 0.4:
            earlier = self.rng.choice(self.prompts)
            tokens = earlier[: self.rng.randrange(1, len(earlier) + 1)] + tokens[: self.rng.randrange(1, len(tokens))]
        self.prompts.append(tokens)
        return tokens


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    drawn = sampling.generator(metafunc.config, "stories").sample(range(len(SEEDS), 1_000_000), len(SEEDS))
    metafunc.parametrize("seed", [*SEEDS, *drawn])


@pytest.fixture(params=["fail", "recompute"])
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["tcp", "memory", "memory-window"])
def pair(model: Path, policy: str, request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Engine]]:
    transport, _, window = request.param.partition("-")
    options: dict[str, Any] = {"policy": policy, "transport": transport, "timeouts": QUICK, "window": 40 * bool(window)}
    prefill = Engine("prefill", model, blocks=26 + 16 * bool(window), **options)
    decode = Engine("decode", model, blocks=34 + 16 * bool(window), **options)
    for engine in (prefill, decode):
        if transport == "memory":
            engine.faults.proof = False  # as with one-sided engines, late writes still land
    yield prefill, decode
    decode.close()
    prefill.close()


@pytest.mark.sampled("seed", kinds=lambda given: [(given["pair"], given["policy"])], least=12)
def test_whatever_happens_requests_end_once_read_their_own_and_leave_nothing(
    pair: tuple[Engine, Engine], policy: str, seed: int
) -> None:
    prefill, decode = pair
    story = Story(seed, prefill, decode)
    for _ in range(60):
        story.act()
        for engine in pair:
            for _ in range(story.rng.randrange(4)):
                if engine.busy:
                    engine.step()
        story.follow()

    if isinstance(prefill.manager.transport, MemoryTransport):
        prefill.faults.release()

    def over() -> bool:
        story.follow()
        story.watch()
        return not (story.handed or any(engine.busy or engine.leftovers() for engine in pair))

    run(list(pair), over)
    assert prefill.mistakes.found + decode.mistakes.found == []
    for want in story.wants:
        end = decode.ended[want.name]
        assert end.reason in ({"length", "abort", "error"} if policy == "fail" else {"length", "abort"})
        if end.reason == "length":
            assert end.tokens == want.max_tokens
        if want.must and want.source not in prefill.preempted and not story.is_stuck:
            assert end.reason == "length", (want, end)
