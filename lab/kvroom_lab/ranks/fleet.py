"""Two engines of several ranks, as a test uses them: processes, a directory, and calls to one rank or to all."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from kvroom import KVBootstrapServer, Timeouts
from kvroom.plan.ranks import Place, match_ranks

from .cases import Case, SideName
from .channel import RankDied, pair
from .worker import Ended, Start

TIMES = Timeouts(bootstrap_s=20, waiting_s=20, stall_s=20, drain_s=5, decline_s=1)
PATIENCE_S = 30.0
Rank = tuple[SideName, Place]


class RankError(Exception):
    """A rank answered a call with an error."""


class Process:
    """A process that can be a rank. Close it after use."""

    def __init__(self) -> None:
        self._channel, theirs = pair()
        with theirs:
            command = [sys.executable, "-m", "kvroom_lab.ranks.worker", str(theirs.fileno())]
            # Engines log to stdout; the caller's stdout is for its own output.
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=2)
        self.name = f"process {self._process.pid}"

    def ask(self, method: str, **arguments: Any) -> Any:
        """Call a method and return its result."""
        self.post(method, **arguments)
        return self.answer()

    def post(self, method: str, **arguments: Any) -> None:
        """Send a call; `answer` must follow."""
        self._asked = method
        self._channel.send([method, arguments])

    def answer(self) -> Any:
        """Return the result of the posted call.

        Raise `RankError` if it is an error, `RankDied` if the process is gone.
        """
        try:
            kind, value = self._channel.receive()
        except TimeoutError as error:
            raise TimeoutError(f"{self.name} did not answer {self._asked!r}") from error
        if kind != "ok":
            raise RankError(f"{self.name}: {self._asked} failed: {kind}: {value}")
        return value

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End the process by closing its socket; kill it if it does not end in time."""
        self._channel.close()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()


class Processes:
    """Processes kept for later use, because starting one takes longer than most cases."""

    def __init__(self) -> None:
        self._idle: list[Process] = []

    def want(self, count: int) -> None:
        """Start processes until `count` are idle. They start up in parallel."""
        self._idle += [Process() for _ in range(count - len(self._idle))]

    def take(self, count: int) -> list[Process]:
        """Return `count` processes; start those that are missing."""
        self.want(count)
        taken, self._idle = self._idle[:count], self._idle[count:]
        return taken

    def give(self, processes: Iterable[Process]) -> None:
        """Keep processes that are no longer ranks; close dead ones."""
        for process in processes:
            if process.alive:
                self._idle.append(process)
            else:
                process.close()

    def close(self) -> None:
        """Close all idle processes."""
        while self._idle:
            self._idle.pop().close()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Fleet:
    """The ranks of both engines of a case, running and registered. Use it in a `with` statement."""

    def __init__(
        self,
        case: Case,
        transport: str,
        processes: Processes,
        *,
        options: dict[str, Any] | None = None,
        timeouts: Timeouts = TIMES,
        checksum: bool = False,
        shared: bool = False,
    ) -> None:
        self.case = case
        self._processes = processes
        self._directory = KVBootstrapServer()
        self._config = Start(
            case=case,
            side="source",
            place=Place(0, 0, 0, 0),
            transport=transport,
            transport_options=options or {},
            directory="",
            timeouts=timeouts,
            checksum=checksum,
            shared=shared,
        )
        self._taken = processes.take(case.ranks)
        self.ranks: dict[Rank, Process] = dict(zip(_ranks(case), self._taken, strict=True))
        self.addresses: dict[Rank, str] = {}
        try:
            self._directory.start()
            self._start(self.ranks)
        except BaseException:  # whatever the error is, no rank is left running; the error is raised again
            self._drop()
            raise

    def _start(self, ranks: dict[Rank, Process]) -> None:
        """Make ranks of these processes, in parallel."""
        for (side, place), process in ranks.items():
            process.name = f"{side} {place}"
            changes = {"side": side, "place": place, "directory": self._directory.address}
            process.post("start", config=msgspec.structs.replace(self._config, **changes))
        self.addresses |= zip(ranks, results(list(ranks.values())), strict=True)

    @property
    def sources(self) -> list[Process]:
        """The prefill ranks that are alive."""
        return [process for (side, _), process in self.ranks.items() if side == "source"]

    @property
    def sinks(self) -> list[Process]:
        """The decode ranks that are alive."""
        return [process for (side, _), process in self.ranks.items() if side == "sink"]

    @property
    def everyone(self) -> list[Process]:
        """All ranks that are alive."""
        return list(self.ranks.values())

    def places(self, side: SideName) -> list[Place]:
        """Return the places of the living ranks of a side."""
        return [place for of, place in self.ranks if of == side]

    def kill(self, rank: Rank) -> None:
        """Send SIGKILL to one rank and remove it from the ranks."""
        self.ranks.pop(rank).kill()

    def revive(self) -> None:
        """Start every rank that was killed again, at its place."""
        lost = [rank for rank in _ranks(self.case) if rank not in self.ranks]
        fresh = dict(zip(lost, self._processes.take(len(lost)), strict=True))
        self._taken += fresh.values()
        self.ranks = {rank: self.ranks.get(rank) or fresh[rank] for rank in _ranks(self.case)}
        self._start(fresh)

    def hand_over(self, room: int, tokens: int, prefix: int = 0) -> None:
        """Open a room on all ranks and send everything."""
        every(self.everyone, "open", room=room, tokens=tokens, prefix=prefix)
        every(self.sinks, "offer", room=room)
        every(self.sources, "send", room=room)

    def ended(self, ranks: Sequence[Process], room: int, timeout_s: float = PATIENCE_S) -> list[Ended]:
        """Wait for the end of a room on these ranks; return how it ended on each."""
        return [msgspec.convert(answer, Ended) for answer in every(ranks, "wait", room=room, timeout_s=timeout_s)]

    def unsuccessful(self, room: int) -> list[str]:
        """Return the ranks on which a room does not succeed, with the reasons."""
        answers = zip(self.everyone, self.ended(self.everyone, room), strict=True)
        return [
            f"{rank.name}: room {room} is {ended.status}: {ended.failure}"
            for rank, ended in answers
            if ended.status != "Success"
        ]

    def wrong_bytes(self) -> list[str]:
        """Return every byte that is wrong, on all ranks."""
        answers = zip(self.everyone, every(self.everyone, "wrong_bytes"), strict=True)
        return [f"{rank.name}: {fault}" for rank, found in answers for fault in found]

    def clear(self, room: int) -> list[str]:
        """Clear a room on all ranks; return the ranks to which its pages did not come back exactly once."""
        every(self.everyone, "clear", room=room)
        answers = zip(self.everyone, every(self.everyone, "releases", room=room, timeout_s=PATIENCE_S), strict=True)
        return [
            f"{rank.name}: the pages of room {room} came back {count} times" for rank, count in answers if count != 1
        ]

    def leftovers(self) -> list[str]:
        """Return what any rank still keeps after all rooms were cleared."""
        answers = zip(self.everyone, every(self.everyone, "audit", timeout_s=PATIENCE_S), strict=True)
        return [f"{rank.name} keeps {found}" for rank, found in answers if found]

    def close(self) -> None:
        """Close the managers and return the processes to the pool."""
        try:
            every(self.everyone, "stop")
        finally:
            self._directory.close()
            self._processes.give(self._taken)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._drop()

    def _drop(self) -> None:
        """Kill everything, whatever it is doing; the failure that caused it is raised by the caller."""
        for process in self._taken:
            process.kill()
        self._directory.close()
        self._processes.give(self._taken)


def _ranks(case: Case) -> Iterator[Rank]:
    yield from (("source", place) for place in case.source.parallel.places())
    yield from (("sink", place) for place in case.sink.parallel.places())


def every(ranks: Sequence[Process], method: str, **arguments: Any) -> list[Any]:
    """Post a call to all ranks, then collect all results."""
    for rank in ranks:
        rank.post(method, **arguments)
    return results(ranks)


def results(ranks: Sequence[Process]) -> list[Any]:
    """Return the results of all. If some ranks fail, raise the first error once every rank has answered."""
    answers, errors = [], []
    for rank in ranks:
        try:
            answers.append(rank.answer())
        except (RankError, RankDied) as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return answers


def run(case: Case, transport: str, processes: Processes, **options: Any) -> list[str]:
    """Hand over every request of a case, all open at the same time; return everything that is wrong after that."""
    with Fleet(case, transport, processes, **options) as fleet:
        rooms = range(1, len(case.requests) + 1)
        for room, (tokens, prefix) in zip(rooms, case.requests, strict=True):
            fleet.hand_over(room, tokens, prefix)
        wrong = [fault for room in rooms for fault in fleet.unsuccessful(room)]
        wrong += fleet.wrong_bytes()
        wrong += [fault for room in rooms for fault in fleet.clear(room)]
        return wrong + fleet.leftovers()


def run_one_by_one(case: Case, transport: str, processes: Processes, **options: Any) -> list[str]:
    """Hand one request over to one decode rank after another, each starting when the one before has everything.

    Until the last one has everything, no prefill rank that it needs may succeed or release its pages.
    """
    links = match_ranks(case.source.parallel, case.sink.parallel)
    wrong = []
    with Fleet(case, transport, processes, **options) as fleet:
        tokens, prefix = case.requests[0]
        every(fleet.everyone, "open", room=1, tokens=tokens, prefix=prefix)
        every(fleet.sources, "send", room=1)
        waiting = fleet.places("sink")
        while waiting:
            for place in waiting:
                for source in (fleet.ranks["source", one] for one in links.sources(place)):
                    if source.ask("releases", room=1, timeout_s=0) or source.ask("wait", room=1, timeout_s=0)["nbytes"]:
                        wrong.append(f"{source.name} is done, and sink {place} has not offered yet")
            sink = fleet.ranks["sink", waiting.pop(0)]
            sink.ask("offer", room=1)
            (end,) = fleet.ended([sink], 1)
            wrong += [] if end.status == "Success" else [f"{sink.name} is {end.status}: {end.failure}"]
        return wrong + fleet.unsuccessful(1) + fleet.wrong_bytes() + fleet.clear(1) + fleet.leftovers()
