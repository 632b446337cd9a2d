"""Closing an asyncio server without losing a connection that is on its way to its protocol.

asyncio takes a connection over in three turns of the loop: the first accepts the socket, the second makes its
transport, the third calls `connection_made`. `Server.close` forgets those that are in between. One whose transport is
made after it meets a closed server: asyncio fails an internal assertion, says nothing, and drops the socket and half a
transport unclosed. One whose transport was made reaches its protocol after the owner has closed all that it knew of.

So listening ends first, then every connection that was accepted reaches its protocol, and only then the server is
closed. From there on the owner knows all of its connections. (`Server.close_clients`, from Python 3.13 on, closes the
transports of a server, but does not wait for those that are still to be made either.)
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

_TAKEOVER_TURNS = 2
"""Turns from the one that accepts a connection to the one that calls its `connection_made`."""


async def stop_accepting(server: asyncio.Server) -> None:
    """Close `server`, which belongs to the running loop. Idempotent.

    A peer that dials from the first moment on is refused. When this returns no further connection comes, and each one
    that was accepted has had its `connection_made`. It takes three turns of the loop and waits for no peer. If it is
    cancelled the server is closed all the same.
    """
    try:
        _stop_listening(server)
        await _turns(_TAKEOVER_TURNS)
    finally:
        server.close()
    await _turns(1)  # for a loop that listens without readers (uvloop): it accepted until now, and takes one turn


def _stop_listening(server: asyncio.Server) -> None:
    loop = asyncio.get_running_loop()
    for listener in server.sockets:
        with contextlib.suppress(NotImplementedError):  # a loop without readers
            if loop.remove_reader(listener):
                with contextlib.suppress(OSError):  # not every system refuses at a socket that was shut down
                    listener.shutdown(socket.SHUT_RDWR)


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)
