"""Where a conformance check plays: the ends it asks for, blocks between them, and the oracle that compares every byte.

Ends live in processes of their own, or all in this one where a transport cannot leave it. The copies that a transfer
must do are done once more here, on what the ends' memory held; all memory is compared, what surrounds the pools too.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvroom.errors import KVRoomError, TransportError
from kvroom.plan.blocks import U64, Blocks

from .ends import GUARD_BYTES, Bytes, End, EndSetup, Hosts

POOLS = (3 << 20, 1 << 20, 5 << 20)  # registered bytes of each pool of an end
SMALL = (3 << 16, 1 << 16, 5 << 16)
MAX_BLOCK_BYTES = 16 << 20
BIG = (21 << 20, 17 << 20)  # room for a block of `MAX_BLOCK_BYTES` in each

PATIENCE_S = 30.0  # an engine may need 10 s to notice a dead peer, and wait for the kernel to forget the connection
SOON_S = 5.0  # for what has no reason to wait at all, on a busy machine
WATCH_S = 0.25  # a byte that was under way on one machine arrives within milliseconds
SCRUB = 0x5A  # what memory is filled with before it is watched: a late byte shows, whatever it was
CONNECTS, REOPENS = 1_000, 20

_FEW_BYTES = 64  # blocks that are shorter on the average are copied by one index instead of one by one


class Skipped(Exception):
    """The check cannot be made here; the text says why."""


class Pair(NamedTuple):
    """A source and a sink that are connected: `to_sink` is the source's handle, `to_source` the sink's."""

    source: End
    sink: End
    to_sink: int
    to_source: int

    def grant(self) -> bytes:
        """Leave for the source to write into everything that the sink registered."""
        return self.grant_of(np.array(self.sink.addresses, np.uint64), np.array(self.sink.sizes, np.uint64))

    def grant_of(self, address: U64, length: U64) -> bytes:
        """Leave for the source to write into these bytes of the sink."""
        grant = self.sink.grant(address, length)
        self.sink.bind(grant, self.to_source)
        return grant

    def turned(self) -> Pair:
        """The same pair with the roles exchanged."""
        return Pair(self.sink, self.source, self.to_source, self.to_sink)


class CheckStage:
    """Makes the ends of one check, over transport `name`, and ends them; use it in a `with` statement.

    `hosts`: where processes come from; None keeps all ends in this process. `shared`: pools that other processes can
    map. `connects`, `reopens`: how often the checks for growth connect and fence, and open and close whole transports.
    After a check that failed, every process that took part is killed: nobody knows what state it is in.
    """

    def __init__(
        self,
        name: str,
        options: dict[str, Any] | None = None,
        hosts: Hosts | None = None,
        *,
        shared: bool = False,
        connects: int = CONNECTS,
        reopens: int = REOPENS,
    ) -> None:
        self._name, self._options, self._hosts, self._shared = name, options or {}, hosts, shared
        self.connects, self.reopens = connects, reopens
        self._ends: list[End] = []

    @property
    def one_process(self) -> bool:
        """Whether all ends live in this process."""
        return self._hosts is None

    def open(self, pools: Sequence[int] = POOLS, pieces: int = 1) -> End:
        """Open an end in a process of its own. Each pool is registered as so many `pieces`."""
        setup = EndSetup(
            self._name,
            self._options,
            pools,
            seed=len(self._ends) + 1,
            shared=self._shared,
            front=GUARD_BYTES,
            pieces=pieces,
        )
        if self._hosts is None:
            end = End.here(setup)
        else:
            host = self._hosts.take()
            try:
                end = host.open(setup)
            except (KVRoomError, OSError, EOFError):
                host.kill()
                host.close()
                raise
        self._ends.append(end)
        return end

    def several(self, count: int, pools: Sequence[int] = SMALL) -> list[End]:
        """Open so many ends."""
        if self._hosts is not None:
            self._hosts.want(count)
        return [self.open(pools) for _ in range(count)]

    def pair(self, pools: Sequence[int] = POOLS, pieces: int = 1) -> Pair:
        """Open two ends and connect them."""
        return connect(self.open(pools, pieces), self.open(pools, pieces))

    def kill(self, end: End) -> None:
        """SIGKILL the process of this end. Where all ends are in one, close its transport without a word."""
        if end.host is None:
            end.close()
        else:
            end.host.kill()

    @contextlib.contextmanager
    def stopped(self, end: End) -> Iterator[None]:
        """Within, the process of this end stands still; `Skipped` where it is this one."""
        if end.host is None:
            raise Skipped("all ends are in one process, which cannot be stopped")
        end.host.stop()
        try:
            yield
        finally:
            end.host.resume()

    def __enter__(self) -> CheckStage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ends, self._ends = self._ends, []
        with contextlib.ExitStack() as every:
            for end in ends:
                every.callback(self._end, end, kind is None or issubclass(kind, Skipped))

    def _end(self, end: End, good: bool) -> None:
        if end.host is None or self._hosts is None:
            end.close()
        elif not good:
            end.host.kill()
        elif end.host.alive:
            end.close()
            self._hosts.give(end.host)
            return
        if end.host is not None:
            end.host.close()


def connect(source: End, sink: End) -> Pair:
    """Connect both ends with each other."""
    return Pair(source, sink, source.connect(sink.describe()), sink.connect(source.describe()))


def expect(condition: bool, text: str) -> None:
    """Raise `AssertionError` with the text unless the condition holds; unlike `assert`, under `python -O` too."""
    if not condition:
        raise AssertionError(text)


def until(condition: Callable[[], bool], text: str) -> None:
    """Ask again until it holds; `AssertionError` if it never does within `PATIENCE_S`."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        expect(time.monotonic() < end_s, f"{text} (not within {PATIENCE_S:.0f} s)")


def spread(
    source: End,
    sink: End,
    lengths: npt.ArrayLike,
    *,
    read: Sequence[int] | None = None,
    write: Sequence[int] | None = None,
    seed: int = 7,
) -> Blocks:
    """Return unaligned blocks of these lengths, in random order, disjoint in the sink, at random places in the source.

    They are read from all pools of the source (or from the pools `read`) and written to all of the sink (or `write`),
    each pool of the sink getting its share. `AssertionError` if they do not fit.
    """
    generator = np.random.default_rng(seed)
    length = generator.permutation(np.asarray(lengths, np.uint64))
    read = range(len(source.sizes)) if read is None else read
    write = range(len(sink.sizes)) if write is None else write
    # The blocks lie side by side in the pools of the sink, with gaps of 0 to 2 bytes between them.
    ends = np.cumsum(length + generator.integers(0, 3, length.size, dtype=np.uint64))
    total = int(ends[-1]) if ends.size else 0
    shares = (np.cumsum(_shares(sink, write)) * total).astype(np.uint64)
    borders = np.searchsorted(ends - length // np.uint64(2), shares)  # a block belongs where its middle lies
    borders[-1] = length.size
    dst = np.empty_like(length)
    start = 0
    for index, stop in zip(write, borders.tolist(), strict=True):
        if start < stop:
            first = ends[start] - length[start]
            used = int(ends[stop - 1] - first)
            expect(used <= sink.sizes[index], f"{used} bytes of blocks do not fit into a pool of {sink.sizes[index]}")
            offset = generator.integers(0, sink.sizes[index] - used, endpoint=True, dtype=np.uint64)
            dst[start:stop] = np.uint64(sink.addresses[index]) + offset + ends[start:stop] - length[start:stop] - first
        start = stop
    src = np.empty_like(dst)
    pool = generator.choice(np.array(read), length.size, p=_shares(source, read))
    pool[length > min(source.sizes)] = max(read, key=lambda index: source.sizes[index])
    for index in read:
        mine = np.flatnonzero(pool == index)
        room = np.uint64(source.sizes[index]) - length[mine]
        src[mine] = np.uint64(source.addresses[index]) + generator.integers(0, room, dtype=np.uint64, endpoint=True)
    order = generator.permutation(length.size)
    return Blocks(src[order], dst[order], length[order])


def _shares(end: End, pools: Sequence[int]) -> npt.NDArray[np.float64]:
    sizes = np.array([end.sizes[index] for index in pools], np.float64)
    shares: npt.NDArray[np.float64] = sizes / sizes.sum()
    return shares


def scattered(source: End, sink: End, count: int, longest: int, **where: Any) -> Blocks:
    """Return `count` blocks of 1 to `longest` bytes; see `spread`."""
    lengths = np.random.default_rng(count).integers(1, longest, count, endpoint=True)
    return spread(source, sink, lengths, **where)


def parts(blocks: Blocks, count: int) -> list[Blocks]:
    """Return the same blocks as `count` batches."""
    borders = np.linspace(0, blocks.length.size, count + 1).astype(int).tolist()
    return [Blocks(*(column[a:b] for column in blocks)) for a, b in itertools.pairwise(borders)]


def one_block(source: End, sink: End, nbytes: int, at: int = 0, start: int = 3) -> Blocks:
    """Return one block between the last pools, from `start` in the source's to `at` in the sink's."""
    src, dst = source.addresses[-1] + start, sink.addresses[-1] + at
    return Blocks(*(np.array([value], np.uint64) for value in (src, dst, nbytes)))


def apply(blocks: Blocks, source: End, sink: End, read: list[Bytes], written: list[Bytes]) -> None:
    """Do the copies in `written`, the expected contents of the sink."""
    if not blocks.length.size:
        return
    if blocks.nbytes >= _FEW_BYTES * blocks.length.size:
        for src, dst, length in zip(*(part.tolist() for part in blocks), strict=True):
            written_pool, to = _locate(sink, written, dst)
            read_pool, start = _locate(source, read, src)
            written[written_pool][to : to + length] = read[read_pool][start : start + length]
        return
    # The same, byte by byte with NumPy.
    owner = np.repeat(np.arange(blocks.length.size), blocks.length.astype(np.int64))
    within = np.arange(owner.size, dtype=np.uint64) - (np.cumsum(blocks.length) - blocks.length)[owner]
    src, dst = blocks.src[owner] + within, blocks.dst[owner] + within
    values = np.empty(owner.size, np.uint8)
    for pool, base in zip(read, _bases(source), strict=True):
        mine = src - base < np.uint64(pool.size)  # addresses below the base wrap around
        values[mine] = pool[src[mine] - base]
    for pool, base in zip(written, _bases(sink), strict=True):
        mine = dst - base < np.uint64(pool.size)
        pool[dst[mine] - base] = values[mine]


def _bases(end: End) -> list[np.uint64]:
    return [np.uint64(address - GUARD_BYTES) for address in end.addresses]


def _locate(end: End, pools: list[Bytes], address: int) -> tuple[int, int]:
    for index, (base, pool) in enumerate(zip(_bases(end), pools, strict=True)):
        if 0 <= address - int(base) < pool.size:
            return index, address - int(base)
    raise AssertionError(f"{address:#x} is in no pool")


def same(got: list[Bytes], wanted: list[Bytes]) -> None:
    """Compare all pools byte by byte."""
    for index, (now, then) in enumerate(zip(got, wanted, strict=True)):
        if not np.array_equal(now, then):
            _complain(index, now != then)


def among(got: list[Bytes], before: list[Bytes], after: list[Bytes]) -> None:
    """Every byte is as it was before or as it must be after: what a transfer that failed may leave."""
    for index, (now, old, new) in enumerate(zip(got, before, after, strict=True)):
        wrong = (now != old) & (now != new)
        if wrong.any():
            _complain(index, wrong)


def _complain(index: int, wrong: npt.NDArray[np.bool_]) -> None:
    first = int(np.argmax(wrong)) - GUARD_BYTES
    raise AssertionError(f"pool {index}: {np.count_nonzero(wrong)} bytes are wrong, the first at offset {first}")


def lands(pair: Pair, blocks: Blocks, grant: bytes | None = None) -> None:
    """Move the blocks and compare everything."""
    wanted = pair.sink.contents()
    apply(blocks, pair.source, pair.sink, pair.source.contents(), wanted)
    moved = pair.source.move(pair.to_sink, blocks, pair.grant() if grant is None else grant)
    expect(moved == blocks.nbytes, f"the transfer says {moved} bytes, not {blocks.nbytes}")
    same(pair.sink.contents(), wanted)


def refused(pair: Pair, blocks: Blocks, grant: bytes) -> str:
    """Try to move the blocks: that must fail and change nothing. Return what was said."""
    wanted = pair.sink.contents()
    text = fails(pair, blocks, grant)
    same(pair.sink.contents(), wanted)
    return text


def fails(pair: Pair, blocks: Blocks, grant: bytes) -> str:
    """Try to move the blocks, which must fail; return what was said."""
    try:
        pair.source.outcome(pair.source.begin(pair.to_sink, blocks, grant), PATIENCE_S)
    except TransportError as error:
        return str(error)
    raise AssertionError("a transfer succeeded that had to fail")


def usable(pair: Pair, blocks: Blocks) -> Pair:
    """After a failure: the next good transfer lands, or does after both have connected again. Return what is good."""
    before, after = pair.sink.contents(), pair.sink.contents()
    apply(blocks, pair.source, pair.sink, pair.source.contents(), after)
    try:
        moved = pair.source.move(pair.to_sink, blocks, pair.grant())
    except TransportError:
        among(pair.sink.contents(), before, after)
        pair = connect(pair.source, pair.sink)
        moved = pair.source.move(pair.to_sink, blocks, pair.grant())
    expect(moved == blocks.nbytes, f"the transfer says {moved} bytes, not {blocks.nbytes}")
    same(pair.sink.contents(), after)
    return pair


def flood(pair: Pair, blocks: Blocks, grant: bytes, times: int = 40) -> list[int]:
    """Submit the same blocks again and again, so that much is under way; return the tickets."""
    return [pair.source.begin(pair.to_sink, blocks, grant) for _ in range(times)]


def settle(source: End, tickets: Sequence[int]) -> list[bool]:
    """Wait until all these transfers are done, `PATIENCE_S` in all; return which of them succeeded."""
    end_s, succeeded = time.monotonic() + PATIENCE_S, []
    for ticket in tickets:
        try:
            source.outcome(ticket, max(0.0, end_s - time.monotonic()))
            succeeded.append(True)
        except TransportError:
            succeeded.append(False)
        except TimeoutError as error:
            text = f"a transfer was not done, with or without success, within {PATIENCE_S:.0f} s"
            raise AssertionError(text) from error
    return succeeded


def undisturbed(end: End, meanwhile: Callable[[], object] | None = None) -> None:
    """Give the memory to somebody else, who fills it; then let `meanwhile` happen: no byte may change."""
    end.fill(SCRUB)
    if meanwhile is not None:
        meanwhile()
    changed = end.touched(SCRUB, WATCH_S)
    expect(not changed, f"{changed} bytes were written after it was said that none will be")
