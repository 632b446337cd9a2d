"""A client names the directory of its room. One that is not on the list is neither looked up nor dialled.

All sockets are real. The test determines the addresses of names, as an attacker might in a real network.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import pytest

from identities import PROMPT
from kvroom import KVBootstrapServer, KVManager, KVPoll
from kvroom.bootstrap import client
from kvroom.core.settings import Timeouts
from kvroom.dialling.allowed import AllowList
from kvroom.errors import AddressNotAllowed, ConfigurationError, LocalRoomError
from kvroom.wire.address import HostPort, parse_address
from kvroom_lab.pools import TestPool
from resolving import Resolver, needs_ipv6, resolver

SECRET = b"a secret that is long enough"
WAIT_S = 30.0
TOKENS = 11


@contextlib.contextmanager
def decoding(allow: str | Sequence[str] | None, **options: Any) -> Iterator[KVManager]:
    """Open a decode manager with this list. None of its rooms may leave anything behind."""
    with contextlib.closing(TestPool()) as pool:
        times = Timeouts(bootstrap_s=WAIT_S)
        given = {"transport": "tcp", "secret": SECRET, "timeouts": times, "bootstrap_allow": allow, **options}
        with KVManager(pool.layout, **given) as manager:
            yield manager
            assert manager.wait_idle(WAIT_S)
            assert manager.audit().empty


@contextlib.contextmanager
def victim(host: str = "127.0.0.1") -> Iterator[Callable[[], bool]]:
    """Listen at a port that no manager may dial; yield a function, with the `port`, that returns whether one did."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        server.setblocking(False)

        def was_dialled() -> bool:
            try:
                server.accept()[0].close()
            except BlockingIOError:
                return False
            return True

        was_dialled.port = server.getsockname()[1]  # type: ignore[attr-defined]
        yield was_dialled
        assert not was_dialled()


@pytest.mark.parametrize(
    ("allow", "host"),
    [
        ("127.0.0.9/32", "127.0.0.1"),
        ("127.0.0.9/32", "[::ffff:127.0.0.1]"),
        ("127.0.0.9/32", "[::FFFF:7f00:1]"),
        ("127.0.0.9/32", "0.0.0.0"),
        ("10.0.0.0/8,fd00::/8", "127.0.0.1"),
        ("*.pd.svc", "127.0.0.1"),
        ("*.pd.svc", "prefill.example"),
        ("*.pd.svc", "PREFILL.EXAMPLE."),
        ("*.pd.svc,10.0.0.4", "localhost"),
        (None, "prefill.example"),
        (None, "0.0.0.0"),
        ([], "127.0.0.1"),
    ],
)
def test_an_address_that_is_not_listed_fails_the_call_before_a_lookup(allow: Any, host: str) -> None:
    with resolver({"prefill.example": ["127.0.0.1"]}) as asked, victim() as dialled, decoding(allow) as manager:
        before = asked.asked.total()
        with pytest.raises(AddressNotAllowed) as refused:
            manager.receiver(f"{host}:{dialled.port}", 7, identity=PROMPT)  # type: ignore[attr-defined]
        assert "is not allowed here" in str(refused.value)
        assert "--bootstrap-allow" in str(refused.value)
        assert asked.asked.total() == before
        assert manager.metrics().counters.opened == 0


@pytest.mark.parametrize("text", ["127.1", "0", "0177.0.0.1", "0x7f000001", "2130706433", "127.0.0.1.."])
def test_a_spelling_that_is_no_address_fails_the_call(text: str) -> None:
    with resolver() as asked, decoding("127.0.0.0/8") as manager:
        before = asked.asked.total()
        with pytest.raises(LocalRoomError, match="bootstrap_addr: address"):
            manager.receiver(f"{text}:8998", 7, identity=PROMPT)
        assert asked.asked.total() == before


@pytest.mark.parametrize("found", [["127.0.0.1"], ["127.0.0.1", "127.0.0.3"], ["0.0.0.0"], ["::ffff:127.0.0.1"]])
def test_a_name_whose_addresses_are_not_listed_fails_the_room_at_once(found: list[str]) -> None:
    with (
        resolver({"prefill.example": found}),
        victim("0.0.0.0") as dialled,
        decoding(["127.0.0.9/32", "fd00::/8"]) as manager,
        manager.receiver(f"prefill.example:{dialled.port}", 7, identity=PROMPT) as receiver,  # type: ignore[attr-defined]
        pytest.raises(AddressNotAllowed) as refused,
    ):
        receiver.wait(WAIT_S / 3)  # long before its own deadline
    assert receiver.poll() is KVPoll.Failed
    assert "bootstrap address prefill.example:" in str(refused.value)
    assert "is not allowed here and was not contacted" in str(refused.value)
    assert "127.0.0.1" not in str(refused.value)


class Rebinding(Resolver):
    """A resolver whose names have other addresses at each lookup."""

    def __init__(self, name: str, answers: Sequence[str]) -> None:
        super().__init__({})
        self._name, self._answers = name, cycle(answers)

    def __call__(self, host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host != self._name:
            return super().__call__(host, port, *args, **options)
        self.asked[host] += 1
        return self._system(next(self._answers), port, *args, **options)


@contextlib.contextmanager
def prefilling(directory_host: str, **options: Any) -> Iterator[tuple[KVManager, TestPool, int]]:
    """Open a prefill manager with its directory; yield them with the directory's port."""
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(contextlib.closing(TestPool()))
        pool.fill(3)
        directory = stack.enter_context(KVBootstrapServer(directory_host, secret=SECRET))
        given = {"transport": "tcp", "secret": SECRET, "register_with": directory.address, **options}
        yield stack.enter_context(KVManager(pool.layout, **given)), pool, parse_address(directory.address).port


def hand_over(prefill: KVManager, decode: KVManager, told: str, room: int) -> None:
    with prefill.sender(room, identity=PROMPT) as sender, decode.receiver(told, room, identity=PROMPT) as receiver:
        receiver.send_metadata([5, 3, 1], tokens=TOKENS)
        sender.send([2, 4, 6], stop=TOKENS, last=True)
        receiver.wait(WAIT_S)
        sender.wait(WAIT_S)


@pytest.mark.parametrize("order", [["127.0.0.9", "127.0.0.1"], ["127.0.0.9", "127.0.0.1", "127.0.0.1"]])
def test_a_name_is_not_looked_up_again_between_the_list_and_the_dial(
    order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name server gives the first lookup a listed address and later ones the victim's."""
    names = Rebinding("rebind.example", order)
    with prefilling("127.0.0.9") as (prefill, _, port), decoding("127.0.0.9/32") as decode:
        monkeypatch.setattr(socket, "getaddrinfo", names)
        with socket.create_server(("127.0.0.1", port)) as server:  # the victim, at the directory's port
            server.setblocking(False)
            hand_over(prefill, decode, f"rebind.example:{port}", 7)
            assert names.asked["rebind.example"] == 1
            with pytest.raises(BlockingIOError):
                server.accept()


def test_of_a_name_with_several_addresses_only_those_that_are_listed_are_dialled() -> None:
    names = {"both.example": ["127.0.0.1", "127.0.0.8", "127.0.0.9"]}
    with (
        prefilling("127.0.0.9") as (prefill, _, port),
        decoding("127.0.0.9/32") as decode,
        resolver(names),
        socket.create_server(("127.0.0.1", port)) as first,
        socket.create_server(("127.0.0.8", port)) as second,
    ):
        hand_over(prefill, decode, f"both.example:{port}", 7)
        for server in (first, second):
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()


@needs_ipv6
@pytest.mark.parametrize(
    ("allow", "told"),
    [
        (None, "::1"),
        (None, "both.example"),
        ("::1/128", "[0:0::1]"),
        ("::1", "::1"),
        ("any", "both.example"),
        ("*.example", "BOTH.example."),
        ("both.EXAMPLE.", "both.example"),
        ("fd00::/8,::/64", "both.example"),
    ],
)
def test_what_is_listed_is_handed_over(allow: Any, told: str) -> None:
    options = {"advertise_host": "both.example"} if allow is None else {}
    with (
        resolver({"both.example": ["::1"]}),
        prefilling("::1") as (prefill, _, port),
        decoding(allow, host="::1", **options) as decode,
    ):
        hand_over(prefill, decode, str(HostPort.of(told, port)), 7)


def test_the_directory_that_a_manager_registers_with_is_always_allowed() -> None:
    """Exactly its address is allowed: no other port, and no other host."""
    with prefilling("127.0.0.9", bootstrap_allow=[]) as (both, _, port):
        both.receiver(f"127.0.0.9:{port}").clear()
        with pytest.raises(AddressNotAllowed):
            both.receiver(f"127.0.0.1:{port}")
        with pytest.raises(AddressNotAllowed):
            both.receiver("127.0.0.9:1")


ASKED: dict[str, Callable[..., Any]] = {
    "list": lambda where, allowed: client.listed(where, secret=SECRET, allowed=allowed),
    "rooms": lambda where, allowed: client.query_dp_ranks(where, [7], secret=SECRET, allowed=allowed),
}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "prefill.example", "[::ffff:127.0.0.1]"])
@pytest.mark.parametrize("question", ASKED)
def test_no_question_goes_to_an_address_that_is_not_listed(question: str, host: str) -> None:
    """Each kind of question checks the list by itself, with a network in it and without."""
    with resolver({"prefill.example": ["127.0.0.1"]}), victim() as dialled:
        for listed in (AllowList(["*.pd.svc"]), AllowList(["127.0.0.9/32"]), AllowList([])):
            with pytest.raises(AddressNotAllowed):
                asyncio.run(ASKED[question](f"{host}:{dialled.port}", listed))  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrong", ["10.0.0.1/8", ["*.pd.svc", "127.1"], "10.0.0.0/8,,any"])
def test_a_wrong_list_starts_nothing(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="of the bootstrap addresses"), decoding(wrong):
        pass
