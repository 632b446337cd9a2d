"""A host that dies and comes back at its address, and one whose address another host takes over."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from .managers import HALF, TOKENS, Managers, managers
from .network import Host, Network
from .starting import ONE_SIDED, TRANSPORTS, Where

PORTS = {"port": 7001, "directory_port": 8998}
TIMES = {"heartbeat_s": 1.0, "drain_s": 1.0}
ROOMS = itertools.count(1)


class Decode:
    """The decode side of one transport, and whatever prefill host it hands over with."""

    def __init__(self, side: Managers, network: Network, transport: str) -> None:
        self.side, self.transport, self._network = side, transport, network
        self.directory = f"{network.prefill.address}:{PORTS['directory_port']}"
        side.ask("open", "one", role="decode", where=Where(network.decode.address), transport=transport, **TIMES)

    @contextlib.contextmanager
    def served_by(self, host: Host, log: Path, machine: str | None = None) -> Iterator[Managers]:
        """A prefill manager on `host`, at the address and the ports of the first prefill host."""
        with managers(host, log, machine) as prefill:
            where = Where(self._network.prefill.address)
            prefill.ask("open", "one", role="prefill", where=where, transport=self.transport, **PORTS, **TIMES)
            yield prefill

    def begin(self, prefill: Managers, pages: list[int]) -> int:
        """Open a room and move half of it."""
        room = next(ROOMS)
        self.side.ask("receive", "one", room, pages, self.directory)
        prefill.ask("send", "one", room, [3], HALF)
        assert self.side.ask("receives", "one", room)
        return room

    def hand_over(self, prefill: Managers, pages: list[int]) -> None:
        """Hand a whole request over; both sides succeed with the same bytes."""
        room = self.begin(prefill, pages)
        prefill.ask("send", "one", room, [5], TOKENS)
        (_, failure, sent), (_, error, received) = (side.ask("outcome", "one", room) for side in (prefill, self.side))
        assert (failure, error) == ("", "")
        assert sent == received

    def lost(self, room: int) -> str:
        """Return the reason of a room that lost its link."""
        _, failure, _ = self.side.ask("outcome", "one", room)
        assert "the link to" in failure
        return str(failure)


@pytest.fixture(params=TRANSPORTS)
def decode(network: Network, logs: Path, request: pytest.FixtureRequest) -> Iterator[Decode]:
    with managers(network.decode, logs / f"{request.node.name}-decode") as side:
        yield Decode(side, network, request.param)


@pytest.mark.parametrize("decode", ["tcp"], indirect=True)
def test_a_killed_host_comes_back_and_serves_the_next_request(network: Network, decode: Decode, logs: Path) -> None:
    name = f"killed-{decode.transport}"
    with decode.served_by(network.prefill, logs / name) as prefill:
        room = decode.begin(prefill, [0, 1])
        network.prefill.crash()
        try:
            decode.lost(room)
        finally:
            network.prefill.boot()
    decode.side.ask("released", "one", room)
    with decode.served_by(network.prefill, logs / f"{name}-again") as prefill:
        decode.hand_over(prefill, [2, 3])
        decode.hand_over(prefill, [4, 5])


@pytest.fixture(params=ONE_SIDED)
def one_sided(network: Network, logs: Path, request: pytest.FixtureRequest) -> Iterator[Decode]:
    with managers(network.decode, logs / f"{request.node.name}-decode") as side:
        yield Decode(side, network, request.param)


def test_a_worker_that_restarts_on_its_machine_proves_the_end_of_the_one_before(
    network: Network, one_sided: Decode, logs: Path
) -> None:
    decode, name = one_sided, f"restarted-{one_sided.transport}"
    with decode.served_by(network.prefill, logs / name) as prefill:
        room = decode.begin(prefill, [0, 1])
        prefill.kill()
        decode.lost(room)
        decode.side.ask("phase", "one", room, "QUARANTINED")
    with decode.served_by(network.prefill, logs / f"{name}-again") as prefill:
        decode.hand_over(prefill, [2, 3])
        decode.side.ask("released", "one", room)
        decode.hand_over(prefill, [0, 1])


def test_a_machine_that_boots_again_proves_the_end_of_everything_before(
    network: Network, one_sided: Decode, logs: Path
) -> None:
    """Its worker has another boot and other namespaces, so it can look nothing up: that it runs there is the proof.

    And it serves the next requests, into the pages that were free and into those that were held.
    """
    decode, name = one_sided, f"booted-{one_sided.transport}"
    with decode.served_by(network.prefill, logs / name, "node-1") as prefill:
        room = decode.begin(prefill, [0, 1])
        network.prefill.crash()
        try:
            decode.lost(room)
            decode.side.ask("phase", "one", room, "QUARANTINED")
        finally:
            network.prefill.boot()
    with decode.served_by(network.prefill, logs / f"{name}-again", "node-1") as prefill:
        decode.hand_over(prefill, [2, 3])
        decode.side.ask("released", "one", room)
        assert " is gone: " in decode.side.says()
        decode.hand_over(prefill, [0, 1])


def test_the_operator_frees_the_pages_that_a_dead_host_held(network: Network, one_sided: Decode, logs: Path) -> None:
    """A worker at the same address with another boot id may be on another machine: by itself that proves nothing."""
    decode, name, host = one_sided, f"fenced-{one_sided.transport}", network.prefill.address
    with decode.served_by(network.prefill, logs / name, "node-1") as prefill:
        room = decode.begin(prefill, [0, 1])
        (refused,) = decode.side.ask("fence", "one", host)
        assert refused["refused"].startswith(f"{host} is linked now, and a linked peer is never fenced")
        network.prefill.crash()
        try:
            decode.lost(room)
        finally:
            network.prefill.boot()
    with decode.served_by(network.prefill, logs / f"{name}-again", "node-2") as prefill:
        decode.hand_over(prefill, [2, 3])
        decode.hand_over(prefill, [4, 5])
        decode.side.ask("phase", "one", room, "QUARANTINED")
        (refused,) = decode.side.ask("fence", "one", "10.9.9.9")
        assert refused["refused"].startswith("no lost peer at 10.9.9.9; lost peers: ")
        (fenced,) = decode.side.ask("fence", "one", host)
        assert (fenced["pages"], fenced["proven"]) == (2, True)
        decode.side.ask("released", "one", room)
        decode.hand_over(prefill, [0, 1])


def test_the_operator_frees_the_pages_of_a_host_that_went_without_a_word(
    network: Network, one_sided: Decode, logs: Path
) -> None:
    """No FIN has come: our ends of its connections are open until this side ends them."""
    decode, name, host = one_sided, f"silent-{one_sided.transport}", network.prefill.address
    with decode.served_by(network.prefill, logs / name) as prefill:
        room = decode.begin(prefill, [0, 1])
        network.cut(network.decode)
        try:
            decode.lost(room)
            network.prefill.crash()
            decode.side.ask("phase", "one", room, "QUARANTINED")
            (fenced,) = decode.side.ask("fence", "one", f"{host}:{PORTS['port']}")
            assert (fenced["pages"], fenced["proven"]) == (2, True)
            decode.side.ask("released", "one", room)
        finally:
            network.heal()
            network.prefill.boot()


def test_a_stranger_at_an_old_address_frees_no_page(network: Network, decode: Decode, logs: Path) -> None:
    name, address = f"taken-{decode.transport}", network.prefill.address
    with decode.served_by(network.prefill, logs / name, "node-1") as prefill:
        room = decode.begin(prefill, [0, 1])
        network.take_over(network.middle, address, network.prefill)
        try:
            decode.lost(room)
            if decode.transport in ONE_SIDED:
                decode.side.ask("phase", "one", room, "QUARANTINED")
            else:
                decode.side.ask("released", "one", room)
            with decode.served_by(network.middle, logs / f"{name}-stranger", "node-2") as stranger:
                # Links keep the order: what the stranger said of the old room has come before it handed these over.
                decode.hand_over(stranger, [2, 3])
                decode.hand_over(stranger, [4, 5])
                assert decode.side.ask("keeps", "one", room) == (decode.transport in ONE_SIDED)
                assert decode.side.ask("quarantined", "one") == (2 if decode.transport in ONE_SIDED else 0)
                assert " is gone: " not in decode.side.says()
        finally:
            network.give_back(network.middle, address, network.prefill)
