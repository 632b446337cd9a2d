"""A decode worker queries only directories that its operator lists; a request that names another one gets a 400."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import SECRET, SIZES, Served
from .helpers import Process, assert_idle, begin_post, finish, get, look, post, running
from .test_contract import PATH, body_for, error_of

FOREIGN = ["10.9.9.9", "169.254.169.254", "prefill.example", "fd00::7", "::127.0.0.1"]


@pytest.fixture(scope="module")
def strict(model_dir: Path) -> Iterator[Process]:
    """Yield a decode worker whose list has a network that excludes its own host, and a pattern."""
    allow = ("--bootstrap-allow", "127.0.0.9/32,*.pd.svc", "--bootstrap-allow", "fd00::/8")
    with running("decode", "--model", str(model_dir), *SIZES, *allow, KVROOM_SECRET=SECRET) as process:
        yield process
        assert_idle([process.url])


@pytest.fixture
def victim() -> Iterator[socket.socket]:
    """Yield the port of a server on this machine that no worker may dial."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server
        with pytest.raises(BlockingIOError):
            server.accept()


def opened(url: str) -> str:
    """Return the line of /metrics that counts opened rooms."""
    (line,) = re.findall(r"^kvroom_rooms_opened_total .*", look(url, "/metrics").text, re.MULTILINE)
    return str(line)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("host", FOREIGN)
def test_an_address_beyond_loopback_is_400_at_once(served: Served, host: str, stream: bool) -> None:
    before = opened(served.decode)
    response = post(served.decode, PATH, body_for(served, bootstrap_host=host, stream=stream))
    assert response.status == 400, response.text
    assert "bootstrap address" in error_of(response)
    assert "is not allowed here and was not contacted" in error_of(response)
    assert "--bootstrap-allow" in error_of(response)
    assert opened(served.decode) == before


@pytest.mark.parametrize("host", ["127.0.0.1", "::ffff:127.0.0.1", "localhost", "LOCALHOST."])
def test_a_list_keeps_clients_away_from_the_workers_own_host(
    served: Served, strict: Process, victim: socket.socket, host: str
) -> None:
    """`localhost` is resolved, because the list has networks, and its address is in none of them."""
    body = body_for(served, bootstrap_host=host, bootstrap_port=victim.getsockname()[1])
    response = post(strict.url, PATH, body)
    assert response.status == 400, response.text
    assert "is not allowed here and was not contacted" in error_of(response)
    assert_idle([strict.url])


def test_the_other_legs_of_the_call_are_told(served: Served) -> None:
    """One of two prompts names a directory that is not listed: the prefill side of the other one is notified."""
    call = body_for(served, prompt=["Hello", "World"])
    rooms, port = [call["bootstrap_room"], call["bootstrap_room"] + 1], call["bootstrap_port"]
    both: dict[str, Any] = {"bootstrap_room": rooms, "bootstrap_port": [port, port]}
    with begin_post(served.prefill, PATH, {**call, **both, "bootstrap_host": ["127.0.0.1"] * 2}) as connection:
        assert look(served.prefill, "/rooms?phase=EXPECTED&within_s=10").status == 200
        response = post(served.decode, PATH, {**call, **both, "bootstrap_host": ["127.0.0.1", "10.9.9.9"]})
        assert response.status == 400, response.text
        prefilled = finish(connection)
    assert prefilled.status == 503
    assert "bootstrap address 10.9.9.9:" in error_of(prefilled)


def test_the_probe_comes_through_whatever_the_list_says(strict: Process) -> None:
    assert get(strict.url, "/health_generate").status == 200
