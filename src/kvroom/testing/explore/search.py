"""Breadth-first search: every world that can be reached is visited once, and a broken law has its shortest trace."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable
from typing import NamedTuple

from .ending import is_clean, left, wind_up
from .managers import LawBroken, Managers
from .scopes import Machines, Scope
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


def explore(scope: Scope | None = None, machines: Machines | None = None, *, limit: int = 5_000_000) -> Explored:
    """Visit every reachable state. Raises `Found` with the shortest trace; `LawBroken` if there are over `limit`."""
    return _Search(scope or Scope(), machines or Machines()).run(limit)
