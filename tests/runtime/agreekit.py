"""The ranks of an engine as real processes, each of which agrees when it is told to."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from kvroom.core.phases import KVPoll
from kvroom.errors import KVRoomError
from kvroom.runtime.agreement import Agreement, Carrier, RankConsensus, SocketCarrier, TorchCarrier

SECRET = b"a secret for tests, long enough"
States = Mapping[int, tuple[KVPoll, str | None]]
Answer = dict[int, RankConsensus] | KVRoomError


def _torch(rank: int, size: int, meeting: str, timeout_s: float) -> Carrier:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    return TorchCarrier(timeout_s=timeout_s)


def _sockets(rank: int, size: int, pipe: Connection, timeout_s: float) -> Carrier:
    if rank:
        return SocketCarrier(rank, size, pipe.recv(), secret=SECRET, timeout_s=timeout_s)
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(f"127.0.0.1:{listener.getsockname()[1]}")
    return SocketCarrier(rank, size, listener, secret=SECRET, timeout_s=timeout_s)


def _rank(pipe: Connection, kind: str, rank: int, size: int, meeting: str, timeout_s: float) -> None:
    make = _torch(rank, size, meeting, timeout_s) if kind == "torch" else _sockets(rank, size, pipe, timeout_s)
    agreement = Agreement(make)
    pipe.send("up")
    while (states := pipe.recv()) is not None:
        try:
            pipe.send(agreement.agree(states))
        except KVRoomError as error:
            pipe.send(error)
    make.close()


class Ranks:
    """`tell` gives a rank its states, `answer` waits for what it found."""

    def __init__(self, processes: list[BaseProcess], pipes: list[Connection]) -> None:
        self._processes = processes
        self._pipes = pipes
        self.size = len(pipes)

    def tell(self, rank: int, states: States) -> None:
        self._pipes[rank].send(states)

    def answer(self, rank: int) -> Answer:
        found: Answer = self._pipes[rank].recv()
        return found

    def agree(self, *states: States) -> list[Answer]:
        """All ranks at once."""
        for rank, said in enumerate(states):
            self.tell(rank, said)
        return [self.answer(rank) for rank in range(self.size)]

    def kill(self, rank: int) -> None:
        self._processes[rank].kill()
        self._processes[rank].join()


@contextlib.contextmanager
def ranks(kind: str, size: int, meeting: Path, timeout_s: float = 60) -> Iterator[Ranks]:
    """`meeting`: a path where torch may put a file."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(size)]
    processes = [
        context.Process(target=_rank, args=(theirs, kind, rank, size, str(meeting), timeout_s))
        for rank, (_, theirs) in enumerate(pairs)
    ]
    pipes: Sequence[Connection] = [ours for ours, _ in pairs]
    with contextlib.ExitStack() as stack:
        for process, (ours, theirs) in zip(processes, pairs, strict=True):
            process.start()
            stack.callback(ours.close)
            stack.callback(process.join)
            stack.callback(process.kill)
            theirs.close()
        if kind == "sockets":
            address = pipes[0].recv()
            for pipe in pipes[1:]:
                pipe.send(address)
        for pipe in pipes:
            assert pipe.recv() == "up"
        yield Ranks(list(processes), list(pipes))
        for pipe in pipes:
            with contextlib.suppress(BrokenPipeError):  # one that was killed
                pipe.send(None)
        for process in processes:
            process.join()
