"""Hand-offs between hosts over every transport that crosses them, with every form of a worker's address."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from .managers import HALF, TOKENS, Managers, managers
from .network import Network
from .starting import TRANSPORTS, Where

ROOMS = itertools.count(1)
CASES = ("address", "name", "name of one address", "every interface", "ipv6", "every interface of ipv6", "one of each")
OWN = ("mooncake", "name")
"""Mooncake's data connections resolve a name by themselves, and try only its first address."""


@pytest.fixture(scope="module")
def sides(network: Network, logs: Path) -> Iterator[tuple[Managers, Managers]]:
    """A process on each of two hosts."""
    with (
        managers(network.prefill, logs / "addresses-prefill") as prefill,
        managers(network.decode, logs / "addresses-decode") as decode,
    ):
        yield prefill, decode


def places(network: Network) -> dict[str, tuple[Where, Where]]:
    """Return the hosts at which prefill and decode listen, by the name of the case."""
    prefill, decode = network.prefill, network.decode
    return {
        "address": (Where(prefill.address), Where(decode.address)),
        "name": (Where("0.0.0.0", "prefill.test"), Where("0.0.0.0", "decode.test")),
        "name of one address": (Where("0.0.0.0", "one.prefill.test"), Where("0.0.0.0", "one.decode.test")),
        "every interface": (Where("0.0.0.0", prefill.address), Where("0.0.0.0", decode.address)),
        "ipv6": (Where(prefill.address6), Where(decode.address6)),
        "every interface of ipv6": (Where("::", prefill.address6), Where("::", decode.address6)),
        "one of each": (Where("::", prefill.address), Where("0.0.0.0", decode.address)),
    }


def test_the_first_address_of_a_name_never_answers(network: Network) -> None:
    for host, name in ((network.prefill, "decode.test"), (network.decode, "prefill.test")):
        assert host.resolve(name)[0] == network.silent
        with pytest.raises(TimeoutError):
            host.connect(network.silent, 9, timeout_s=0.5)


@pytest.mark.parametrize(("transport", "case"), [each for each in itertools.product(TRANSPORTS, CASES) if each != OWN])
def test_a_request_is_handed_over(
    network: Network, sides: tuple[Managers, Managers], transport: str, case: str
) -> None:
    prefill, decode = sides
    ours, theirs = places(network)[case]
    name, room = f"{transport} {case}", next(ROOMS)
    directory = prefill.ask("open", name, role="prefill", where=ours, transport=transport)
    decode.ask("open", name, role="decode", where=theirs, transport=transport)
    decode.ask("receive", name, room, [5, 2], directory)
    prefill.ask("send", name, room, [3], HALF)
    prefill.ask("send", name, room, [7], TOKENS)
    _, failure, sent = prefill.ask("outcome", name, room)
    _, error, received = decode.ask("outcome", name, room)
    assert (failure, error) == ("", "")
    assert received == sent
