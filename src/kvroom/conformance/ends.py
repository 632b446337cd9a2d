"""One end of a transport under test, in this process or in another one, with memory whose content is known.

`python -m kvroom.conformance.ends FD` serves an end on a socket: length-prefixed msgpack, one answer per request. Tests
use `End.here` and `Host.open`, which look alike; `Hosts` keeps processes for later use.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import gc
import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from kvroom import errors
from kvroom.errors import KVRoomError
from kvroom.plan.blocks import U64, Blocks, Extents, MemoryRange
from kvroom.transports import Transfer, create
from kvroom.transports.base import MalformedDescription, OutOfReach
from kvroom.transports.kit import claims
from kvroom.transports.kit.pool import allocate

Bytes = npt.NDArray[np.uint8]
_PR_SET_DUMPABLE = 4
_CAP_SYS_PTRACE = 19
_CAPABILITY_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None)
GUARD_BYTES = 4096  # behind every pool: memory that is not registered, so that pools never touch
ANSWER_S = 90.0  # no call of a transport may take longer: then something hangs, and the caller is told what
_RAISED: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (*vars(errors).values(), MalformedDescription, OutOfReach, TimeoutError)
    if isinstance(kind, type) and issubclass(kind, Exception)
}


class Footprint(NamedTuple):
    """What a process holds: threads, open descriptors, resident memory in bytes."""

    threads: int
    descriptors: int
    resident_bytes: int


class EndSetup(NamedTuple):
    """How an end is made: transport `name` with `options`, and pools of these sizes in bytes filled from `seed`.

    `shared`: other processes can map the pools. `huge`: huge pages are asked for. Before each pool lie `front` bytes
    and behind it `GUARD_BYTES` that are not registered. Each pool is registered as so many `pieces` that touch each
    other.
    """

    name: str
    options: dict[str, Any]
    pools: Sequence[int]
    seed: int = 0
    shared: bool = False
    huge: bool = True
    front: int = 0
    pieces: int = 1


class _Worker:
    """The end itself. Arguments and results are plain values, so that they can cross a process border."""

    def __init__(self) -> None:
        self._transfers: dict[int, Transfer] = {}
        self._tickets = itertools.count()

    def open(self, setup: Sequence[Any]) -> None:
        """Make the transport and register a pool of each size, filled from the seed of this `EndSetup`."""
        told = EndSetup(*setup)
        surplus = told.front + GUARD_BYTES
        self._pools = [allocate(nbytes + surplus, shared=told.shared, huge=told.huge) for nbytes in told.pools]
        self._front = told.front
        generator = np.random.default_rng(told.seed)
        for pool in self._pools:
            np.frombuffer(pool.buffer, np.uint8)[:] = np.frombuffer(generator.bytes(pool.nbytes), np.uint8)
        self._make = partial(create, told.name, **told.options)
        self._ranges: list[MemoryRange] = []
        for address, nbytes in zip(self.addresses(), told.pools, strict=True):
            borders = [address + nbytes * i // told.pieces for i in range(told.pieces + 1)]
            self._ranges += [MemoryRange(start, stop - start) for start, stop in itertools.pairwise(borders)]
        self._transport = self._make()
        self._transport.register(self._ranges)

    def reopen(self) -> None:
        self._transport.close()
        self._transport = self._make()
        self._transport.register(self._ranges)

    def addresses(self) -> list[int]:
        return [pool.address + self._front for pool in self._pools]

    def contents(self, index: int) -> bytes:
        return bytes(self._pools[index].buffer)

    def fill(self, value: int) -> None:
        for pool in self._pools:
            np.frombuffer(pool.buffer, np.uint8)[:] = value

    def touched(self, value: int, watch_s: float) -> int:
        """Look at all memory until the time is over; return how many bytes differ from `value`, as soon as any do."""
        end_s, changed = time.monotonic() + watch_s, 0
        while not changed:
            over = time.monotonic() > end_s
            changed = sum(int(np.count_nonzero(np.frombuffer(pool.buffer, np.uint8) != value)) for pool in self._pools)
            if over:
                break
        return changed

    def describe(self) -> bytes:
        return self._transport.describe()

    def signs(self) -> bool:
        """Return True if the description names the key that signs it."""
        name, claim = self._transport.name, claims.state(self._transport, b"owner")
        try:
            return claims.read(claim, name, b"owner") == self._transport.describe()
        except MalformedDescription:
            return False

    def connect(self, description: bytes) -> int:
        return self._transport.connect(description)

    def explain(self, peer: int) -> str:
        return self._transport.explain(peer)

    def grant(self, address: bytes, length: bytes) -> bytes:
        return self._transport.grant(Extents(_array(address), _array(length)))

    def bind(self, grant: bytes, peer: int) -> None:
        self._transport.bind(grant, peer)

    def revoke(self, grant: bytes) -> bool:
        return self._transport.revoke(grant)

    def staging_slots(self) -> dict[str, int]:
        return self._transport.staging_slots()

    def begin(self, peer: int, blocks: Sequence[bytes], grant: bytes) -> int:
        """Submit the blocks, whose three arrays crossed as bytes."""
        ticket = next(self._tickets)
        self._transfers[ticket] = self._transport.submit(peer, Blocks(*map(_array, blocks)), grant)
        return ticket

    def outcome(self, ticket: int, timeout_s: float) -> int:
        if concurrent.futures.wait([self._transfers[ticket]], timeout_s).not_done:
            raise TimeoutError(f"transfer {ticket} was not done after {timeout_s:.1f} s")
        return self._transfers.pop(ticket).result()  # kept, a thousand would look like growth of the transport

    def fence(self, peer: int) -> bool:
        return self._transport.fence(peer)

    def unfinished(self) -> int:
        return sum(not transfer.done() for transfer in self._transfers.values())

    def footprint(self) -> Footprint:
        gc.collect()  # what only waits for the collector is not kept by anybody
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return Footprint(len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), resident)

    def forbid_ptrace(self) -> None:
        """Make this process one that its own user may not trace, as a hardened service is. See prctl(2)."""
        _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)

    def give_up_ptrace(self) -> None:
        """Drop CAP_SYS_PTRACE, if this process has it: after that root is refused where any user would be."""
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice, low words first
        if _libc.capget(header, sets) == 0:
            sets[0] &= ~(1 << _CAP_SYS_PTRACE)
            sets[1] &= ~(1 << _CAP_SYS_PTRACE)
            _libc.capset(header, sets)

    def become(self, user: int) -> None:
        """Go on as this uid; only root may."""
        os.setuid(user)

    def close(self) -> None:
        self._transport.close()


def _array(raw: bytes) -> U64:
    return np.frombuffer(raw, dtype=np.uint64)


class End:
    """What a check may do with one end. Methods are those of `Transport`, with waiting and memory added."""

    def __init__(self, call: Callable[..., Any], sizes: Sequence[int], host: Host | None) -> None:
        self._call = call
        self.sizes = tuple(sizes)  # registered bytes of each pool
        self.host = host  # None: in this process
        self.addresses: list[int] = call("addresses")

    @classmethod
    def here(cls, setup: EndSetup) -> End:
        """Open an end in this process."""
        worker = _Worker()
        worker.open(setup)
        return cls(lambda method, *args: getattr(worker, method)(*args), setup.pools, None)

    def contents(self) -> list[Bytes]:
        """Return a copy of every pool, with what lies before it (`front`) and the guard behind it."""
        return [np.frombuffer(self._call("contents", i), np.uint8).copy() for i in range(len(self.addresses))]

    def fill(self, value: int) -> None:
        """Set every byte of the pools and of what surrounds them."""
        self._call("fill", value)

    def touched(self, value: int, watch_s: float) -> int:
        """Watch the memory for so long; return how many bytes are not `value` any more, as soon as there are any."""
        return int(self._call("touched", value, watch_s))

    def reopen(self) -> None:
        """Close the transport and make another one over the same memory."""
        self._call("reopen")

    def footprint(self) -> Footprint:
        """Count what the process of this end holds, after a garbage collection."""
        return Footprint(*self._call("footprint"))

    def describe(self) -> bytes:
        return bytes(self._call("describe"))

    def signs(self) -> bool:
        return bool(self._call("signs"))

    def connect(self, description: bytes) -> int:
        return int(self._call("connect", description))

    def explain(self, peer: int) -> str:
        return str(self._call("explain", peer))

    def grant(self, address: U64, length: U64) -> bytes:
        return bytes(self._call("grant", address.tobytes(), length.tobytes()))

    def bind(self, grant: bytes, peer: int) -> None:
        self._call("bind", grant, peer)

    def revoke(self, grant: bytes) -> bool:
        return bool(self._call("revoke", grant))

    def staging_slots(self) -> dict[str, int]:
        """What the transport keeps for transfers under way; see `Transport`."""
        return dict(self._call("staging_slots"))

    def begin(self, peer: int, blocks: Blocks, grant: bytes) -> int:
        """Submit and return a ticket for `outcome`."""
        return int(self._call("begin", peer, [part.astype(np.uint64).tobytes() for part in blocks], grant))

    def outcome(self, ticket: int, timeout_s: float = 20.0) -> int:
        """Wait for a transfer; return its bytes or raise its `TransportError`. Once for each ticket that is done."""
        return int(self._call("outcome", ticket, timeout_s))

    def move(self, peer: int, blocks: Blocks, grant: bytes) -> int:
        """Submit and wait."""
        return self.outcome(self.begin(peer, blocks, grant))

    def fence(self, peer: int) -> bool:
        return bool(self._call("fence", peer))

    def unfinished(self) -> int:
        """Count the transfers whose future is not done. Those that `outcome` returned are not looked at again."""
        return int(self._call("unfinished"))

    def forbid_ptrace(self) -> None:
        """From now on process_vm_writev into that process is refused, except to root with all its capabilities."""
        self._call("forbid_ptrace")

    def give_up_ptrace(self) -> None:
        """From now on that process is refused what any other user would be."""
        self._call("give_up_ptrace")

    def become(self, user: int) -> None:
        """That process goes on as this uid."""
        self._call("become", user)

    def close(self) -> None:
        self._call("close")


class Host:
    """A process that serves ends, one at a time. Close it, or use it in a `with` statement."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(ANSWER_S)
        with theirs:
            command = [sys.executable, "-m", "kvroom.conformance.ends", str(theirs.fileno())]
            # Engines log to stdout; that of the caller is for what the caller says.
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=2)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def open(self, setup: EndSetup) -> End:
        """Open an end there."""
        self._call("open", setup)
        return End(self._call, setup.pools, self)

    def kill(self) -> None:
        """SIGKILL the process and wait for its end."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGSTOP the process and wait until it stands still."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def resume(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, *args: Any) -> Any:
        try:
            _send(self._socket, [method, args])
            kind, value = _receive(self._socket)
        except TimeoutError as error:
            raise TimeoutError(f"process {self.pid} did not answer {method!r} within {ANSWER_S} s") from error
        except (EOFError, ConnectionError) as error:
            raise EOFError(f"process {self.pid} ended when asked {method!r}; what it said is on stderr") from error
        if kind == "ok":
            return value
        raise _RAISED[kind](value)


class Hosts:
    """Processes for ends, kept for later: starting one takes longer than most things that are done with it."""

    def __init__(self) -> None:
        self._idle: list[Host] = []

    def want(self, count: int) -> None:
        """Start processes until so many are idle; they come up side by side."""
        self._idle += [Host() for _ in range(count - len(self._idle))]

    def take(self) -> Host:
        """Return a process that serves no end."""
        return self._idle.pop() if self._idle else Host()

    def give(self, host: Host) -> None:
        """Take a process back whose end is closed."""
        self._idle.append(host)

    def close(self) -> None:
        """End all that were given back."""
        while self._idle:
            self._idle.pop().close()


def _send(connection: socket.socket, value: Any) -> None:
    raw = msgspec.msgpack.encode(value)
    connection.sendall(struct.pack("<Q", len(raw)) + raw)


def _receive(connection: socket.socket) -> Any:
    (size,) = struct.unpack("<Q", _exactly(connection, 8))
    return msgspec.msgpack.decode(_exactly(connection, size))


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    left = memoryview(data)
    while left:
        got = connection.recv_into(left)
        if not got:
            raise EOFError("the other process ended")
        left = left[got:]
    return data


def _serve(connection: socket.socket) -> None:
    worker = _Worker()
    while True:
        try:
            method, args = _receive(connection)
        except EOFError:
            return
        if method == "open":
            worker = _Worker()
        try:
            answer = ["ok", getattr(worker, method)(*args)]
        except (KVRoomError, TimeoutError) as error:
            answer = [type(error).__name__, str(error)]
        _send(connection, answer)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _connection:
        _serve(_connection)
