"""Breadth-first search: every world that can be reached is visited once, and a broken law has its shortest trace."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Hashable
from typing import NamedTuple

from . import deaths
from .deaths import Deathbed
from .ending import is_clean, left, wind_up
from .managers import LawBroken, Managers
from .scopes import Deaths, Machines, Scope
from .words import Words
from .world import Action, World

_ROUNDS = 12  # of winding up; more than any world of these scopes needs


class Found(LawBroken):
    """A broken law with its shortest trace: no sequence of fewer actions breaks any law in this scope.

    A law that breaks only while all is cleared and wound up is told last, with the trace to where that begins.
    """

    def __init__(self, law: str, trace: tuple[str, ...]) -> None:
        super().__init__("\n  ".join((f"{law}; it takes {len(trace)} steps:", *trace)))
        self.law, self.trace = law, trace


class Explored(NamedTuple):
    """How much was visited: distinct states, steps between them, distinct managers, seconds of processor time."""

    states: int
    steps: int
    managers: int
    cpu_s: float


class _Search:
    def __init__(self, scope: Scope, machines: Machines) -> None:
        self.managers = Managers(scope, machines)
        try:
            self.start = World(self.managers)
        except LawBroken as broken:
            raise Found(str(broken), ()) from None
        self.words = Words(self.start)
        self.path: list[tuple[int, Action]] = [(-1, ())]  # of each state: the one before it, and what happened then
        self.clean: set[Hashable] = set()  # states that are known to have a clean end
        self.later: Found | None = None  # a law that broke in a clean end, where the search may come to it with less

    def run(self, limit: int) -> Explored:
        begun = time.process_time()
        start = self.start
        seen, todo, steps = {start.key()}, deque([start]), 0
        while todo:
            world = todo.popleft()
            for action in world.actions():
                steps += 1
                try:
                    after = world.after(action)
                    key = after.key()
                    if key in seen:
                        continue
                    self.check_clean_end(after, action, world)
                except LawBroken as broken:
                    raise Found(str(broken), self.trace(world, action)) from None
                seen.add(key)
                after.came = len(self.path)
                self.path.append((world.came, action))
                todo.append(after)
            if len(seen) > limit:
                raise LawBroken(f"over {limit} states: narrow the scope")
        if self.later is not None:
            raise self.later
        return Explored(len(seen), steps, self.managers.count, time.process_time() - begun)

    def trace(self, world: World, action: Action) -> tuple[str, ...]:
        words, at = [self.words.line(action)], world.came
        while at > 0:
            at, before = self.path[at]
            words.append(self.words.line(before))
        return tuple(reversed(words))

    def check_clean_end(self, world: World, action: Action, before: World) -> None:
        """Law 2: all clear, everything under way ends, messages arrive: nothing is left, each page came back once."""
        passed, winding = [], world
        for _ in range(_ROUNDS):
            state = winding.state()
            if state in self.clean:
                break
            passed.append(state)
            winding = winding.twin()
            try:
                wind_up(winding)
            except LawBroken as broken:
                if self.later is None:
                    self.later = Found(f"{broken}, when all is cleared from here on", self.trace(before, action))
                return
            if is_clean(winding):
                break
        else:
            raise LawBroken(f"law 2: after all was cleared, {left(winding)}")
        self.clean.update(passed)


_Begun = tuple[tuple[deaths.Action, ...], tuple[deaths.Action, ...]]
"""All that has happened in a world, and what may happen next."""


class _Vigil:
    """The same for worlds that cannot be copied: each is made anew, by all that has happened in it."""

    def __init__(self, scope: Deaths, machines: Machines) -> None:
        self.scope, self.machines = scope, machines
        self.later: Found | None = None

    def run(self, limit: int) -> Explored:
        """Visit all, in silence: what drivers log of each of thousands of deaths helps nobody."""
        begun, silenced = time.process_time(), logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            states, steps, kinds = self.visit(limit)
        finally:
            logging.disable(silenced)
        if self.later is not None:
            raise self.later
        return Explored(states, steps, kinds, time.process_time() - begun)

    def visit(self, limit: int) -> tuple[int, int, int]:
        """Return how many states, steps and distinct drivers there are."""
        start = Deathbed(self.scope, self.machines)
        kind, steps = start.kind(), 0
        seen, kinds = {(kind, start.rest())}, {kind}
        begin: _Begun = (), tuple(start.actions())
        todo = deque([begin])
        while todo:
            trace, actions = todo.popleft()
            for action in actions:
                steps += 1
                longer = (*trace, action)
                try:
                    after = self.replay(longer)
                except LawBroken as broken:
                    raise self.found(str(broken), longer) from None
                kind = after.kind()
                key = kind, after.rest()
                if key not in seen:
                    seen.add(key)
                    kinds.add(kind)
                    todo.append((longer, tuple(after.actions())))
                    self.check_clean_end(longer, after.proofs())
            if len(seen) > limit:
                raise LawBroken(f"over {limit} states: narrow the scope")
        return len(seen), steps, len(kinds)

    def replay(self, trace: tuple[deaths.Action, ...]) -> Deathbed:
        world = Deathbed(self.scope, self.machines)
        for action in trace:
            world.after(action)
        return world

    def found(self, law: str, trace: tuple[deaths.Action, ...]) -> Found:
        return Found(law, tuple(map(deaths.line, trace)))

    def check_clean_end(self, trace: tuple[deaths.Action, ...], proofs: tuple[str, ...]) -> None:
        """Law 2: each proof that can be given brings the pages back, whatever was said before."""
        for proof in proofs if self.later is None else ():
            try:
                self.replay(trace).wind_up(proof)
            except LawBroken as broken:
                self.later = self.found(str(broken), trace)


def explore(
    scope: Scope | Deaths | None = None, machines: Machines | None = None, *, limit: int = 5_000_000
) -> Explored:
    """Visit every reachable state. Raises `Found` with the shortest trace; `LawBroken` if there are over `limit`."""
    if isinstance(scope, Deaths):
        return _Vigil(scope, machines or Machines()).run(limit)
    return _Search(scope or Scope(), machines or Machines()).run(limit)
