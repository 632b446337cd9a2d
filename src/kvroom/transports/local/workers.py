"""The transfers of `local`, and the threads that carry them out.

A transfer is cut into runs of blocks, and any of its workers takes the next run. The transfer completes when its last
worker has finished, so no thread reads or writes for it afterwards.
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
_PIECE_BYTES = 4 << 20  # the share of a worker at a time, so that several work on a large transfer
_PIECE_BLOCKS = 1 << 15  # large enough that pieces of small blocks are worth the calls around them
_ALONE_BYTES = 1 << 19  # below this, waking a second worker costs more than it saves
_INLINE_BLOCKS = 64
_INLINE_BYTES = 1 << 15  # below this, copying takes less time than waking a worker


class CopiedTransfer(TransferRecord):
    """A transfer that several threads may copy. `write` copies blocks or raises `OSError`."""

    def __init__(self, blocks: Blocks, write: Callable[[Blocks], None]) -> None:
        super().__init__(blocks)
        self._write = write
        self.blocks, self._runs = cut(blocks, _PIECE_BLOCKS, _PIECE_BYTES)
        self._lock = threading.Lock()
        self._workers = 0

    @property
    def small(self) -> bool:
        """True if the copy takes less time than waking another thread."""
        return self.blocks.length.size <= _INLINE_BLOCKS and self.nbytes <= _INLINE_BYTES

    def share(self, threads: int) -> int:
        """Return the number of workers for this transfer. Each of them must then call `work` once."""
        self._workers = 1 if self.nbytes < _ALONE_BYTES else min(threads, len(self._runs))
        return self._workers

    def work(self) -> None:
        """Write runs until none is left. The last worker completes the future."""
        while True:
            with self._lock:
                if self.error or not self._runs:
                    break
                start, stop = self._runs.pop()
            try:
                self._write(Blocks(*(part[start:stop] for part in self.blocks)))
            except OSError as error:
                self.fail(TransportError(f"local: writing into the peer failed: {error.strerror or error}"))
            # A supervisor: a hostile peer's numbers may make a writer raise any exception, but the caller is waiting
            # for the future, and the worker has other peers to serve.
            except Exception as error:
                logger.debug("local: a run of blocks raised", exc_info=True)
                self.fail(TransportError(f"local: writing into the peer failed: {type(error).__name__}: {error}"))
        with self._lock:
            self._workers -= 1
            last = not self._workers
        if last:
            self.finish()

    def cancel(self, reason: str) -> None:
        """Fail the transfer unless its last run has started. A run that has started is completed."""
        with self._lock:
            if self._runs:
                self.fail(TransportError(reason))


class WorkerPool:
    """The worker threads: at most `threads`, and at most one per core. They start with the first transfer."""

    def __init__(self, threads: int) -> None:
        self.threads = min(threads, os.cpu_count() or 1)
        self._transfers: queue.SimpleQueue[CopiedTransfer | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []

    def queue(self, transfer: CopiedTransfer, workers: int) -> None:
        """Queue the transfer for this number of workers. Must not run concurrently with `stop`."""
        while len(self._workers) < self.threads:
            worker = threading.Thread(target=self._work, name="kvroom-local", daemon=True)
            self._workers.append(worker)
            worker.start()
        for _ in range(workers):
            self._transfers.put(transfer)

    def stop(self) -> list[threading.Thread]:
        """End the workers after the queued transfers, and return their threads for the caller to join."""
        workers, self._workers = self._workers, []
        for _ in workers:
            self._transfers.put(None)
        return workers

    def _work(self) -> None:
        while (transfer := self._transfers.get()) is not None:
            transfer.work()
            del transfer  # otherwise it, and all that its callbacks refer to, would live until the next transfer
