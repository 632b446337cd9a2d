"""Mooncake's transfer engine driven bare over tcp: lists from arrays for each batch, one or several batches in flight.

A batch of 4,096 blocks breaks a session permanently, so the batches here are much smaller.
"""

from __future__ import annotations

import importlib
from collections import deque
from typing import Any

from kvroom.plan.blocks import Blocks
from kvroom.transports.kit.pool import Pool
from parts.ends import End, Way

WAYS = [Way(blocks, 0) for blocks in (16, 64, 128, 512)]
WAYS += [Way(16, 4), Way(64, 4), Way(128, 4), Way(512, 2)]


class BareMooncake(End):
    """One engine on each side."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self._engine: Any = importlib.import_module("mooncake.engine").TransferEngine()
        _demand(self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""))
        _demand(self._engine.register_memory(pool.address, pool.nbytes))
        self._peer = ""

    def card(self) -> bytes:
        return f"127.0.0.1:{self._engine.get_rpc_port()}".encode()

    def meet(self, card: bytes) -> None:
        self._peer = card.decode()

    def move(self, blocks: Blocks, way: Way) -> None:
        under_way: deque[int] = deque()
        for start in range(0, blocks.length.size, way.blocks):
            lists = [part[start : start + way.blocks].tolist() for part in blocks]
            if not way.depth:
                _demand(self._engine.batch_transfer_sync_write(self._peer, *lists))
                continue
            if len(under_way) >= way.depth:
                _demand(self._engine.get_batch_transfer_status([under_way.popleft()]))
            begun = self._engine.batch_transfer_async_write(self._peer, *lists)
            if begun in (0, -1):
                raise RuntimeError(f"mooncake refused a batch of {way.blocks} blocks")
            under_way.append(begun)
        for begun in under_way:
            _demand(self._engine.get_batch_transfer_status([begun]))

    def close(self) -> None:
        self._engine.unregister_memory(self.pool.address)
        self._engine = None


def _demand(code: int) -> None:
    if code != 0:
        raise RuntimeError(f"mooncake: code {code}")
