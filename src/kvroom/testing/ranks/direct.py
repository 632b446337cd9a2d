"""A case in one process, without rooms: the plans of all pairs of ranks, and a memmove for each block.

It shows that plans and checks agree before any process, link or transport takes part.
"""

from __future__ import annotations

import ctypes

from kvroom.plan import Planner, shares
from kvroom.plan.ranks import Place, feeds
from kvroom.testing.ranks.cases import Case, pieces
from kvroom.testing.ranks.pool import Held, RankPool
from kvroom.testing.ranks.requests import Request, offered, sends


def run(case: Case) -> list[str]:
    """Move every request of the case and return what is wrong then, rank by rank."""
    return []
