"""Callbacks of the engine, and the one place that calls them."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)
OnRelease = Callable[[tuple[int, ...]], None]
OnChange = Callable[[], None]


def call_engine(callback: Callable[..., None], *arguments: object, where: str) -> None:
    """Call a callback of the engine, in the loop's thread.

    An exception of the callback is logged with `where` and ends no room, because it says nothing about the rooms. If
    `on_release` raised, the pages are released all the same, and `Handle.released` is True.
    """
    try:
        callback(*arguments)
    except Exception:  # a supervisor of the engine's code: raised further, it would end every room of this manager
        logger.exception("the engine's %s raised; no room is affected", where)
