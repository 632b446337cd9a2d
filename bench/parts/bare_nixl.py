"""NIXL driven bare: for each batch build descriptor lists from NumPy, post, poll until it is done, and release.

`BareNixl` uses the public Python class with its defaults: the progress thread spins, and so does the waiting thread.
`BareNixlSleeping` goes through its bindings, as `kvroom.transports.onesided.nixl` does: its progress thread sleeps.
"""

from __future__ import annotations

import importlib
import itertools
import secrets
from abc import abstractmethod
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from kvroom.plan.blocks import U64, Blocks
from kvroom.transports.kit.pool import Pool
from parts.ends import End, Way

_PROGRESS_US = 100_000


class _Nixl(End):
    _agent: Any
    _peer: str

    def move(self, blocks: Blocks, way: Way) -> None:
        count = blocks.length.size
        step = way.blocks or count
        under_way: deque[Any] = deque()
        for start in range(0, count, step):
            if len(under_way) >= way.depth:
                self._wait(under_way.popleft())
            under_way.append(self._post(*(part[start : start + step] for part in blocks)))
        for request in under_way:
            self._wait(request)

    @abstractmethod
    def _post(self, src: U64, dst: U64, length: U64) -> Any:
        """Post a batch; return the argument of `_wait`, or None if the batch is done already."""

    @abstractmethod
    def _wait(self, request: Any) -> None:
        """Return when the batch has landed."""

    def close(self) -> None:
        del self._agent


class BareNixl(_Nixl):
    """End that uses `nixl_agent` with its defaults."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self._agent = importlib.import_module("nixl_cu12._api").nixl_agent(secrets.token_hex(8))
        self._agent.register_memory([(pool.address, pool.nbytes, 0, "")], "DRAM")

    def card(self) -> bytes:
        return bytes(self._agent.get_agent_metadata())

    def meet(self, card: bytes) -> None:
        name = self._agent.add_remote_agent(card)
        self._peer = name.decode() if isinstance(name, bytes) else name
        self._agent.make_connection(self._peer)

    def _post(self, src: U64, dst: U64, length: U64) -> Any:
        agent = self._agent
        local = agent.get_xfer_descs(_rows(src, length), "DRAM")
        remote = agent.get_xfer_descs(_rows(dst, length), "DRAM")
        request = agent.initialize_xfer("WRITE", local, remote, self._peer)
        return self._done(request, agent.transfer(request))

    def _wait(self, request: Any) -> None:
        while request is not None:
            request = self._done(request, self._agent.check_xfer_state(request))

    def _done(self, request: Any, state: str) -> Any:
        if state == "PROC":
            return request
        self._agent.release_xfer_handle(request)
        if state != "DONE":
            raise RuntimeError(f"nixl: {state}")
        return None


class BareNixlSleeping(_Nixl):
    """End that uses the bindings, with a progress thread that sleeps until UCX has an event."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self._nixl: Any = importlib.import_module("nixl_cu12._bindings")
        config = self._nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, _PROGRESS_US
        config.syncMode = self._nixl.NIXL_THREAD_SYNC_RW
        self._agent = self._nixl.nixlAgent(secrets.token_hex(8), config)
        self._handles = [self._agent.createBackend("UCX", {})]
        row = (pool.address, pool.nbytes, 0, b"")
        self._agent.registerMem(self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [row]), self._handles)

    def card(self) -> bytes:
        return bytes(self._agent.getLocalMD())

    def meet(self, card: bytes) -> None:
        self._peer = bytes(self._agent.loadRemoteMD(card)).decode()
        self._agent.makeConnection(self._peer, self._handles)

    def _post(self, src: U64, dst: U64, length: U64) -> Any:
        nixl = self._nixl
        local = nixl.nixlXferDList(nixl.DRAM_SEG, _rows(src, length))
        remote = nixl.nixlXferDList(nixl.DRAM_SEG, _rows(dst, length))
        request = self._agent.createXferReq(nixl.NIXL_WRITE, local, remote, self._peer, b"", self._handles)
        return self._done(request, self._agent.postXferReq(request, b""))

    def _wait(self, request: Any) -> None:
        while request is not None:
            request = self._done(request, self._agent.getXferStatus(request))

    def _done(self, request: Any, state: Any) -> Any:
        if state == self._nixl.NIXL_IN_PROG:
            return request
        self._agent.releaseXferReq(request)
        if state != self._nixl.NIXL_SUCCESS:
            raise RuntimeError(f"nixl: {state}")
        return None


def _rows(address: U64, length: U64) -> npt.NDArray[np.uint64]:
    rows = np.zeros((address.size, 3), np.uint64)
    rows[:, 0], rows[:, 1] = address, length
    return rows


WAYS = [Way(*each) for each in itertools.product((64, 256, 1024), (1, 2))] + [Way()]
