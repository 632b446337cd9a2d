"""Servers at their descriptor limit refuse new work with a reason, keep the log short, and recover afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvroom.bootstrap import client
from kvroom.errors import BootstrapError, LinkError, TransportError
from kvroom.listening.descriptors import SpareDescriptor
from kvroom.plan.blocks import Blocks
from kvroom.runtime.link import Links
from kvroom.transports.tcp.frames import checked
from kvroom.transports.tcp.transport import TcpTransport
from kvroom.wire.address import parse_address
from kvroom_lab.pools import TestPool

from .crowded import FREE, Silent

WAIT_S = 20.0
ASKED = 100
SENTENCE = r"too many open files: this process may have {limit}; raise its limit \(ulimit -n\)"


class Crowded:
    """The process of `crowded.py`, and the connections that take its descriptors."""

    def __init__(self, kind: str, log: Path) -> None:
        self.log = log
        self._idle = contextlib.ExitStack()
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "listening.crowded", kind],
                cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            )  # fmt: skip
        assert self._process.stdout is not None
        limit, self.where = self._process.stdout.readline().decode().split()
        self.sentence = SENTENCE.format(limit=limit)
        self.began_s = time.monotonic()

    def fill(self, address: str) -> None:
        """Open silent connections until they have taken every descriptor and some were refused."""
        idle = [socket.create_connection(parse_address(address), WAIT_S) for _ in range(2 * FREE)]
        for connection in idle:
            self._idle.enter_context(connection)
        assert select.select(idle, [], [], WAIT_S)[0], "none of them was turned away"

    def empty(self) -> None:
        """Close the connections, which frees the descriptors."""
        self._idle.close()

    def lines(self) -> list[str]:
        """Return the lines of its log without records below WARNING."""
        return [line for line in self.log.read_text().splitlines() if not line.startswith("INFO")]

    def end(self) -> None:
        self.empty()
        self._process.communicate(timeout=WAIT_S)
        assert self._process.returncode == 0

    def check_log(self, times: int) -> None:
        """Assert at most one line a second, at least that many refusals in all, and no traceback."""
        lines = self.lines()
        assert 1 <= len(lines) <= time.monotonic() - self.began_s + 1
        assert all(re.search(self.sentence, line) for line in lines), lines
        counted = sum(int(found[1]) for line in lines if (found := re.search(r"\(and (\d+) more like this", line)))
        assert len(lines) + counted >= times or len(lines) == 1


@pytest.fixture
def crowded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Crowded]:
    """Yield the process, which must end by itself when its stdin is closed."""
    server = Crowded(request.param, tmp_path / "log")
    yield server
    server.end()


def ask(address: str, path: str) -> tuple[int, object]:
    """Send a GET on a new connection."""
    where = parse_address(address)
    with contextlib.closing(http.client.HTTPConnection(where.host, where.port, timeout=WAIT_S)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.getheader("Retry-After") == ("1" if response.status == 503 else None)
        body = response.read()
        return response.status, json.loads(body) if response.headers.get_content_subtype() == "json" else body.decode()


@pytest.mark.parametrize("crowded", ["site", "directory"], indirect=True)
def test_an_http_server_answers_503_and_says_why_until_descriptors_come_back(crowded: Crowded) -> None:
    crowded.fill(crowded.where)
    for _ in range(ASKED):
        status, body = ask(crowded.where, "/health")
        assert status == 503
        assert isinstance(body, dict)
        assert re.fullmatch(f"no new connection can be accepted: {crowded.sentence}", body["error"])
    crowded.check_log(times=ASKED)
    crowded.empty()
    deadline_s = time.monotonic() + WAIT_S
    while ask(crowded.where, "/health")[0] != 200:  # until the server has noticed that the other clients are gone
        assert time.monotonic() < deadline_s


@pytest.mark.parametrize("crowded", ["directory"], indirect=True)
def test_a_directory_at_its_limit_is_named_by_who_asks_it(crowded: Crowded) -> None:
    crowded.fill(crowded.where)
    with pytest.raises(
        BootstrapError,
        match=rf"directory {crowded.where} refused GET /route \(503\): it has reached a limit of open files",
    ):
        asyncio.run(client.lookup(crowded.where))


@pytest.mark.parametrize("crowded", ["links"], indirect=True)
def test_a_manager_refuses_links_and_takes_them_when_descriptors_come_back(crowded: Crowded) -> None:
    async def dial() -> None:
        links = Links(Silent(), identity=b"")
        await links.start()
        try:
            for _ in range(ASKED):
                with pytest.raises(LinkError, match=f"{crowded.where} accepts no new links now: .*{crowded.sentence}"):
                    await links.dial(crowded.where)
            crowded.check_log(times=ASKED)
            crowded.empty()
            deadline_s = time.monotonic() + WAIT_S
            while not links.peers:
                assert time.monotonic() < deadline_s
                with contextlib.suppress(LinkError):
                    await links.dial(crowded.where)
        finally:
            await links.close()

    crowded.fill(crowded.where)
    asyncio.run(dial())


@pytest.mark.parametrize("crowded", ["tcp"], indirect=True)
def test_a_sink_of_tcp_refuses_connections_and_takes_them_when_descriptors_come_back(crowded: Crowded) -> None:
    description = bytes.fromhex(crowded.where)
    sink = checked(description)
    crowded.fill(f"{sink.host}:{sink.port}")
    with contextlib.closing(TestPool()) as pool, contextlib.closing(TcpTransport()) as source:
        source.register(pool.layout.memory())
        block = Blocks(*(np.array([number], np.uint64) for number in (pool.layout.memory()[0].address, 0, 1)))
        peer = source.connect(description)
        refusals = 0
        deadline_s = time.monotonic() + WAIT_S
        while True:
            error = source.submit(peer, block, bytes(16)).exception(WAIT_S)
            assert isinstance(error, TransportError)
            if "the peer has too many open files and refuses new connections" not in str(error):
                break
            refusals += 1
            if refusals == ASKED:
                crowded.check_log(times=ASKED)
                crowded.empty()
            assert time.monotonic() < deadline_s
        assert refusals >= ASKED, error
        assert "the peer has not connected to this side" in str(error)  # accepted; only the route is unknown


@pytest.mark.parametrize("crowded", ["site"], indirect=True)
def test_what_a_client_makes_a_handler_raise_is_one_traceback_a_second(crowded: Crowded) -> None:
    for _ in range(ASKED):
        assert ask(crowded.where, "/fails")[0] == 500
    tracebacks = sum(line == "Traceback (most recent call last):" for line in crowded.lines())
    assert 1 <= tracebacks <= time.monotonic() - crowded.began_s + 1


def test_a_descriptor_that_was_lent_can_be_had_and_is_kept_back_again() -> None:
    spare = SpareDescriptor()
    assert spare.free()
    assert not spare.free()
    assert spare.reserve()
    assert spare.free()
    assert spare.reserve()
    spare.close()
    spare.close()
    assert not spare.free()
