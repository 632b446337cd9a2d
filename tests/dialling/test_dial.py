"""Every address of a name is tried, and the first one that answers gets the connection."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from kvroom.dialling.dial import Dial, dial, in_turn
from kvroom.dialling.names import FoundAddress
from kvroom.errors import AuthenticationError
from kvroom.wire.address import HostPort, os_reason
from resolving import BOTH, needs_ipv6, resolver

WAIT_S = 20.0


@contextlib.contextmanager
def listening(host: str, port: int = 0) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        yield listener


@contextlib.contextmanager
def silent(host: str) -> Iterator[int]:
    """Yield a port that answers no connection, as behind a firewall: its backlog is full and never emptied."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
        listener.bind((host, 0))
        listener.listen(0)
        stack.enter_context(socket.create_connection(listener.getsockname()[:2]))
        yield listener.getsockname()[1]


def port_of(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_an_address_is_connected_to_without_a_resolver(host: str) -> None:
    with listening(host) as listener, resolver() as asked:
        with dial(HostPort(host, port_of(listener)), WAIT_S) as connection:
            assert connection.getpeername()[:2] == (host, port_of(listener))
            assert connection.getblocking()
            taken, _ = listener.accept()
            with taken:
                taken.sendall(b"here")
                assert connection.recv(4) == b"here"
        assert set(asked.asked) == {host}  # the system only reads it


@needs_ipv6
@pytest.mark.parametrize("host", BOTH)
def test_a_server_at_either_address_of_a_name_is_reached(host: str) -> None:
    with (
        listening(host) as listener,
        resolver({"both.test": BOTH}),
        dial(HostPort("both.test", port_of(listener)), WAIT_S) as connection,
    ):
        assert connection.getpeername()[0] == host


def test_an_address_that_does_not_answer_costs_a_moment() -> None:
    start_s = time.monotonic()
    with (
        silent("127.0.0.1") as port,
        listening("127.0.0.2", port),
        listening("127.0.0.3", port),
        resolver({"many.test": ("127.0.0.1", "127.0.0.2", "127.0.0.3")}),
        dial(HostPort("many.test", port), WAIT_S) as connection,
    ):
        assert connection.getpeername()[0] == "127.0.0.2"
    assert time.monotonic() - start_s < WAIT_S / 2


def test_the_first_that_answers_wins_however_late_it_was_tried() -> None:
    before = open_descriptors()
    addresses = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    with (
        silent("127.0.0.1") as port,
        listening("127.0.0.3", port),
        resolver({"many.test": addresses}),
        dial(HostPort("many.test", port), WAIT_S) as connection,
    ):
        assert connection.getpeername()[0] == "127.0.0.3"
    assert open_descriptors() == before


def test_when_none_answers_the_time_is_over() -> None:
    before = open_descriptors()
    late = r"timed out after 0\.1 s: no address answered"
    with silent("127.0.0.1") as port, pytest.raises(TimeoutError, match=late):
        dial(HostPort("127.0.0.1", port), 0.1)
    assert open_descriptors() == before


def test_when_all_refuse_the_reason_is_theirs() -> None:
    with listening("127.0.0.1") as listener:
        port = port_of(listener)
    before = open_descriptors()
    with resolver({"many.test": ("127.0.0.1", "127.0.0.2")}), pytest.raises(ConnectionRefusedError):
        dial(HostPort("many.test", port), WAIT_S)
    assert open_descriptors() == before


def test_different_reasons_are_all_told() -> None:
    with listening("127.0.0.1") as listener:
        port = port_of(listener)
    with resolver({"many.test": ("127.0.0.1", "255.255.255.255")}), pytest.raises(OSError, match="refused") as caught:
        dial(HostPort("many.test", port), WAIT_S)
    said = os_reason(caught.value)
    assert f"connection refused at 127.0.0.1:{port}" in said
    assert f" at 255.255.255.255:{port}" in said


def test_a_name_that_cannot_be_resolved_is_an_error() -> None:
    with pytest.raises(OSError, match=r"[Nn]ame") as caught:
        dial(HostPort("unknown.invalid", 1), WAIT_S)
    assert os_reason(caught.value) == "the host name cannot be resolved"


def test_a_slow_resolver_uses_up_the_time_and_no_more() -> None:
    late = r"timed out after 0\.1 s: the host name was not resolved"
    with resolver(slow=["slow.test"]), pytest.raises(TimeoutError, match=late):
        dial(HostPort("slow.test", 1), 0.1)


@pytest.mark.parametrize("host", ["slow.test", "127.0.0.1"])
def test_hanging_up_ends_a_dial_that_waits(host: str) -> None:
    before = open_descriptors()
    faults: list[OSError] = []

    def connect(call: Dial) -> None:
        try:
            call.connect().close()
        except OSError as error:
            faults.append(error)

    with silent("127.0.0.1") as port, resolver(slow=["slow.test"]) as asked:
        call = Dial(HostPort(host, port), 600)
        thread = threading.Thread(target=connect, args=(call,))
        thread.start()
        asked.wait_asked(host)
        call.hang_up()
        thread.join(WAIT_S)
        assert not thread.is_alive()
        call.hang_up()
    assert [os_reason(detail) for detail in faults] == ["operation canceled"]
    assert open_descriptors() == before


def test_hanging_up_before_it_begins_ends_it_as_well() -> None:
    with listening("127.0.0.1") as listener:
        call = Dial(HostPort("127.0.0.1", port_of(listener)), WAIT_S)
        call.hang_up()
        with pytest.raises(OSError, match="anceled"):
            call.connect()


def test_each_socket_is_prepared_before_it_connects() -> None:
    prepared: list[bool] = []

    def prepare(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.getpeername()
            prepared.append(False)
            return
        prepared.append(True)

    many = {"many.test": ("127.0.0.1", "127.0.0.2")}
    with silent("127.0.0.1") as port, listening("127.0.0.2", port), resolver(many):
        Dial(HostPort("many.test", port), WAIT_S, prepare).connect().close()
    assert prepared == [True, True]


def hello(connection: socket.socket) -> None:
    """Assert that the connection brings the greeting of `answering`."""
    said = connection.recv(5)
    if said != b"hello":
        raise AuthenticationError(f"it said {said!r}")


@contextlib.contextmanager
def answering(host: str, port: int, words: bytes) -> Iterator[int]:
    """Send `words` to the first connection; if empty, send nothing until the block is left."""
    with listening(host, port) as listener:
        over = threading.Event()

        def serve() -> None:
            try:
                connection, _ = listener.accept()
            except OSError:  # no connection came before the block was left
                return
            with connection:
                connection.sendall(words)
                over.wait(0 if words else WAIT_S)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield port_of(listener)
        finally:
            over.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(WAIT_S)


def test_where_another_program_answers_the_next_address_is_tried() -> None:
    before = open_descriptors()
    with (
        answering("127.0.0.1", 0, b"HTTP/1.1 400 Bad Request") as port,
        answering("127.0.0.2", port, b"hello"),
        resolver({"many.test": ("127.0.0.1", "127.0.0.2")}),
        Dial(HostPort("many.test", port), WAIT_S, greet=hello).connect() as connection,
    ):
        assert connection.getpeername()[0] == "127.0.0.2"
    assert open_descriptors() == before


def test_what_the_only_address_answers_is_told_as_it_is() -> None:
    with (
        answering("127.0.0.1", 0, b"HTTP/1.1 400") as port,
        pytest.raises(AuthenticationError, match="it said b'HTTP/"),
    ):
        Dial(HostPort("127.0.0.1", port), WAIT_S, greet=hello).connect()


def test_hanging_up_ends_a_greeting() -> None:
    begun = threading.Event()

    def greet(connection: socket.socket) -> None:
        begun.set()
        hello(connection)

    with answering("127.0.0.1", 0, b"") as port:
        call = Dial(HostPort("127.0.0.1", port), WAIT_S, greet=greet)

        def hang_up() -> None:
            begun.wait(WAIT_S)
            call.hang_up()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(AuthenticationError, match="it said b''"):
            call.connect()
        thread.join(WAIT_S)


def test_families_are_tried_in_turn() -> None:
    def found(*hosts: str) -> list[FoundAddress]:
        return [FoundAddress(socket.AF_INET6 if ":" in host else socket.AF_INET, 0, 0, "", (host, 1)) for host in hosts]

    given = found("fd00::1", "fd00::2", "fd00::3", "10.0.0.1")
    assert [each.address[0] for each in in_turn(given)] == ["fd00::1", "10.0.0.1", "fd00::2", "fd00::3"]
    assert in_turn([]) == []
