"""An exception other than the declared errors, from access to a peer's memory, fails its transfer; workers go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
from transport_helpers import NBYTES, Side, block

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks, MemoryRange
from kvroom.transports.kit.devices import DeviceBatch
from kvroom.transports.kit.ranges import u64
from kvroom.transports.local.workers import CopiedTransfer, WorkerPool
from kvroom.transports.onesided.engine import EngineTransfer, OneSidedDescription, OneSidedEngine
from kvroom.transports.onesided.transport import OneSidedTransport

WAIT_S = 20.0
LARGE = Blocks(u64([1 << 40]), u64([1 << 41]), u64([1 << 21]))


def run(crew: WorkerPool, write: Callable[[Blocks], None]) -> int:
    job = CopiedTransfer(LARGE, write)
    crew.queue(job, job.share(crew.threads))
    return job.future.result(WAIT_S)


def test_a_writer_that_raises_fails_its_transfer_and_leaves_the_crew_whole() -> None:
    def overflows(blocks: Blocks) -> None:
        raise OverflowError(f"{blocks.nbytes} is too large")

    crew = WorkerPool(2)
    for _ in range(4):  # more often than there are workers
        with pytest.raises(TransportError, match=r"OverflowError: .* is too large"):
            run(crew, overflows)
    assert run(crew, lambda _: None) == LARGE.nbytes
    for worker in crew.stop():
        worker.join()


class Odd(OneSidedEngine[str]):
    """An engine that cannot handle its peer's numbers: it raises when a batch begins, or when it finishes."""

    def __init__(self, raises: str) -> None:
        self.raises = raises

    def start(self, memory: Sequence[MemoryRange]) -> bytes:
        return b""

    def join(self, described: OneSidedDescription) -> str:
        return "joined"

    def begins_at_once(self, session: str) -> bool:
        return True

    def begin(self, session: str, batch: DeviceBatch) -> Any:
        return self._do("begin")

    def finish(self, session: str, begun: Any, job: EngineTransfer) -> None:
        self._do("finish")

    def _do(self, step: str) -> str:
        if step == self.raises:
            raise OverflowError("cannot convert a number of the peer")
        return step

    def leave(self, session: str) -> None: ...
    def stop(self) -> None: ...

    def way(self) -> str:
        return "none"


class _Described(OneSidedDescription, frozen=True, tag="odd"):
    pass


class OddTransport(OneSidedTransport[str]):
    name: ClassVar[str] = "odd"
    description: ClassVar[type[OneSidedDescription]] = _Described


@pytest.mark.parametrize("nbytes", [4096, NBYTES], ids=["small", "large"])
@pytest.mark.parametrize("raises", ["begin", "finish"])
def test_an_engine_that_raises_fails_its_transfer_and_no_thread(raises: str, nbytes: int) -> None:
    engine = Odd(raises)
    with Side(OddTransport(engine), 1) as source, Side(OddTransport(Odd("")), 2) as sink:
        peer = source.transport.connect(sink.transport.describe())
        blocks = block(source, sink, nbytes)
        for _ in range(4):
            with pytest.raises(TransportError, match="the engine raised OverflowError: cannot convert a number"):
                source.transport.submit(peer, blocks, sink.grant()).result(WAIT_S)
        engine.raises = ""
        assert source.transport.submit(peer, blocks, sink.grant()).result(WAIT_S) == nbytes
