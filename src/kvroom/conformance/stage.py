"""The tools of the checks: their ends, blocks between them, and the oracle that compares every byte.

Each end runs in a process of its own, or all of them in this one if the transport cannot leave it. The oracle repeats
the copies of a transfer on the earlier contents of the ends' memory, and compares the result with all memory of the
sink, the unregistered bytes around its pools included.
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
BIG = (21 << 20, 17 << 20)  # each pool has room for a block of `MAX_BLOCK_BYTES`

PATIENCE_S = 30.0  # an engine may take 10 s to notice a dead peer, and then wait for the kernel to end the connection
SOON_S = 5.0  # the limit, on a busy machine, of an operation that has nothing to wait for
WATCH_S = 0.25  # on one machine, a byte in flight arrives within milliseconds
SCRUB = 0x5A  # memory is filled with this byte before it is watched, so that late bytes show
CONNECTS, REOPENS = 1_000, 20

_FEW_BYTES = 64  # shorter blocks (on average) are copied by one NumPy index, because a Python loop takes too long


class Skipped(Exception):
    """The check does not apply to this transport; the text is the reason."""


class Pair(NamedTuple):
    """A source and a sink that are connected. `to_sink` is the source's handle, `to_source` the sink's."""

    source: End
    sink: End
    to_sink: int
    to_source: int

    def grant(self) -> bytes:
        """Return a grant for the source to write into all memory that the sink registered."""
        return self.grant_of(np.array(self.sink.addresses, np.uint64), np.array(self.sink.sizes, np.uint64))

    def grant_of(self, address: U64, length: U64) -> bytes:
        """Return a grant for the source to write into these extents of the sink (uint64[n] each)."""
        grant = self.sink.grant(address, length)
        self.sink.bind(grant, self.to_source)
        return grant

    def turned(self) -> Pair:
        """Return the same pair with the roles exchanged."""
        return Pair(self.sink, self.source, self.to_source, self.to_sink)


class CheckStage:
    """The ends of one check, over transport `name`. Use it in a `with` statement, which closes them.

    After a check that failed, every process that took part is killed, because its state is unknown.

    Args:
        name: Name of the transport, for `kvroom.transports.create`.
        options: Its options.
        hosts: Processes for the ends; None keeps all ends in this process.
        shared: Make pools that other processes can map.
        connects: Rounds of the check that connects and fences without growth.
        reopens: Rounds of the check that opens and closes whole transports without growth.
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
        """True if all ends run in this process."""
        return self._hosts is None

    def open(self, pools: Sequence[int] = POOLS, pieces: int = 1) -> End:
        """Open an end, in another process if there are hosts. Each pool is registered as `pieces` adjoining parts."""
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
        """Open `count` ends."""
        if self._hosts is not None:
            self._hosts.want(count)
        return [self.open(pools) for _ in range(count)]

    def pair(self, pools: Sequence[int] = POOLS, pieces: int = 1) -> Pair:
        """Open two ends and connect them."""
        return connect(self.open(pools, pieces), self.open(pools, pieces))

    def kill(self, end: End) -> None:
        """Kill the process of this end (SIGKILL). If all ends share this process, close its transport instead."""
        if end.host is None:
            end.close()
        else:
            end.host.kill()

    @contextlib.contextmanager
    def stopped(self, end: End) -> Iterator[None]:
        """Stop the process of this end within the block. Raise `Skipped` if the end is in this process."""
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
    """Connect both ends with each other, the source first."""
    return Pair(source, sink, source.connect(sink.describe()), sink.connect(source.describe()))


def expect(condition: bool, text: str) -> None:
    """Raise `AssertionError` with this text unless the condition holds; unlike `assert`, also under `python -O`."""
    if not condition:
        raise AssertionError(text)


def until(condition: Callable[[], bool], text: str) -> None:
    """Poll the condition until it holds; raise `AssertionError` with this text after `PATIENCE_S`."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        expect(time.monotonic() < end_s, f"timed out after {PATIENCE_S:.0f} s, waiting until {text}")


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

    The source's pools `read` (default: all) are read. The sink's pools `write` (default: all) are written, each in
    proportion to its size. Raise `AssertionError` if the blocks do not fit.
    """
    generator = np.random.default_rng(seed)
    length = generator.permutation(np.asarray(lengths, np.uint64))
    read = range(len(source.sizes)) if read is None else read
    write = range(len(sink.sizes)) if write is None else write
    # The blocks lie side by side in the pools of the sink, with gaps of 0 to 2 bytes between them.
    ends = np.cumsum(length + generator.integers(0, 3, length.size, dtype=np.uint64))
    total = int(ends[-1]) if ends.size else 0
    shares = (np.cumsum(_shares(sink, write)) * total).astype(np.uint64)
    borders = np.searchsorted(ends - length // np.uint64(2), shares)  # a block goes to the pool that has its middle
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
    """Copy the blocks from `read`, the source's contents, into `written`, the expected contents of the sink."""
    if not blocks.length.size:
        return
    if blocks.nbytes >= _FEW_BYTES * blocks.length.size:
        for src, dst, length in zip(*(part.tolist() for part in blocks), strict=True):
            written_pool, to = _locate(sink, written, dst)
            read_pool, start = _locate(source, read, src)
            written[written_pool][to : to + length] = read[read_pool][start : start + length]
        return
    # The same by one index per byte.
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
    raise AssertionError(f"invalid block: {address:#x} is in no pool")


def same(got: list[Bytes], wanted: list[Bytes]) -> None:
    """Compare all pools byte by byte; raise `AssertionError` for the first pool that differs."""
    for index, (now, then) in enumerate(zip(got, wanted, strict=True)):
        if not np.array_equal(now, then):
            _raise_wrong(index, now != then)


def among(got: list[Bytes], before: list[Bytes], after: list[Bytes]) -> None:
    """Raise `AssertionError` unless every byte is as before or as after the transfer, as a failed one may leave it."""
    for index, (now, old, new) in enumerate(zip(got, before, after, strict=True)):
        wrong = (now != old) & (now != new)
        if wrong.any():
            _raise_wrong(index, wrong)


def _raise_wrong(index: int, wrong: npt.NDArray[np.bool_]) -> None:
    first = int(np.argmax(wrong)) - GUARD_BYTES
    raise AssertionError(f"pool {index}: {np.count_nonzero(wrong)} bytes are wrong, the first at offset {first}")


def lands(pair: Pair, blocks: Blocks, grant: bytes | None = None) -> None:
    """Move the blocks and compare all memory of the sink. Without `grant`, one for all of its memory is used."""
    wanted = pair.sink.contents()
    apply(blocks, pair.source, pair.sink, pair.source.contents(), wanted)
    moved = pair.source.move(pair.to_sink, blocks, pair.grant() if grant is None else grant)
    expect(moved == blocks.nbytes, f"the transfer reported {moved} bytes, expected {blocks.nbytes}")
    same(pair.sink.contents(), wanted)


def refused(pair: Pair, blocks: Blocks, grant: bytes) -> str:
    """Move blocks whose transfer must fail and change no byte; return the text of its error."""
    wanted = pair.sink.contents()
    text = fails(pair, blocks, grant)
    same(pair.sink.contents(), wanted)
    return text


def fails(pair: Pair, blocks: Blocks, grant: bytes) -> str:
    """Move blocks whose transfer must fail; return the text of its error."""
    try:
        pair.source.outcome(pair.source.begin(pair.to_sink, blocks, grant), PATIENCE_S)
    except TransportError as error:
        return str(error)
    raise AssertionError("a transfer succeeded that must fail")


def usable(pair: Pair, blocks: Blocks) -> Pair:
    """Check that blocks land after a failure, connecting both ends again if necessary; return the pair to use."""
    before, after = pair.sink.contents(), pair.sink.contents()
    apply(blocks, pair.source, pair.sink, pair.source.contents(), after)
    try:
        moved = pair.source.move(pair.to_sink, blocks, pair.grant())
    except TransportError:
        among(pair.sink.contents(), before, after)
        pair = connect(pair.source, pair.sink)
        moved = pair.source.move(pair.to_sink, blocks, pair.grant())
    expect(moved == blocks.nbytes, f"the transfer reported {moved} bytes, expected {blocks.nbytes}")
    same(pair.sink.contents(), after)
    return pair


def flood(pair: Pair, blocks: Blocks, grant: bytes, times: int = 40) -> list[int]:
    """Submit the same blocks `times` times, so that many transfers are in flight; return the tickets."""
    return [pair.source.begin(pair.to_sink, blocks, grant) for _ in range(times)]


def settle(source: End, tickets: Sequence[int]) -> list[bool]:
    """Wait until these transfers are done, `PATIENCE_S` for all together; return True for each that succeeded."""
    end_s, succeeded = time.monotonic() + PATIENCE_S, []
    for ticket in tickets:
        try:
            source.outcome(ticket, max(0.0, end_s - time.monotonic()))
            succeeded.append(True)
        except TransportError:
            succeeded.append(False)
        except TimeoutError as error:
            text = f"timed out after {PATIENCE_S:.0f} s: a transfer neither succeeded nor failed"
            raise AssertionError(text) from error
    return succeeded


def undisturbed(end: End, during: Callable[[], object] | None = None) -> None:
    """Fill all memory, as its next owner would, and call `during`; raise `AssertionError` if any byte changes."""
    end.fill(SCRUB)
    if during is not None:
        during()
    changed = end.touched(SCRUB, WATCH_S)
    expect(not changed, f"{changed} bytes were written after the transport had excluded it")
