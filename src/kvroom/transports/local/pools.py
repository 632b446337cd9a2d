"""Sharing of pools with peers: a server passes their descriptors over an abstract Unix socket."""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import struct
from collections.abc import Sequence

from kvroom.listening.threads import AcceptThread
from kvroom.transports.kit.pool import Pool

HANDSHAKE_S = 2.0
FDS_AT_A_TIME = 64


def peer_uid(connection: socket.socket) -> int:
    """Return the user of the process at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


class PoolServer:
    """A server that passes the descriptors of shared pools to processes of the same user that send the token."""

    def __init__(self, name: str, token: bytes, pools: Sequence[Pool]) -> None:
        self._token = token
        self._fds = [pool.fd for pool in pools if pool.fd is not None]
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind("\0" + name)
        listener.listen(16)
        self._accepting = AcceptThread([listener], "kvroom-local-pools", self._take)

    def close(self) -> None:
        """Stop the server. Peers keep the pools that they have mapped."""
        self._accepting.close()

    def _take(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # the caller closed the connection
            connection.settimeout(HANDSHAKE_S)
            # Read the token even if the user is wrong: closing with unread data would reset the connection.
            token = connection.recv(len(self._token), socket.MSG_WAITALL)
            if peer_uid(connection) != os.getuid() or not hmac.compare_digest(token, self._token):
                return
            for start in range(0, len(self._fds), FDS_AT_A_TIME):
                socket.send_fds(connection, [b"+"], self._fds[start : start + FDS_AT_A_TIME])
