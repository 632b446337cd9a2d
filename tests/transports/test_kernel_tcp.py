"""Proof, from the kernel's table, that no byte of a connection can arrive any longer: real sockets, dead processes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from transport_helpers import wait_until

from kvroom.transports.onesided import kernel_tcp

DIAL = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
connection.sendall(b"x" * 100)
print("connected", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["127.0.0.1", "::1"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    host = request.param
    try:
        made = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        pytest.skip(f"this machine cannot listen on {host}: {error}")
    with made:
        yield made


def test_bytes_are_unsent_until_the_reader_has_closed(listener: socket.socket) -> None:
    ports = frozenset([listener.getsockname()[1]])
    writer = socket.create_connection(listener.getsockname()[:2])
    reader, _ = listener.accept()
    writer.sendall(b"x" * 100)
    assert not kernel_tcp.unsent(ports)  # held by a descriptor: its process sees what arrives
    writer.close()
    assert kernel_tcp.unsent(ports)
    assert reader.recv(1000) == b"x" * 100
    assert kernel_tcp.unsent(ports)  # read, but the reader could not know that this was all
    reader.close()
    assert not kernel_tcp.unsent(ports)


def test_only_the_ports_in_question_count(listener: socket.socket) -> None:
    writer = socket.create_connection(listener.getsockname()[:2])
    reader, _ = listener.accept()
    writer.close()
    with reader:
        assert not kernel_tcp.unsent(frozenset([1]))


def test_what_a_dead_process_sent_is_unread_until_the_connection_is_closed(listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    ports = frozenset([port])
    command = [sys.executable, "-c", DIAL, host, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        reader, _ = listener.accept()
        assert process.stdout is not None
        assert process.stdout.readline() == b"connected\n"
        assert not kernel_tcp.unread(ports)
        process.kill()
        process.wait()
    assert kernel_tcp.unread(ports)
    reader.close()
    assert not kernel_tcp.unread(ports)


def test_listening_names_the_ports_of_this_process_only(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert port in kernel_tcp.listening()
    script = "import sys; from kvroom.transports.onesided import kernel_tcp; print(kernel_tcp.listening())"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert str(port) not in told.stdout
    with contextlib.closing(socket.create_connection(listener.getsockname()[:2])):
        wait_until(lambda: port in kernel_tcp.listening())


def test_a_socket_that_is_hung_up_is_read_to_its_end_and_then_closed(listener: socket.socket) -> None:
    host = listener.getsockname()[0]
    writer = socket.create_connection(listener.getsockname()[:2])
    reader, _ = listener.accept()
    other = socket.create_connection(listener.getsockname()[:2])
    spared, _ = listener.accept()
    with writer, reader, other, spared:
        writer.sendall(b"x" * 100)
        wait_until(lambda: len(reader.recv(200, socket.MSG_PEEK)) == 100)
        kernel_tcp.hang_up({os.fstat(reader.fileno()).st_ino})
        assert reader.recv(200) == b"x" * 100
        assert reader.recv(200) == b""
        other.sendall(b"y")
        assert spared.recv(1) == b"y"
    assert kernel_tcp.plain(f"::ffff:{host}" if "." in host else f"{host}%lo") == host
