"""A relay on a host between two others, as a program: it delays bytes, stops passing them, or closes connections.

It takes the place of netem, which not every kernel has. Connections that the kernel redirected here are passed on to
the host behind their original address. It reads one JSON object a line, `[method, arguments]`, and answers each with
one line.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys

_ORIGINAL_DESTINATION = 80  # SO_ORIGINAL_DST of netfilter
_CHUNK_BYTES = 1 << 16


class Relay:
    """Passes connections on. `hosts`: for each address that leads here, the host behind it."""

    def __init__(self, hosts: dict[str, str]) -> None:
        self._hosts = hosts
        self._delay_s = 0.0
        self._passing = asyncio.Event()
        self._passing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, port: int) -> asyncio.Server:
        return await asyncio.start_server(self._accepted, "0.0.0.0", port)

    def delay(self, seconds: float) -> None:
        """Hold every byte back for this time, in both directions."""
        self._delay_s = seconds

    def stall(self) -> None:
        """Pass nothing on, and keep every connection open."""
        self._passing.clear()

    def resume(self) -> None:
        """Undo `stall`."""
        self._passing.set()

    def drop(self) -> None:
        """Close every connection; later ones are passed on again."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw = writer.get_extra_info("socket").getsockopt(socket.SOL_IP, _ORIGINAL_DESTINATION, 16)
        port, address = struct.unpack_from("!2xH4s", raw)
        try:
            onward = await asyncio.open_connection(self._hosts[socket.inet_ntoa(address)], port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, onward[1]}
        for source, sink in ((reader, onward[1]), (onward[0], writer)):
            task = asyncio.create_task(self._pass(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        try:
            while chunk := await reader.read(_CHUNK_BYTES):
                await self._passing.wait()
                loop.call_later(self._delay_s, writer.write, chunk)
        except ConnectionError:
            writer.transport.abort()
        loop.call_later(self._delay_s, writer.close)
        self._writers.discard(writer)


async def main(port: int, hosts: dict[str, str]) -> None:
    """Answer until the test closes the pipe."""
    relay = Relay(hosts)
    async with await relay.listen(port):
        print(json.dumps("listening"), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            method, arguments = json.loads(line)
            getattr(relay, method)(*arguments)
            print(json.dumps(None), flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), json.loads(sys.argv[2])))
