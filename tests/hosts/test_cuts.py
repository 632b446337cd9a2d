"""The cable between two hosts is cut in one or both directions, during hand-offs and while idle: default settings."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from .managers import HALF, TOKENS, Managers, managers
from .network import Network
from .starting import ONE_SIDED, TRANSPORTS, Where

KNOWN_S = 12.0
BACK_S = 15.0
DRAIN_S = 3.0  # of one-sided transports, whose pages go to quarantine anyway; tcp has the default
ROOMS = itertools.count(1)
PAGES = itertools.cycle([[0, 1], [2, 3], [4, 5], [6, 7]])
CUTS = ("both ways", "prefill to decode", "decode to prefill")


class Ended(NamedTuple):
    """The end of a room of one transport on both sides; seconds since the cut."""

    prefill_s: float
    decode_s: float
    prefill: str
    decode: str


class Cut(NamedTuple):
    """All observations of one cut, by transport."""

    direction: str
    ended: dict[str, Ended]
    idle: Ended
    back_s: dict[str, float]
    quarantined: dict[str, dict[str, object]]
    held: dict[str, int]
    after: dict[str, tuple[str, str]]
    returned_s: dict[str, float]


class Pairs:
    """A manager of each transport on both hosts, and one more over tcp that is idle while the cable is cut."""

    def __init__(self, network: Network, prefill: Managers, decode: Managers) -> None:
        self.network, self.prefill, self.decode = network, prefill, decode
        self.directories: dict[str, str] = {}
        for name in (*TRANSPORTS, "idle"):
            transport = "tcp" if name == "idle" else name
            options = {"transport": transport, "drain_s": DRAIN_S if transport in ONE_SIDED else 10.0}
            where = Where(network.prefill.address), Where(network.decode.address)
            self.directories[name] = prefill.ask("open", name, role="prefill", where=where[0], **options)
            decode.ask("open", name, role="decode", where=where[1], **options)

    def begin(self, name: str, pages: list[int]) -> int:
        """Open a room and send half of it."""
        room = next(ROOMS)
        self.decode.ask("receive", name, room, pages, self.directories[name])
        self.prefill.ask("send", name, room, [3], HALF)
        assert self.decode.ask("receives", name, room)
        return room

    def hand_over(self, name: str) -> tuple[str, str]:
        """Hand over a whole request; return why it failed on either side, or twice "" if it did not."""
        room = self.begin(name, [10, 11])
        self.prefill.ask("send", name, room, [5], TOKENS)
        (_, failure, sent), (_, error, received) = (
            side.ask("outcome", name, room) for side in (self.prefill, self.decode)
        )
        for side in (self.prefill, self.decode):
            side.ask("clear", name, room)
        assert sent == received
        return failure, error

    def ended(self, name: str, room: int, cut_s: float) -> Ended:
        (at, words, _), (there, others, _) = (side.ask("outcome", name, room) for side in (self.prefill, self.decode))
        return Ended(at - cut_s, there - cut_s, words, others)

    def idle_ended(self, cut_s: float) -> Ended:
        addresses = [side.ask("address", "idle") for side in (self.decode, self.prefill)]
        (at, words), (there, others) = (
            side.ask("lost", peer, cut_s) for side, peer in zip((self.prefill, self.decode), addresses, strict=True)
        )
        return Ended(at - cut_s, there - cut_s, words, others)


@pytest.fixture(scope="module")
def pairs(network: Network, logs: Path) -> Iterator[Pairs]:
    with (
        managers(network.prefill, logs / "cuts-prefill") as prefill,
        managers(network.decode, logs / "cuts-decode") as decode,
    ):
        yield Pairs(network, prefill, decode)


@pytest.fixture(scope="module", params=CUTS)
def cut(request: pytest.FixtureRequest, pairs: Pairs) -> Cut:
    """Cut the cable during a hand-off, and observe until everything works again."""
    network, direction = pairs.network, request.param
    deaf = {"both ways": network.hosts[:2], CUTS[1]: (network.decode,), CUTS[2]: (network.prefill,)}[direction]
    assert pairs.hand_over("idle") == ("", "")
    pages = next(PAGES)
    rooms = {name: pairs.begin(name, pages) for name in TRANSPORTS}
    cut_s = time.monotonic()
    network.cut(*deaf)
    try:
        for name, room in rooms.items():
            pairs.prefill.ask("send", name, room, [5], TOKENS)
        ended = {name: pairs.ended(name, room, cut_s) for name, room in rooms.items()}
        idle = pairs.idle_ended(cut_s)
        back_s = {name: side.ask("released", "tcp", rooms["tcp"]) - cut_s
                  for name, side in (("prefill", pairs.prefill), ("decode", pairs.decode))}  # fmt: skip
        quarantined = {name: pairs.decode.ask("phase", name, rooms[name], "QUARANTINED") for name in ONE_SIDED}
        held = {name: pairs.decode.ask("quarantined", name) for name in TRANSPORTS}
    finally:
        network.heal()
    healed_s = time.monotonic()
    after = {name: pairs.hand_over(name) for name in (*TRANSPORTS, "idle")}
    returned_s = {name: pairs.decode.ask("released", name, rooms[name]) - healed_s for name in ONE_SIDED}
    for name, room in rooms.items():
        for side in (pairs.prefill, pairs.decode):
            side.ask("clear", name, room)
    found = Cut(direction, ended, idle, back_s, quarantined, held, after, returned_s)
    print(found)
    return found


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_both_sides_know_in_time(cut: Cut, transport: str) -> None:
    assert 0 < cut.ended[transport].prefill_s < KNOWN_S
    assert 0 < cut.ended[transport].decode_s < KNOWN_S


def test_idle_links_are_known_to_be_lost_in_time(cut: Cut) -> None:
    assert 0 < cut.idle.prefill_s < KNOWN_S
    assert 0 < cut.idle.decode_s < KNOWN_S


@pytest.mark.parametrize("name", [*TRANSPORTS, "idle"])
def test_each_side_says_what_it_knows(cut: Cut, name: str) -> None:
    """The side that receives nothing reports the silence; the other one reports that the connection was closed."""
    found = cut.idle if name == "idle" else cut.ended[name]
    silent, heard = (
        r"was silent for 1\d\.\d s",
        r"Connection reset by peer|the peer closed the connection|was silent for 1\d\.\d s",
    )
    prefill = heard if cut.direction == "prefill to decode" else silent
    decode = heard if cut.direction == "decode to prefill" else silent
    assert re.search(prefill, found.prefill)
    assert re.search(decode, found.decode)


def test_pages_are_back_in_time_over_tcp(cut: Cut) -> None:
    assert 0 < cut.back_s["decode"] < BACK_S
    assert 0 < cut.back_s["prefill"] < BACK_S
    assert cut.held["tcp"] == 0


@pytest.mark.parametrize("transport", ONE_SIDED)
def test_pages_that_may_be_written_are_quarantined_with_a_reason(cut: Cut, transport: str) -> None:
    said = cut.quarantined[transport]
    assert said["pages"] == 2
    assert re.search(r"the link to .* was lost|the transfer to", str(said["failure"]))
    assert cut.held[transport] == 2


@pytest.mark.parametrize("name", [*TRANSPORTS, "idle"])
def test_the_next_request_succeeds_when_the_cable_is_mended(cut: Cut, name: str) -> None:
    assert cut.after[name] == ("", "")


@pytest.mark.parametrize("transport", ONE_SIDED)
def test_quarantined_pages_are_back_on_the_word_of_the_source(cut: Cut, transport: str) -> None:
    assert cut.returned_s[transport] < 30
