"""`python -m kvroom_lab.ranks`: hand over every case between real processes, and make a rank fail at every moment.

python -m kvroom_lab.ranks                         # the cases and the faults, over tcp and local
python -m kvroom_lab.ranks --transport nixl --transport mooncake
python -m kvroom_lab.ranks --full                  # every source with every sink, every fault in more cases
python -m kvroom_lab.ranks --only zigzag           # cases and faults with this in their name
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

from kvroom.transports import probe

from .cases import BY_NAME, CASES, crossed
from .faults import FAULT_CASES, run_story, stories
from .fleet import Processes, run

Check = Callable[[Processes], list[str]]
MANY_FAULT_CASES = (*FAULT_CASES, "cp2-zigzag-cp2-interleave-1", "3-heads-tp4-tp2", "hybrid-tp1-tp2", "tp1-tp1")


def checks(transport: str, full: bool) -> Iterator[tuple[str, Check]]:
    """Yield all cases and faults to run over a transport, by name."""
    for case in (*CASES, *(one for one in crossed() if one.name not in BY_NAME)) if full else CASES:
        yield case.name, partial(run, case, transport)
    for name in MANY_FAULT_CASES if full else FAULT_CASES:
        for story in stories(BY_NAME[name]):
            yield story.name, partial(run_story, story, transport)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvroom_lab.ranks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--transport", action="append", help="one to use; may be repeated (default: tcp, local)")
    parser.add_argument("--full", action="store_true", help="every source with every sink, faults in more cases")
    parser.add_argument("--only", default="", help="run only cases and faults with this in their name")
    options = parser.parse_args()
    failed = 0
    for transport in options.transport or ("tcp", "local"):
        if missing := probe(transport).missing:
            print(f"{transport}: unsupported here: {missing[0]}")
            failed += 1
            continue
        with Processes() as processes:
            for name, check in checks(transport, options.full):
                if options.only in name:
                    failed += not _passes(f"{transport} {name}", check, processes)
    print(f"{failed} failed" if failed else "all passed")
    return int(failed > 0)


def _passes(name: str, check: Check, processes: Processes) -> bool:
    begin = time.monotonic()
    wrong = check(processes)
    print(f"{'ok' if not wrong else 'WRONG':5} {name} ({time.monotonic() - begin:.1f} s)", flush=True)
    for fault in wrong:
        print(f"      {fault}")
    return not wrong


if __name__ == "__main__":
    sys.exit(main())
