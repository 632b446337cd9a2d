"""A wire of our own between two workers, which can be cut: TCP ports carried from one loopback address to another.

A worker listens on 127.0.0.1 and tells its peers another loopback address; there this wire listens, on the same port.
While it is cut, the wire loses nothing and delivers nothing: connections stay open and both ends receive no more bytes,
as behind a dead switch. When it is mended, it delivers the bytes that were in flight.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

import psutil

LOOPBACK = "127.0.0.1"
_PIECE_BYTES = 1 << 16


class Wire:
    """Begins whole. A context manager; all methods may be called from any thread but its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire", daemon=True)
        self._whole = asyncio.Event()
        self._whole.set()
        self._servers: dict[tuple[str, int], asyncio.Server] = {}
        self._carrying: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Wire:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def carry(self, host: str, ports: Sequence[int]) -> None:
        """From now on `host` is reachable at these ports, over this wire."""
        for port in ports:
            if (host, port) not in self._servers:
                self._run(self._listen(host, port))

    def cut(self) -> None:
        """Stop delivering bytes in both directions."""
        self._run(self._set(False))

    def mend(self) -> None:
        """Deliver bytes again, those held back first."""
        self._run(self._set(True))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _set(self, whole: bool) -> None:
        if whole:
            self._whole.set()
        else:
            self._whole.clear()

    async def _listen(self, host: str, port: int) -> None:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._carrying.add(task)
            try:
                await self._join(reader, writer, port)
            except asyncio.CancelledError:  # by `_close`; asyncio's server would log it as a fault
                writer.transport.abort()
            finally:
                self._carrying.discard(task)

        self._servers[host, port] = await asyncio.start_server(accept, host, port)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        await self._whole.wait()
        try:
            there, to_there = await asyncio.open_connection(LOOPBACK, port)
        except OSError:  # no process listens there now: the caller sees a closed connection
            writer.close()
            return
        try:
            await asyncio.gather(self._pump(reader, to_there), self._pump(there, writer))
        finally:
            to_there.transport.abort()
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(_PIECE_BYTES):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
            await self._whole.wait()
            writer.write_eof()
        except OSError:  # broken, not ended: so is the other half
            await self._whole.wait()
            writer.transport.abort()

    async def _close(self) -> None:
        for server in self._servers.values():
            server.close()
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)


def listening_ports(pid: int) -> list[int]:
    """The TCP ports that a process listens on."""
    found = psutil.Process(pid).net_connections(kind="tcp")
    return sorted({one.laddr.port for one in found if one.status == psutil.CONN_LISTEN})
