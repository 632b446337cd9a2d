"""A check that strided regions of memory share no byte.

The law: a result of None proves that no byte belongs to two boxes. Boxes that cannot be shown to be disjoint count as a
clash. The check stays cheap for thousands of boxes, whatever strides a peer sends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

# The number of different strides that may interleave: page, token and head of two different arrangements.
MAX_FOLDS = 6


class Box(NamedTuple):
    """Elements of region number `owner`: `extent` bytes from `base` on, gaps included.

    `axes` are (stride in bytes, count) of every axis longer than 1, widest stride first.
    """

    owner: int
    base: int
    extent: int
    axes: tuple[tuple[int, int], ...]


def _crowds(boxes: Iterable[Box]) -> Iterator[list[Box]]:
    """Yield groups of boxes, of two regions or more, whose spans overlap in a chain."""
    crowd: list[Box] = []
    end = 0
    for box in [*sorted(set(boxes), key=lambda b: (b.base, b.owner)), None]:
        if box is not None and box.base < end:
            crowd.append(box)
            end = max(end, box.base + box.extent)
            continue
        if len({member.owner for member in crowd}) > 1:
            yield crowd
        if box is not None:
            crowd, end = [box], box.base + box.extent


def clash(boxes: Iterable[Box], folds_left: int = MAX_FOLDS) -> tuple[int, int] | None:
    """Return two regions that share a byte or cannot be shown not to; None proves that all are disjoint.

    Boxes whose spans overlap can still interleave. Fold them onto a circle as long as the widest stride among them: if
    they are disjoint there, they are disjoint for any number of steps. Repeat with the boxes that still overlap.
    Sorting, and a limit on the number of folds, keep this cheap for thousands of regions and any strides.
    """
    for crowd in _crowds(boxes):
        step = max(box.axes[0][0] if box.axes else 0 for box in crowd)
        folded: list[Box] = []
        for box in crowd:
            inner = box
            if box.axes and box.axes[0][0] == step:  # the box without its outer axis
                (stride, count), *axes = box.axes
                inner = Box(box.owner, box.base, box.extent - (count - 1) * stride, tuple(axes))
            if step == 0 or inner.extent > step or folds_left == 0:
                return box.owner, next(other.owner for other in crowd if other.owner != box.owner)
            at = (box.base - crowd[0].base) % step
            folded.append(inner._replace(base=at))
            if at + inner.extent > step:
                folded.append(inner._replace(base=at - step))
        found = clash(folded, folds_left - 1)
        if found is not None:
            return found
    return None
