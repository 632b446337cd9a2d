"""The transfers of `local` and the threads that do them. A transfer is cut into runs of blocks that any worker takes.

A transfer is done when its last worker has left it: then nothing of it reads or writes any more.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks
from kvroom.transports.kit.batches import cut
from kvroom.transports.kit.transfers import TransferRecord

logger = logging.getLogger(__name__)
_PIECE_BYTES = 4 << 20  # what one worker takes at a time, so that several share a big transfer
_PIECE_BLOCKS = 1 << 15  # so that pieces of small blocks, too, are worth the calls around them
_ALONE_BYTES = 1 << 19  # below this, waking a second worker costs more than it saves
_AT_ONCE_BLOCKS = 64
_AT_ONCE_BYTES = 1 << 15  # below this, copying takes less time than waking a worker


class CopiedTransfer(TransferRecord):
    """One transfer, copied by several threads. `write` copies blocks or raises `OSError`."""

    def __init__(self, blocks: Blocks, write: Callable[[Blocks], None]) -> None:
        super().__init__(blocks)
        self._write = write
        self.blocks, self._runs = cut(blocks, _PIECE_BLOCKS, _PIECE_BYTES)
        self._lock = threading.Lock()
        self._workers = 0

    @property
    def small(self) -> bool:
        """Whether doing it takes less time than handing it to another thread."""
        return self.blocks.length.size <= _AT_ONCE_BLOCKS and self.nbytes <= _AT_ONCE_BYTES

    def share(self, threads: int) -> int:
        """Return how many workers shall take part; each must then call `work` once."""
        self._workers = 1 if self.nbytes < _ALONE_BYTES else min(threads, len(self._runs))
        return self._workers

    def work(self) -> None:
        """Write runs until none is left; the last worker finishes the future."""
        while True:
            with self._lock:
                if self.error or not self._runs:
                    break
                start, stop = self._runs.pop()
            try:
                self._write(Blocks(*(part[start:stop] for part in self.blocks)))
            except OSError as error:
                self.fail(TransportError(f"local: writing into the peer failed: {error.strerror or error}"))
            # A supervisor: a hostile peer's numbers may make a writer raise anything, its caller waits for the future,
            # and the worker has other peers to serve.
            except Exception as error:
                logger.debug("local: a run of blocks raised", exc_info=True)
                self.fail(TransportError(f"local: writing into the peer failed: {type(error).__name__}: {error}"))
        with self._lock:
            self._workers -= 1
            last = not self._workers
        if last:
            self.finish()

    def cancel(self, reason: str) -> None:
        """Fail the transfer unless its last run has begun."""
        with self._lock:
            if self._runs:
                self.fail(TransportError(reason))


class WorkerPool:
    """Worker threads, at most `threads` and at most one per core; they start with the first transfer."""

    def __init__(self, threads: int) -> None:
        self.threads = min(threads, os.cpu_count() or 1)
        self._transfers: queue.SimpleQueue[CopiedTransfer | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []

    def give(self, transfer: CopiedTransfer, workers: int) -> None:
        """Have so many workers take part in the transfer. Not at the same time as `dismiss`."""
        while len(self._workers) < self.threads:
            worker = threading.Thread(target=self._work, name="kvroom-local", daemon=True)
            self._workers.append(worker)
            worker.start()
        for _ in range(workers):
            self._transfers.put(transfer)

    def dismiss(self) -> list[threading.Thread]:
        """Let the workers end after what they were given; return them, for the caller to join."""
        workers, self._workers = self._workers, []
        for _ in workers:
            self._transfers.put(None)
        return workers

    def _work(self) -> None:
        while (transfer := self._transfers.get()) is not None:
            transfer.work()
            del transfer  # or it would live, and all that its callbacks know, until the next one comes
