"""The ranks of an engine as real processes with a torch group, each of which agrees when a test calls it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from kvroom.core.phases import KVPoll
from kvroom.errors import KVRoomError
from kvroom.runtime.agreement import Agreement, Carrier, RankConsensus, TorchCarrier

States = Mapping[int, tuple[KVPoll, str | None]]
Answer = dict[int, RankConsensus] | KVRoomError


def _torch(rank: int, size: int, meeting: str, timeout_s: float) -> Carrier:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    return TorchCarrier(timeout_s=timeout_s)


def _rank(pipe: Connection, rank: int, size: int, meeting: str, timeout_s: float) -> None:
    carrier = _torch(rank, size, meeting, timeout_s)
    methods: dict[str, Callable[[Any], object]] = {
        "agree": Agreement(carrier).agree, "least": carrier.least, "gather": carrier.gather,
        "close": lambda _: carrier.close(),
    }  # fmt: skip
    pipe.send("up")
    while (call := pipe.recv()) is not None:
        method, argument = call
        try:
            pipe.send(methods[method](argument))
        except KVRoomError as error:
            pipe.send(error)
    carrier.close()


class Ranks:
    """The ranks: `tell` gives a rank its states, `answer` waits for its result."""

    def __init__(self, processes: list[BaseProcess], pipes: list[Connection]) -> None:
        self._processes = processes
        self._pipes = pipes
        self.size = len(pipes)

    def tell(self, rank: int, states: States) -> None:
        self._pipes[rank].send(("agree", states))

    def answer(self, rank: int) -> Answer:
        found: Answer = self._pipes[rank].recv()
        return found

    def call(self, method: str, *arguments: object) -> list[object]:
        """Call a method of the carrier of every rank, each with its own argument; return all results."""
        for pipe, argument in zip(self._pipes, arguments, strict=True):
            pipe.send((method, argument))
        return [pipe.recv() for pipe in self._pipes]

    def call_one(self, rank: int, method: str, argument: object) -> object:
        """Call a method of the carrier of one rank."""
        self._pipes[rank].send((method, argument))
        found: object = self._pipes[rank].recv()
        return found

    def agree(self, *states: States) -> list[Answer]:
        """Let all ranks agree at the same time; return their answers."""
        for rank, said in enumerate(states):
            self.tell(rank, said)
        return [self.answer(rank) for rank in range(self.size)]

    def kill(self, rank: int) -> None:
        self._processes[rank].kill()
        self._processes[rank].join()


@contextlib.contextmanager
def ranks(size: int, meeting: Path, timeout_s: float = 60) -> Iterator[Ranks]:
    """Start the ranks. `meeting`: a path where torch may put a file."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(size)]
    processes = [
        context.Process(target=_rank, args=(theirs, rank, size, str(meeting), timeout_s))
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
        for pipe in pipes:
            assert pipe.recv() == "up"
        yield Ranks(list(processes), list(pipes))
        for pipe in pipes:
            with contextlib.suppress(BrokenPipeError):  # a rank that was killed
                pipe.send(None)
        for process in processes:
            process.join()
