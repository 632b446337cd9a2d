"""`kvroom soak`: very many rooms between a prefill and a decode process, with faults, and what they leave behind.

Exit status 0 only if every byte was right, every room ended as it had to, and nothing is left of any of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator

import msgspec

from kvroom.bootstrap.http import KVBootstrapServer
from kvroom.cli.children import Child, Children
from kvroom.cli.interrupts import run_until_interrupted
from kvroom.cli.parent import die_with_parent
from kvroom.cli.progress import Report as Progress
from kvroom.cli.progress import progress
from kvroom.soak.mix import Mix
from kvroom.soak.report import MIB, Report, SideReport, combine
from kvroom.soak.worker import Task, run_worker

INTERRUPTED_STATUS = 130
_SIDES = ("source", "sink")
# glibc would keep freed memory for each thread that ever had some: what is resident would tell of the luck of threads.
_ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_TRIM_THRESHOLD_": str(64 << 10)}


class _Told:
    """What the two children have said so far."""

    def __init__(self, rooms: int, report: Progress) -> None:
        loop = asyncio.get_running_loop()
        self.reports: dict[str, asyncio.Future[SideReport]] = {side: loop.create_future() for side in _SIDES}
        self._rooms = rooms
        self._report = report

    def hear(self, side: str, line: str) -> None:
        """One line of a child's."""
        word, _, rest = line.partition(" ")
        if word == "REPORT":
            self.reports[side].set_result(msgspec.json.decode(rest, type=SideReport))
        elif word == "PROGRESS":
            begun = int(rest)
            if side == "sink" and begun * 10 // self._rooms > (begun - max(1, self._rooms // 100)) * 10 // self._rooms:
                self._report(f"{begun:,} of {self._rooms:,} rooms")
        else:
            self._report(f"[{side}] {line}")


def run_soak(options: argparse.Namespace) -> int:
    """0: all as promised. 1: not. 130: interrupted."""
    if options.task is not None:
        die_with_parent(options.parent_pid, signal.SIGKILL)
        run_worker(msgspec.json.decode(options.task, type=Task))
        return 0
    mix = Mix(rooms=options.rooms, seed=options.seed, aborts=options.abort_share, faults=options.fault_share)
    sides = run_until_interrupted(_run(options, mix))
    if sides is None:
        return INTERRUPTED_STATUS
    kinds = Counter(mix.kind(index).title for index in range(mix.rooms))
    limit = None if options.max_growth_mib is None else int(options.max_growth_mib * MIB)
    found = combine(mix.rooms, mix.seed, dict(kinds.most_common()), sides, limit)
    print(msgspec.json.encode(found).decode() if options.json else "\n".join(_lines(found)))
    return 0 if found.good else 1


async def _run(options: argparse.Namespace, mix: Mix) -> list[SideReport]:
    with progress(f"{mix.rooms:,} rooms, {options.open} open at once") as report, KVBootstrapServer() as directory:
        told = _Told(mix.rooms, report)
        async with Children(told.hear) as children:
            for side in _SIDES:
                task = Task(
                    side=side, mix=mix, window=options.open, transport=options.transport,
                    trusted_fabric=options.trusted_fabric,
                    bootstrap_addr=directory.address, checksum=options.checksum,
                )  # fmt: skip
                await _start(children, task)
            return await children.guard(asyncio.gather(*told.reports.values()))


async def _start(children: Children, task: Task) -> Child:
    argv = ["soak", "--rooms", str(task.mix.rooms), "--task", msgspec.json.encode(task).decode()]
    return await children.start(task.side, argv, {**_ALLOCATOR, **os.environ})


def _lines(found: Report) -> Iterator[str]:
    """The report for people."""
    yield f"transport          {found.transport}"
    yield f"rooms              {found.rooms:,} in {found.seconds:.1f} s ({found.rooms / found.seconds:,.0f} per second)"
    for title, count in found.kinds.items():
        yield f"  {count:>10,}  {title}"
    for side in found.sides:
        yield f"{side.side:<18} opened {side.opened:,}, succeeded {side.succeeded:,}, failed {side.failed:,}"
        for cause, count in sorted(side.failed_by_cause.items(), key=lambda pair: -pair[1]):
            yield f"  {count:>10,}  {cause}"
        yield f"  resident memory  {_memory(side)}"
        yield from (f"  unexpected: {example}" for example in side.examples)
        yield from (f"  left: {where}" for where in side.leftovers.where)
    yield f"bytes checked      {found.bytes_checked:,}"
    yield f"wrong bytes        {found.wrong_bytes:,}"
    yield f"unexpected ends    {found.unexpected:,}"
    yield f"rooms left         {found.rooms_left:,}"
    yield f"pages left         {found.pages_left:,}"
    yield f"entries left       {found.entries_left:,} (walked {sum(s.leftovers.walked for s in found.sides):,} objects)"
    yield "every byte right, nothing left" if found.good else "the soak FAILED: see above"


def _memory(side: SideReport) -> str:
    memory = side.memory
    first = memory.tenths[0] if memory.tenths else memory.start
    return (
        f"{memory.start / MIB:.1f} MiB at the start, {first / MIB:.1f} after 10 %, {memory.end / MIB:.1f} at the end; "
        f"{memory.growth / MIB:+.2f} at most after the first 10 %"
    )
