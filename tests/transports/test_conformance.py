"""Every transport passes the conformance suite, with the sink in a process of its own wherever the transport can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvroom.plan.blocks import Blocks
from kvroom.testing import conformance
from kvroom.testing.conformance import CHECKS, Pair, run
from kvroom.testing.ends import Bytes, End, Host

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "memory": ("memory", {}),
    "tcp": ("tcp", {"introduction_s": 0.1}),
    "local-vm": ("local", {"mode": "vm"}),
    "local-shm": ("local", {"mode": "shm", "threads": 1, "shared": True}),
}
AUTO_CHECKS = (
    conformance.moves_scattered_unaligned_blocks,
    conformance.refuses_unregistered_destination,
    conformance.fences_and_connects_again,
    conformance.a_killed_peer_fails_transfers_and_is_fenced,
)


class Hosts:
    """One serving process for all checks; another one after a check that killed it."""

    def __init__(self) -> None:
        self._host: Host | None = None

    def get(self) -> Host:
        if self._host is None or not self._host.alive:
            self.close()
            self._host = Host()
        return self._host

    def close(self) -> None:
        if self._host is not None:
            self._host.close()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    yield hosts
    hosts.close()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_transport(check: Callable[[Pair], None], case: str, hosts: Hosts) -> None:
    name, options = CASES[case]
    run(check, None if name == "memory" else hosts.get(), name, **options)


@pytest.mark.parametrize("check", AUTO_CHECKS, ids=lambda check: check.__name__)
def test_auto(check: Callable[[Pair], None], hosts: Hosts) -> None:
    run(check, hosts.get(), "auto")


def test_all_transports_leave_the_same_bytes(hosts: Hosts) -> None:
    left: list[list[Bytes]] = []

    def transfer(pair: Pair) -> None:
        blocks = conformance.scattered(pair.source, pair.sink, 3_000, 2_500)
        pair.source.move(pair.to_sink, blocks, pair.grant())
        left.append(pair.sink.contents())

    for name, options in CASES.values():
        run(transfer, None if name == "memory" else hosts.get(), name, **options)
    assert len(left) == len(CASES)
    for contents in left[1:]:
        for pool, wanted in zip(contents, left[0], strict=True):
            assert np.array_equal(pool, wanted)


def test_the_suite_finds_a_transport_that_moves_too_much(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug in the source: every block one byte longer."""
    honest = End.begin

    def greedy(end: End, peer: int, blocks: Blocks, grant: bytes) -> int:
        return honest(end, peer, blocks._replace(length=blocks.length + np.uint64(1)), grant)

    monkeypatch.setattr(End, "begin", greedy)
    with pytest.raises(AssertionError):
        run(conformance.moves_one_byte, hosts.get(), "local")
