"""An end of a transport under test, in this process or in another one, with memory of known content.

`python -m kvroom.conformance.ends FD` serves an end on a socket: length-prefixed msgpack, one answer per request. Tests
create an end by `End.here` or `Host.open`, and use both in the same way; `Hosts` keeps processes for later use.
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
ANSWER_S = 90.0  # the longest that one call may take; a longer one hangs, and the error names it
_RAISED: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (*vars(errors).values(), MalformedDescription, OutOfReach, TimeoutError)
    if isinstance(kind, type) and issubclass(kind, Exception)
}


class Footprint(NamedTuple):
    """The resources that a process holds: threads, open descriptors, resident memory in bytes."""

    threads: int
    descriptors: int
    resident_bytes: int


class EndSetup(NamedTuple):
    """The parameters of an end."""

    name: str
    """Name of the transport, for `kvroom.transports.create`."""
    options: dict[str, Any]
    """Options of the transport."""
    pools: Sequence[int]
    """Registered bytes of each pool. `GUARD_BYTES` of unregistered memory follow each pool."""
    seed: int = 0
    """Seed of the random bytes that fill all of the memory."""
    shared: bool = False
    """True: other processes can map the pools."""
    huge: bool = True
    """True: ask the kernel for huge pages."""
    front: int = 0
    """Bytes of unregistered memory before each pool."""
    pieces: int = 1
    """Number of adjoining pieces as which each pool is registered."""


class _Worker:
    """The end itself. Arguments and results are plain values that can be sent to another process."""

    def __init__(self) -> None:
        self._transfers: dict[int, Transfer] = {}
        self._tickets = itertools.count()

    def open(self, setup: Sequence[Any]) -> None:
        """Create the pools and the transport, and register the pools. `setup`: the fields of an `EndSetup`."""
        given = EndSetup(*setup)
        surplus = given.front + GUARD_BYTES
        self._pools = [allocate(nbytes + surplus, shared=given.shared, huge=given.huge) for nbytes in given.pools]
        self._front = given.front
        generator = np.random.default_rng(given.seed)
        for pool in self._pools:
            np.frombuffer(pool.buffer, np.uint8)[:] = np.frombuffer(generator.bytes(pool.nbytes), np.uint8)
        self._make = partial(create, given.name, **given.options)
        self._ranges: list[MemoryRange] = []
        for address, nbytes in zip(self.addresses(), given.pools, strict=True):
            borders = [address + nbytes * i // given.pieces for i in range(given.pieces + 1)]
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
        """Watch all memory for `watch_s`; return the number of bytes that differ from `value` as soon as any do."""
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
        """Submit the blocks, which arrive as the bytes of their three arrays; return a ticket for `outcome`."""
        ticket = next(self._tickets)
        self._transfers[ticket] = self._transport.submit(peer, Blocks(*map(_array, blocks)), grant)
        return ticket

    def outcome(self, ticket: int, timeout_s: float) -> int:
        if concurrent.futures.wait([self._transfers[ticket]], timeout_s).not_done:
            raise TimeoutError(f"transfer {ticket} was not done after {timeout_s:.1f} s")
        # Not kept: a thousand of them would look like growth of the transport.
        return self._transfers.pop(ticket).result()

    def fence(self, peer: int) -> bool:
        return self._transport.fence(peer)

    def unfinished(self) -> int:
        return sum(not transfer.done() for transfer in self._transfers.values())

    def footprint(self) -> Footprint:
        gc.collect()  # objects that only wait for the collector are no growth
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return Footprint(len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), resident)

    def forbid_ptrace(self) -> None:
        """Make this process one that its own user may not trace, like a hardened service. See prctl(2)."""
        _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)

    def give_up_ptrace(self) -> None:
        """Drop CAP_SYS_PTRACE if this process has it: after that, root is refused what any other user is refused."""
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice, low words first
        if _libc.capget(header, sets) == 0:
            sets[0] &= ~(1 << _CAP_SYS_PTRACE)
            sets[1] &= ~(1 << _CAP_SYS_PTRACE)
            _libc.capset(header, sets)

    def become(self, user: int) -> None:
        """Change the uid of this process; only root may."""
        os.setuid(user)

    def close(self) -> None:
        self._transport.close()


def _array(raw: bytes) -> U64:
    return np.frombuffer(raw, dtype=np.uint64)


class End:
    """An end as a check uses it: the methods of `Transport`, and others that wait or that read and fill its memory.

    A call raises what the transport raised, `TimeoutError` after 90 s, or `EOFError` if the process has ended.
    """

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
        """Return a copy of every pool with the unregistered bytes before it (`front`) and behind it (`GUARD_BYTES`)."""
        return [np.frombuffer(self._call("contents", i), np.uint8).copy() for i in range(len(self.addresses))]

    def fill(self, value: int) -> None:
        """Set every byte of the pools and of the unregistered memory around them."""
        self._call("fill", value)

    def touched(self, value: int, watch_s: float) -> int:
        """Watch all memory for `watch_s`; return the number of bytes that differ from `value` as soon as any do."""
        return int(self._call("touched", value, watch_s))

    def reopen(self) -> None:
        """Close the transport and create another one over the same memory."""
        self._call("reopen")

    def footprint(self) -> Footprint:
        """Count the resources that the process of this end holds, after a garbage collection."""
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
        """Return the staging slots in use, by state; see `Transport`."""
        return dict(self._call("staging_slots"))

    def begin(self, peer: int, blocks: Blocks, grant: bytes) -> int:
        """Submit a transfer and return a ticket for `outcome`."""
        return int(self._call("begin", peer, [part.astype(np.uint64).tobytes() for part in blocks], grant))

    def outcome(self, ticket: int, timeout_s: float = 20.0) -> int:
        """Wait for a transfer; return its bytes or raise its `TransportError`, and forget the ticket.

        Raise `TimeoutError` if it is not done in time; the ticket stays valid.
        """
        return int(self._call("outcome", ticket, timeout_s))

    def move(self, peer: int, blocks: Blocks, grant: bytes) -> int:
        """Submit a transfer and wait for it; return its bytes or raise its `TransportError`."""
        return self.outcome(self.begin(peer, blocks, grant))

    def fence(self, peer: int) -> bool:
        return bool(self._call("fence", peer))

    def unfinished(self) -> int:
        """Count the submitted transfers that are not done."""
        return int(self._call("unfinished"))

    def forbid_ptrace(self) -> None:
        """Make the kernel refuse process_vm_writev into that process, except to root with all its capabilities."""
        self._call("forbid_ptrace")

    def give_up_ptrace(self) -> None:
        """Drop CAP_SYS_PTRACE in that process: the kernel refuses it what it refuses any other user."""
        self._call("give_up_ptrace")

    def become(self, user: int) -> None:
        """Change the uid of that process; only root may."""
        self._call("become", user)

    def close(self) -> None:
        self._call("close")


class Host:
    """A process that serves one end at a time. Close it, or use it in a `with` statement."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(ANSWER_S)
        with theirs:
            command = [sys.executable, "-m", "kvroom.conformance.ends", str(theirs.fileno())]
            # Engines log to stdout. The caller's own stdout is for its results, so theirs goes to stderr.
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=2)

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self._process.poll() is None

    def open(self, setup: EndSetup) -> End:
        """Open an end in this process; the one that it served before must be closed."""
        self._call("open", setup)
        return End(self._call, setup.pools, self)

    def kill(self) -> None:
        """Send SIGKILL to the process and wait for its end."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Send SIGSTOP to the process and wait until it has stopped."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def resume(self) -> None:
        """Let the process run again (SIGCONT)."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process: it ends when its socket closes, and is killed after 10 s."""
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
            raise EOFError(f"process {self.pid} ended when asked {method!r}; see its output on stderr") from error
        if kind == "ok":
            return value
        raise _RAISED[kind](value)


class Hosts:
    """A pool of processes for ends. They are used again, because a process takes longer to start than most checks."""

    def __init__(self) -> None:
        self._idle: list[Host] = []

    def want(self, count: int) -> None:
        """Start processes until `count` are idle; they start at the same time."""
        self._idle += [Host() for _ in range(count - len(self._idle))]

    def take(self) -> Host:
        """Return an idle process, or start one."""
        return self._idle.pop() if self._idle else Host()

    def give(self, host: Host) -> None:
        """Return a process to the pool. Its end must be closed."""
        self._idle.append(host)

    def close(self) -> None:
        """End all idle processes."""
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
