"""`kvroom soak`: very many rooms between a prefill and a decode process, with faults, and a search for leftovers.

Exit status 0 only if every byte was right, every room ended as its kind demands, and nothing is left of any room.
"""

from __future__ import annotations

import argparse
import math
import signal
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from kvroom import KVBootstrapServer
from kvroom.transports import find

from .mix import ABORTS, FAULTS, Kind, Mix
from .processes import die_with_parent, run_sides
from .report import MIB, Report, SideReport, combine
from .worker import Task, run_worker

_SIDES = ("source", "sink")


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return 0 if everything was right, else 1. Raise `KVRoomError` for an invalid setting."""
    options = _parser().parse_args(arguments)
    if options.task is not None:
        die_with_parent(options.parent_pid)
        run_worker(msgspec.json.decode(options.task, type=Task))
        return 0
    # Either signal raises, which ends both processes. SIGINT too: a shell ignores it for jobs in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    find(options.transport)  # raises here for an unknown name, before two processes are started
    mix = Mix(rooms=options.rooms, seed=options.seed, aborts=options.abort_share, faults=options.fault_share)
    sides = _run(options, mix)
    kinds = Counter(mix.kind(index).title for index in range(mix.rooms))
    limit = None if options.max_growth_mib is None else int(options.max_growth_mib * MIB)
    found = combine(mix.rooms, mix.seed, dict(kinds.most_common()), sides, limit)
    print(msgspec.json.encode(found).decode() if options.json else "\n".join(_lines(found)))
    return 0 if found.good else 1


def _run(options: argparse.Namespace, mix: Mix) -> list[SideReport]:
    with KVBootstrapServer() as directory:
        tasks = [
            Task(
                side=side, mix=mix, window=options.open, transport=options.transport,
                trusted_fabric=options.trusted_fabric, bootstrap_addr=directory.address, checksum=options.checksum,
            )
            for side in _SIDES
        ]  # fmt: skip
        return run_sides(tasks)


def _parser() -> argparse.ArgumentParser:
    about = (
        "Hand over many rooms (a room is the hand-over of one request's KV cache) from a prefill process to a decode "
        "process, without a model. Some rooms are aborted or meet a fault on purpose and are meant to fail. Then check "
        "every byte, and search both processes for anything that is left of a room."
    )
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="kvroom soak", description=about, formatter_class=shown)
    add = parser.add_argument
    add("--rooms", type=_count, default=20000, metavar="N", help="number of rooms")
    add("--open", type=_count, default=64, metavar="N", help="number of rooms open at a time")
    add("--abort-share", type=_share, default=0.10, metavar="X", help="share of rooms that are aborted on purpose")
    add("--fault-share", type=_share, default=0.01, metavar="X", help="share of rooms with an injected fault")
    add("--transport", default="auto", metavar="NAME", help="transport: auto, local, tcp, ...")
    text = "trust every process that reaches the ports or the fabric of a transport's engine with the KV pool"
    add("--trusted-fabric", action="store_true", help=text)
    add("--seed", type=int, default=1, metavar="N", help="seed of the mix: the same seed gives the same faults")
    text = "compare checksums in every room"
    add("--checksum", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "fail if a process grows by more after the first tenth of the rooms; without it, growth is only reported"
    add("--max-growth-mib", type=_size, metavar="MIB", help=text)
    add("--json", action="store_true", help="print the report as one line of JSON")
    add("--task", help=argparse.SUPPRESS)  # the work of one of the two processes
    add("--parent-pid", type=int, help=argparse.SUPPRESS)
    return parser


def _count(text: str) -> int:
    value = _number(text)
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a count: give a whole number of at least 1")
    return int(value)


def _share(text: str) -> float:
    value = _number(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share: give a number from 0 to 1")
    return value


def _size(text: str) -> float:
    value = _number(text)
    if value <= 0.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: give MiB above 0")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def _lines(found: Report) -> Iterator[str]:
    """Yield the lines of the report."""
    rate = found.rooms / found.seconds
    yield "A room is the hand-over of one request's KV cache. Two processes, the prefill side (source) and the decode"
    yield "side (sink), handed rooms over without a model, and broke some of them on purpose. Those are meant to fail."
    yield f"transport          {found.transport}"
    yield f"rooms              {found.rooms:,} in {found.seconds:.1f} s ({rate:,.0f} per second)"
    for title, kinds in (
        ("not disturbed", (Kind.PLAIN,)),
        ("aborted on purpose", [kind for kind, _ in ABORTS]),
        ("faults injected", [kind for kind, _ in FAULTS]),
    ):
        counts = {kind.title: found.kinds[kind.title] for kind in kinds if kind.title in found.kinds}
        yield f"  {sum(counts.values()):>10,}  {title}"
        if title != "not disturbed":
            yield from (f"  {count:>14,}  {name}" for name, count in counts.items())
    yield "Each side counts its handles: one for each room, one more where a number is opened again, and one with which"
    yield "the two sides meet after each cut link and at the end."
    for side in found.sides:
        yield (
            f"{side.side:<18} opened {side.opened:,}, succeeded {side.succeeded:,}, failed {side.failed:,}, "
            f"of these {side.unexpected + side.unfinished:,} against the plan"
        )
        for detail, count in sorted(side.failed_by_cause.items(), key=lambda pair: -pair[1]):
            yield f"  {count:>10,}  failed, cause {detail}"
        yield f"  resident memory  {_memory(side)}"
        yield from (f"  unexpected: {example}" for example in side.examples)
        yield from (f"  left: {where}" for where in side.leftovers.where)
    walked = sum(side.leftovers.walked for side in found.sides)
    yield f"bytes checked      {found.bytes_checked:,}: those of received pages, and of free ones when they are taken"
    yield f"wrong bytes        {found.wrong_bytes:,}"
    yield f"unexpected ends    {found.unexpected:,} (rooms that ended otherwise than planned, or never)"
    yield f"rooms left         {found.rooms_left:,} (in the room tables)"
    yield f"pages left         {found.pages_left:,} (not back in the pools)"
    yield f"entries left       {found.entries_left:,} (objects that still refer to a room, of {walked:,} searched)"
    yield "every byte right, nothing left" if found.good else "the soak FAILED: see above"


def _memory(side: SideReport) -> str:
    memory = side.memory
    first = memory.tenths[0] if memory.tenths else memory.start
    return (
        f"{memory.start / MIB:.1f} MiB at the start, {first / MIB:.1f} after 10 %, {memory.end / MIB:.1f} at the end; "
        f"{memory.growth / MIB:+.2f} at most after the first 10 %"
    )
