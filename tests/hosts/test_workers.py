"""The command line on several hosts: real workers with a model, over each transport, and a router on a third host."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from engine.tiny import prompt, tiny
from serve.helpers import save_tiny_model

from .network import Network
from .starting import TRANSPORTS, Where, Worker, ended, environment, rooms_of, router_command, running, worker_command

torch.set_num_threads(1)  # the matrices are tiny

ROOMS = itertools.count(1)
NEW_TOKENS = 8
ROUTER_PORT = 30000
PORTS = ["--port", "8000", "--bootstrap-port", "8998"]
ROUTER_UP_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


class Pair(NamedTuple):
    """A prefill and a decode worker on two hosts."""

    network: Network
    transport: str
    prefill: Worker
    decode: Worker
    directory: tuple[str, int]

    def generate(self, ids: list[int]) -> Any:
        """Send one request to both workers from the host in the middle, as a router does; return decode's answer."""
        host, port = self.directory
        routed = {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": next(ROOMS)}
        body = {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS}, **routed}
        caller = self.network.middle
        with contextlib.closing(self.prefill.begin(caller, "POST", "/generate", body)) as waiting:
            status, answer = self.decode.ask(caller, "POST", "/generate", body)
            first = waiting.getresponse()
            assert (status, first.status) == (200, 200), (answer, first.read())
        return answer

    def check(self, *lengths: int) -> None:
        """Check that prompts of these lengths get the tokens of a single process."""
        for length in lengths:
            ids = list(prompt(length, seed=length))
            assert self.generate(ids)["output_ids"] == tiny().generate(ids, NEW_TOKENS)
        for worker in (self.prefill, self.decode):
            assert not rooms_of(worker, "?idle_within_s=20")["open"]


def places(network: Network, transport: str) -> tuple[Where, Where]:
    """Return where the workers listen; each transport has another form of address."""
    prefill, decode = network.prefill, network.decode
    return {
        "tcp": (Where("0.0.0.0", "prefill.test"), Where("0.0.0.0", "decode.test")),
        "nixl": (Where(prefill.address6), Where("::", decode.address6)),
        "mooncake": (Where(prefill.address), Where(decode.address)),
    }[transport]


@contextlib.contextmanager
def pair_of(network: Network, transport: str, model: Path, logs: Path) -> Iterator[Pair]:
    ours, theirs = places(network, transport)
    prefill = [*worker_command("prefill", ours, transport, model), *PORTS]
    decode = [*worker_command("decode", theirs, transport, model), "--port", "8000"]
    with running(logs, (network.prefill, prefill), (network.decode, decode)) as (first, second):
        yield Pair(network, transport, first, second, (ours.reached_by, int(first.ready.facts["bootstrap_port"])))


@pytest.fixture(scope="module", params=TRANSPORTS)
def pair(network: Network, model: Path, logs: Path, request: pytest.FixtureRequest) -> Iterator[Pair]:
    with pair_of(network, request.param, model, logs) as made:
        yield made


def test_tokens_equal_those_of_one_process(pair: Pair) -> None:
    pair.check(1, 33, 200)


def test_the_transport_is_the_one_that_was_asked_for(pair: Pair) -> None:
    pair.check(4)
    (how,) = rooms_of(pair.prefill)["peers"].values()
    assert re.match(pair.transport, how)


def test_through_the_router(pair: Pair, logs: Path) -> None:
    """The router gets addresses: behind a name whose first address is silent it finds no healthy worker."""
    middle = pair.network.middle
    workers = ("--prefill", pair.prefill.numeric_url, str(pair.directory[1]), "--decode", pair.decode.numeric_url)
    command = router_command(middle.address, ROUTER_PORT, *workers)
    ids = list(prompt(50, seed=50))
    body = {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS}}
    with ended(middle.start(command, environment(), log=logs / f"router-{pair.transport}")) as popen:
        middle.wait_for_http(middle.address, ROUTER_PORT, "/readiness", '"healthy_workers":2', ROUTER_UP_S)
        with contextlib.closing(middle.http(middle.address, ROUTER_PORT)) as connection:
            connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
        assert answer["output_ids"] == tiny().generate(ids, NEW_TOKENS)
        assert popen.poll() is None


@pytest.mark.parametrize("pair", ["tcp"], indirect=True)
def test_a_killed_host_comes_back_and_the_client_is_served(pair: Pair, model: Path, logs: Path) -> None:
    """The client of the open request gets one error, which names the lost link. This test is last: the pair dies."""
    network, (host, port) = pair.network, pair.directory
    lonely = {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": next(ROOMS)}
    body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 1}, **lonely}
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pair.decode.ask, network.middle, "POST", "/generate", body)
        rooms_of(pair.decode, "?phase=OFFERED&within_s=20")
        network.prefill.crash()
        try:
            status, answer = waiting.result(20)
        finally:
            network.prefill.boot()
    assert status >= 500
    assert "the link to" in json.dumps(answer)
    ours, _ = places(network, "tcp")
    with running(logs, (network.prefill, [*worker_command("prefill", ours, "tcp", model), *PORTS])) as (again,):
        pair._replace(prefill=again).check(20, 60)
