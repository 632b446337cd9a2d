"""The handshake of a data connection, which the source dials in order to send data. `tcp` uses it, and packing does.

    source                                                    sink (listens)
      Hello: magic, source endpoint, sink endpoint, nonce  ->
                                                           <-  nonce, HMAC-SHA256(key, "sink" + hello + nonce)
      HMAC-SHA256(key, "source" + hello + nonce)           ->
                                                           <-  WELCOME

Instead of its nonce and proof, a sink that has no descriptor left for the connection sends BUSY, and a sink that is
not connected to this source sends UNKNOWN.

All integers are little-endian. An endpoint is a public key, and `key` is the key that the two ends share
(`data_keys`). Each end proves that it has the key, and only the two peers named in the hello have it, so each end has
proof of the other end's identity.
"""

from __future__ import annotations

import secrets
import socket
import struct
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from kvroom.errors import AuthenticationError, TransportError

from .data_keys import PROOF_BYTES, DataKey

MAGIC = b"kvroom\x00\x02"
WELCOME = b"\x01"
HELLO = struct.Struct("<8s32s32s32s")
CHALLENGE = struct.Struct("<32s32s")
BUSY = b"kvroom: this sink has no file descriptor left".ljust(CHALLENGE.size, b"\x00")
UNKNOWN = b"kvroom: this sink has not connected to the source".ljust(CHALLENGE.size, b"\x00")
_BUFFER_BYTES = 8 << 20


def _receive(connection: socket.socket, size: int, deadline_s: float) -> bytes:
    data = b""
    while len(data) < size:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("tcp: the handshake timed out")
        connection.settimeout(left_s)
        chunk = connection.recv(size - len(data))
        if not chunk:
            raise AuthenticationError("tcp: the peer closed the connection during the handshake")
        data += chunk
    return data


def greet(connection: socket.socket, key: DataKey, timeout_s: float) -> None:
    """Do the handshake of the side that dials. After an error, the caller must close the connection.

    Args:
        connection: The connection, just established.
        key: The key shared with the sink.
        timeout_s: The limit on the sink's answers, in seconds.

    Raises:
        AuthenticationError: The other end is not the sink, or it closed the connection.
        TransportError: The sink refuses this connection now.
        OSError: The connection was lost, or the handshake timed out.
    """
    deadline_s = time.monotonic() + timeout_s
    hello = HELLO.pack(MAGIC, key.own, key.peer, secrets.token_bytes(32))
    connection.sendall(hello)
    challenge = _receive(connection, CHALLENGE.size, deadline_s)
    if challenge == BUSY:
        raise TransportError(
            "the peer has too many open files and refuses new connections; raise its limit (ulimit -n)"
        )
    if challenge == UNKNOWN:
        raise TransportError("the peer has not connected to this side, or has fenced it")
    nonce, proof = CHALLENGE.unpack(challenge)
    if not key.is_proven(proof, b"sink", hello + nonce):
        raise AuthenticationError("tcp: the process at that address does not have the peer's key: it is another one")
    connection.sendall(key.proof(b"source", hello + nonce))
    if _receive(connection, 1, deadline_s) != WELCOME:
        raise AuthenticationError("tcp: the peer ended the handshake with an invalid byte")


def answer(
    connection: socket.socket, own: bytes, key_with: Callable[[bytes], DataKey | None], timeout_s: float
) -> bytes:
    """Do the handshake of the side that listens. After an error, the caller must close the connection.

    Args:
        connection: The accepted connection.
        own: This side's endpoint.
        key_with: Returns the key shared with a source that this side has connected to, and None for any other source.
            It may wait briefly, because the source may dial before this side has connected to it. That wait does not
            count towards `timeout_s`.
        timeout_s: The limit on each wait for the source, in seconds.

    Returns:
        The source's endpoint, which the source has proven to be its own.

    Raises:
        AuthenticationError: The other end is not a source that this side has connected to, or it closed the connection.
        OSError: The connection was lost, or the handshake timed out.
    """
    hello = _receive(connection, HELLO.size, time.monotonic() + timeout_s)
    magic, source, sink, _ = HELLO.unpack(hello)
    if magic != MAGIC or sink != own:
        raise AuthenticationError("tcp: the peer uses another protocol or dialled for another endpoint")
    key = key_with(source)
    if key is None:
        connection.sendall(UNKNOWN)
        raise AuthenticationError("tcp: this side has not connected to the writer, or has fenced it")
    nonce = secrets.token_bytes(32)
    connection.sendall(nonce + key.proof(b"sink", hello + nonce))
    proof = _receive(connection, PROOF_BYTES, time.monotonic() + timeout_s)
    if not key.is_proven(proof, b"source", hello + nonce):
        raise AuthenticationError("tcp: the writer does not have the key of the peer that it claims to be")
    connection.sendall(WELCOME)
    return bytes(source)


def tune(connection: socket.socket) -> None:
    """Configure a data socket: no Nagle delay, large buffers, and detection of a silent peer in about ten seconds."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    widen(connection)


def widen(connection: socket.socket) -> None:
    """Request large socket buffers if the system's cap allows them.

    Under a small cap the buffers keep their default, because setting any size turns off the kernel's own tuning.
    """
    for option, cap in ((socket.SO_RCVBUF, "rmem_max"), (socket.SO_SNDBUF, "wmem_max")):
        if _cap_bytes(cap) >= _BUFFER_BYTES // 2:
            connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)


@cache
def _cap_bytes(name: str) -> int:
    """Return the system's cap in bytes. It is read once, because at the descriptor limit no file can be opened."""
    return int(Path("/proc/sys/net/core", name).read_text())
