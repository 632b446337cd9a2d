"""The handshake of a data connection, of `tcp` and of other connections that one side dials to send data over.

    source                                                    sink (listens)
      Hello: magic, source endpoint, sink endpoint, nonce  ->
                                                           <-  nonce, HMAC-SHA256(key, "sink" + hello + nonce)
      HMAC-SHA256(key, "source" + hello + nonce)           ->
                                                           <-  WELCOME
or instead of the nonce and its proof BUSY, from a sink that has no descriptor left for the connection, or UNKNOWN, from
one that is not connected to this source.

All integers are little-endian. An endpoint is a public key, and the key is the one that the two ends have in common
(`data_keys`): each proves that it has it, so each knows which peer the other one is.
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
            raise TimeoutError("tcp: the handshake took too long")
        connection.settimeout(left_s)
        chunk = connection.recv(size - len(data))
        if not chunk:
            raise AuthenticationError("tcp: the peer closed the connection during the handshake")
        data += chunk
    return data


def greet(connection: socket.socket, key: DataKey, timeout_s: float) -> None:
    """Handshake of the side that dials. Raise `AuthenticationError` or `OSError`, or `TransportError` if the sink does
    not take this connection now; then close the connection.
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
        raise AuthenticationError("tcp: what answers there does not have the peer's key; it is another process")
    connection.sendall(key.proof(b"source", hello + nonce))
    if _receive(connection, 1, deadline_s) != WELCOME:
        raise AuthenticationError("tcp: the peer answered the handshake with an unknown byte")


def answer(
    connection: socket.socket, own: bytes, key_with: Callable[[bytes], DataKey | None], timeout_s: float
) -> bytes:
    """Handshake of the side that listens; return the source's endpoint. Errors as in `greet`.

    `key_with` returns the key in common with a source that this side has connected to, None for any other. It may wait
    a moment for one that was faster; this time is not taken from that of the handshake.
    """
    hello = _receive(connection, HELLO.size, time.monotonic() + timeout_s)
    magic, source, sink, _ = HELLO.unpack(hello)
    if magic != MAGIC or sink != own:
        raise AuthenticationError("tcp: the peer speaks another protocol or looks for another endpoint")
    key = key_with(source)
    if key is None:
        connection.sendall(UNKNOWN)
        raise AuthenticationError("tcp: this side has not connected to the writer, or has fenced it")
    nonce = secrets.token_bytes(32)
    connection.sendall(nonce + key.proof(b"sink", hello + nonce))
    proof = _receive(connection, PROOF_BYTES, time.monotonic() + timeout_s)
    if not key.is_proven(proof, b"source", hello + nonce):
        raise AuthenticationError("tcp: the writer does not have the key of the peer that it says it is")
    connection.sendall(WELCOME)
    return bytes(source)


def tune(connection: socket.socket) -> None:
    """Set a data socket up: no Nagle delay, big buffers, a silent peer noticed within about ten seconds."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    widen(connection)


def widen(connection: socket.socket) -> None:
    """Ask for big socket buffers where the system's cap allows; a small fixed size is worse than its own tuning."""
    for option, cap in ((socket.SO_RCVBUF, "rmem_max"), (socket.SO_SNDBUF, "wmem_max")):
        if _cap_bytes(cap) >= _BUFFER_BYTES // 2:
            connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)


@cache
def _cap_bytes(name: str) -> int:
    """The system's cap, read once: at the descriptor limit an accepted connection must not need another descriptor."""
    return int(Path("/proc/sys/net/core", name).read_text())
