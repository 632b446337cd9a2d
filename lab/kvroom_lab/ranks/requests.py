"""The pages of one request in a rank's pool, and the steps in which it is sent from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvroom.plan.ranks import Place

from .cases import Piece, Side, pieces
from .pool import Held, RankPool


class Placed(NamedTuple):
    """A request in one rank's pool: everything held, the steps of the main group, the pages of the other groups."""

    held: tuple[Held, ...]
    steps: tuple[Held, ...]
    windows: dict[str, tuple[int, ...]]

    def give_back(self, pool: RankPool) -> None:
        """Return every page to the pool."""
        for held in self.held:
            pool.give(held)


def place_to_send(pool: RankPool, side: Side, place: Place, tokens: int) -> Placed:
    """Take pages for the part that a prefill rank computes. Consecutive steps share the page at their border."""
    steps = pieces(side, place, tokens)
    runs: list[Piece] = []
    for step in steps:
        if runs and runs[-1].stop == step.start:
            runs[-1] = Piece(runs[-1].start, step.stop)
        else:
            runs.append(step)
    held = [pool.take("", *run) for run in runs]
    cut = tuple(part(pool, run, step) for step in steps for run in held if _within(step, run))
    ends_here = bool(side.parallel.interleave) or any(step.start < step.stop == tokens for step in steps)
    return _placed(pool, held, cut, tokens if ends_here else None)


def place_to_receive(pool: RankPool, tokens: int, prefix: int) -> Placed:
    """Take pages for the part that a decode rank receives."""
    held = pool.take("", prefix, tokens)
    return _placed(pool, [held], (held,), tokens)


def part(pool: RankPool, run: Held, piece: Piece) -> Held:
    """Return the pages of a run that hold a piece of it."""
    wanted, given = pool.pages_of(run.group, *piece), pool.pages_of(run.group, run.start, run.stop)
    first = wanted.start - given.start
    return Held(run.group, *piece, run.pages[first : first + len(wanted)] if wanted else ())


def _within(step: Piece, run: Held) -> bool:
    return run.start <= step.start and step.stop <= run.stop


def _placed(pool: RankPool, held: Sequence[Held], steps: tuple[Held, ...], tokens: int | None) -> Placed:
    """Take pages for the other groups, too.

    With `tokens` None the rank has not seen the request's last token, and so holds nothing of a window or a state.
    """
    windows = [(name, pool.window(name, tokens)) for name in pool.groups if tokens is not None]
    others = [pool.take(name, window.start, window.stop) for name, window in windows]
    return Placed((*held, *others), steps, {one.group: one.pages for one in others})
