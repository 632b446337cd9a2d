"""Breadth-first search: visit every reachable world once, and report a broken law with its shortest trace."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Hashable
from typing import NamedTuple

from . import deaths
from .deaths import LossWorld
from .ending import is_clean, left, wind_up
from .managers import LawBroken, Managers
from .scopes import Deaths, Machines, Scope
from .words import TraceLines
from .world import Action, World

_ROUNDS = 12  # limit on rounds of winding up; no world of these scopes needs that many


class Found(LawBroken):
    """A broken law with its shortest trace: no sequence of fewer actions breaks any law in this scope.

    A law that breaks only while everything is cleared and wound up is reported after the search, with the trace that
    leads to the state where the winding up began.
    """

    def __init__(self, law: str, trace: tuple[str, ...]) -> None:
        super().__init__("\n  ".join((f"{law}; it takes {len(trace)} steps:", *trace)))
        self.law, self.trace = law, trace


class Explored(NamedTuple):
    """Size of a search: distinct states, steps between them, distinct managers, seconds of processor time."""

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
        self.words = TraceLines(self.start)
        # For each state: the index of the state before it, and the action between them.
        self.path: list[tuple[int, Action]] = [(-1, ())]
        self.clean: set[Hashable] = set()  # states that are known to have a clean end
        self.later: Found | None = (
            None  # a law that broke in a clean end; the search goes on, since a shorter trace may break one
        )

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
                after.path_index = len(self.path)
                self.path.append((world.path_index, action))
                todo.append(after)
            if len(seen) > limit:
                raise LawBroken(f"over {limit} states: narrow the scope")
        if self.later is not None:
            raise self.later
        return Explored(len(seen), steps, self.managers.count, time.process_time() - begun)

    def trace(self, world: World, action: Action) -> tuple[str, ...]:
        words, at = [self.words.line(action)], world.path_index
        while at > 0:
            at, before = self.path[at]
            words.append(self.words.line(before))
        return tuple(reversed(words))

    def check_clean_end(self, world: World, action: Action, before: World) -> None:
        """Law 2: once all is cleared, ended and delivered, nothing is left, and each room's pages came back once."""
        passed, winding = [], world
        for _ in range(_ROUNDS):
            state = winding.state()
            if state in self.clean:
                break
            passed.append(state)
            winding = winding.copy()
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
"""All actions so far in a world, and the actions that are possible next."""


class _ReplaySearch:
    """The same search for worlds that cannot be copied: each is built again by repeating all of its actions."""

    def __init__(self, scope: Deaths, machines: Machines) -> None:
        self.scope, self.machines = scope, machines
        self.later: Found | None = None

    def run(self, limit: int) -> Explored:
        """Visit all worlds with logging disabled: drivers would log each of thousands of deaths."""
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
        """Return the numbers of states, steps and distinct drivers."""
        start = LossWorld(self.scope, self.machines)
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

    def replay(self, trace: tuple[deaths.Action, ...]) -> LossWorld:
        world = LossWorld(self.scope, self.machines)
        for action in trace:
            world.after(action)
        return world

    def found(self, law: str, trace: tuple[deaths.Action, ...]) -> Found:
        return Found(law, tuple(map(deaths.line, trace)))

    def check_clean_end(self, trace: tuple[deaths.Action, ...], proofs: tuple[str, ...]) -> None:
        """Law 2: each proof that can be given brings the pages back, whatever statements came before it."""
        for proof in proofs if self.later is None else ():
            try:
                self.replay(trace).wind_up(proof)
            except LawBroken as broken:
                self.later = self.found(str(broken), trace)


def explore(
    scope: Scope | Deaths | None = None, machines: Machines | None = None, *, limit: int = 5_000_000
) -> Explored:
    """Visit every reachable state.

    Args:
        scope: The events of the world and their limits; a world of one source and one sink by default.
        machines: The code under test; a planted bug replaces a class of it.
        limit: The largest number of states to visit.

    Returns:
        The size of the search.

    Raises:
        Found: A law is broken; the text has the shortest trace.
        LawBroken: There are more than `limit` states.
    """
    if isinstance(scope, Deaths):
        return _ReplaySearch(scope, machines or Machines()).run(limit)
    return _Search(scope or Scope(), machines or Machines()).run(limit)
