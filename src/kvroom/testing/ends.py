"""One end of a transport under test, in this process or in another one, with memory whose content is known.

`python -m kvroom.testing.ends FD` serves an end on a socket: length-prefixed msgpack, one answer per request. Tests use
`End.here` and `Host.open`, which look alike.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvroom.errors import KVRoomError, TransportError
from kvroom.plan.blocks import U64, Blocks, Extents, MemoryRange
from kvroom.transports import Transfer, create
from kvroom.transports.pool import allocate

Bytes = npt.NDArray[np.uint8]
_PR_SET_DUMPABLE = 4
_CAP_SYS_PTRACE = 19
_CAPABILITY_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None)
GUARD_BYTES = 4096  # behind every pool: memory that is not registered, so that pools never touch


class _Worker:
    """The end itself. Arguments and results are plain values, so that they can cross a process border."""

    def __init__(self) -> None:
        self._transfers: list[Transfer] = []

    def open(self, name: str, options: dict[str, Any], pools: list[int], seed: int, shared: bool, huge: bool) -> None:
        """Make the transport and register a pool of each size, filled from `seed`."""
        self._pools = [allocate(nbytes + GUARD_BYTES, shared=shared, huge=huge) for nbytes in pools]
        generator = np.random.default_rng(seed)
        for pool in self._pools:
            np.frombuffer(pool.buffer, np.uint8)[:] = generator.integers(0, 256, pool.nbytes, dtype=np.uint8)
        self._transport = create(name, **options)
        self._transport.register(
            [MemoryRange(pool.address, nbytes) for pool, nbytes in zip(self._pools, pools, strict=True)]
        )

    def addresses(self) -> list[int]:
        return [pool.address for pool in self._pools]

    def contents(self, index: int) -> bytes:
        return bytes(self._pools[index].buffer)

    def describe(self) -> bytes:
        return self._transport.describe()

    def connect(self, description: bytes) -> int:
        return self._transport.connect(description)

    def why(self, peer: int) -> str:
        return self._transport.why(peer)

    def grant(self, address: bytes, length: bytes) -> bytes:
        return self._transport.grant(Extents(_array(address), _array(length)))

    def revoke(self, grant: bytes) -> bool:
        return self._transport.revoke(grant)

    def begin(self, peer: int, src: bytes, dst: bytes, length: bytes, grant: bytes) -> int:
        blocks = Blocks(_array(src), _array(dst), _array(length))
        self._transfers.append(self._transport.submit(peer, blocks, grant))
        return len(self._transfers) - 1

    def outcome(self, ticket: int, timeout_s: float) -> int:
        return self._transfers[ticket].result(timeout_s)

    def fence(self, peer: int) -> bool:
        return self._transport.fence(peer)

    def unfinished(self) -> int:
        return sum(not transfer.done() for transfer in self._transfers)

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

    def __init__(self, call: Callable[..., Any], pid: int, kill: Callable[[], None] | None) -> None:
        self._call = call
        self.pid = pid
        self.kill = kill
        self.addresses: list[int] = call("addresses")

    @classmethod
    def here(
        cls,
        name: str,
        options: dict[str, Any],
        pools: Sequence[int],
        seed: int = 0,
        shared: bool = False,
        huge: bool = True,
    ) -> End:
        """Open an end in this process; arguments as in `Host.open`."""
        worker = _Worker()
        worker.open(name, options, list(pools), seed, shared, huge)
        return cls(lambda method, *args: getattr(worker, method)(*args), 0, None)

    def contents(self) -> list[Bytes]:
        """Return a copy of every pool with the guard behind it."""
        return [np.frombuffer(self._call("contents", i), np.uint8).copy() for i in range(len(self.addresses))]

    def describe(self) -> bytes:
        return bytes(self._call("describe"))

    def connect(self, description: bytes) -> int:
        return int(self._call("connect", description))

    def why(self, peer: int) -> str:
        return str(self._call("why", peer))

    def grant(self, address: U64, length: U64) -> bytes:
        return bytes(self._call("grant", address.tobytes(), length.tobytes()))

    def revoke(self, grant: bytes) -> bool:
        return bool(self._call("revoke", grant))

    def begin(self, peer: int, blocks: Blocks, grant: bytes) -> int:
        """Submit and return a ticket for `outcome`."""
        return int(self._call("begin", peer, *(part.astype(np.uint64).tobytes() for part in blocks), grant))

    def outcome(self, ticket: int, timeout_s: float = 20.0) -> int:
        """Wait for a transfer; return its bytes or raise its `TransportError`."""
        return int(self._call("outcome", ticket, timeout_s))

    def move(self, peer: int, blocks: Blocks, grant: bytes) -> int:
        """Submit and wait."""
        return self.outcome(self.begin(peer, blocks, grant))

    def fence(self, peer: int) -> bool:
        return bool(self._call("fence", peer))

    def unfinished(self) -> int:
        """Count the transfers whose future is not done."""
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
        with theirs:
            command = [sys.executable, "-m", "kvroom.testing.ends", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def open(
        self,
        name: str,
        options: dict[str, Any],
        pools: Sequence[int],
        seed: int = 0,
        shared: bool = False,
        huge: bool = True,
    ) -> End:
        """Open an end there: transport `name` with `options`, and pools of these sizes in bytes filled from `seed`."""
        self._call("open", name, options, list(pools), seed, shared, huge)
        return End(self._call, self._process.pid, self.kill)

    def kill(self) -> None:
        """SIGKILL the process and wait for its end."""
        self._process.kill()
        self._process.wait()

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
        _send(self._socket, [method, args])
        kind, value = _receive(self._socket)
        if kind == "ok":
            return value
        raise {"TransportError": TransportError, "TimeoutError": TimeoutError}.get(kind, KVRoomError)(value)


def _send(connection: socket.socket, value: Any) -> None:
    raw = msgspec.msgpack.encode(value)
    connection.sendall(struct.pack("<Q", len(raw)) + raw)


def _receive(connection: socket.socket) -> Any:
    (size,) = struct.unpack("<Q", _exactly(connection, 8))
    return msgspec.msgpack.decode(_exactly(connection, size))


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    if connection.recv_into(data, size, socket.MSG_WAITALL) < size:
        raise EOFError("the other process ended")
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
