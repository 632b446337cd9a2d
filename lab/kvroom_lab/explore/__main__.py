"""Print how many states the explorer visits in each scope, and how long that takes."""

from __future__ import annotations

import argparse
import sys

from .managers import LawBroken
from .scopes import LARGER, SCOPES
from .search import explore


def main(arguments: list[str] | None = None) -> int:
    """Explore the scopes of CI, or the ones named. Return 1 if a law is broken; its trace goes to stderr."""
    known = SCOPES | LARGER
    parser = argparse.ArgumentParser(prog="python -m kvroom_lab.explore", description=__doc__)
    parser.add_argument("--scope", action="append", choices=sorted(known), metavar="NAME",
                        help="this scope only; may be repeated. One of: " + "; ".join(known))  # fmt: skip
    parser.add_argument("--all", action="store_true", help="the larger scopes too, which take minutes")
    parser.add_argument(
        "--limit", type=int, default=20_000_000, metavar="STATES", help="stop with an error above this number of states"
    )
    options = parser.parse_args(arguments)
    names = options.scope or list(known if options.all else SCOPES)
    width = max(map(len, names))
    print(f"{'scope':<{width}}  {'states':>9}  {'steps':>10}  {'managers':>8}  {'cpu s':>7}")
    for name in names:
        try:
            explored = explore(known[name], limit=options.limit)
        except LawBroken as broken:
            print(f"{name}: {broken}", file=sys.stderr)
            return 1
        print(
            f"{name:<{width}}  {explored.states:>9}  {explored.steps:>10}  {explored.managers:>8}"
            f"  {explored.cpu_s:>7.1f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
