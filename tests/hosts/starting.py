"""Start options of every worker of these tests, and the query for its rooms, for all tests in one place."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from kvroom.cli.processes import Ready, parse_ready
from kvroom.wire.address import HostPort

from .network import Host

SECRET = "the secret of the workers on several hosts"
TRANSPORTS = ("tcp", "nixl", "mooncake")
ONE_SIDED = ("nixl", "mooncake")
ALLOWED = "10.77.0.0/24,fd77::/64,*.test"
"""The directories to which decode workers may be sent: those on the hosts of `network`."""
SIZES = ("--page-tokens", "4", "--pages", "128", "--chunk-tokens", "32")
TESTS = Path(__file__).resolve().parent.parent


class Where(NamedTuple):
    """The host at which a worker listens, and the one at which others reach it."""

    host: str
    advertise: str | None = None

    @property
    def reached_by(self) -> str:
        return self.advertise or self.host


def worker_command(role: str, where: Where, transport: str, model: Path) -> list[str]:
    """Return the command `kvroom prefill` or `kvroom decode` with its options."""
    advertise = [] if where.advertise is None else ["--advertise-host", where.advertise]
    trusted = ["--trusted-fabric"] if transport in ONE_SIDED else []
    allowed = ["--bootstrap-allow", ALLOWED] if role == "decode" else []
    given = ["--host", where.host, *advertise, "--transport", transport, *trusted, *allowed]
    return [role, *given, "--model", str(model), *SIZES]


def manager_options(where: Where, transport: str) -> dict[str, Any]:
    """Return the same options for a `KVManager` in a process of its own."""
    return {
        "host": where.host,
        "advertise_host": where.advertise,
        "transport": transport,
        "trusted_fabric": transport in ONE_SIDED,
        "secret": SECRET.encode(),
        "bootstrap_allow": ALLOWED,
    }


def router_command(host: str, port: int, *workers: str) -> list[str]:
    """Return the command of a router."""
    return [sys.executable, "-m", "kvroom", "router", "--host", host, "--port", str(port), *workers]


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of every worker: without a secret or proxy, one thread for matrices, tests importable."""
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("KVROOM_", "HTTP"))}
    paths = [str(TESTS), str(TESTS.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **changes}


class Worker:
    """One `kvroom` command on a host. `url` is the one that it printed."""

    def __init__(self, host: Host, popen: subprocess.Popen[str], ready: Ready) -> None:
        self.host, self.popen, self.ready = host, popen, ready

    @property
    def url(self) -> str:
        return self.ready.facts["url"]

    @property
    def numeric_url(self) -> str:
        """The worker's URL with the address of its host in place of a name."""
        return HostPort(*self._where()).url()

    def ask(self, caller: Host, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Return the status and the JSON of one request from a host. The test itself knows addresses, and no names."""
        with contextlib.closing(self.begin(caller, method, path, body)) as connection:
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def begin(self, caller: Host, method: str, path: str, body: Any = None) -> http.client.HTTPConnection:
        """Send a request from a host, and return the connection on which the answer will come."""
        connection = caller.http(*self._where())
        raw = None if body is None else json.dumps(body)
        connection.request(method, path, raw, {"Content-Type": "application/json"})
        return connection

    def _where(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.port is not None
        return self.host.address6 if ":" in (parts.hostname or "") else self.host.address, parts.port


def rooms_of(worker: Worker, query: str = "") -> dict[str, Any]:
    """Return the worker's description of its rooms and pool.

    The request comes from its own host, for the admin address.
    """
    where = urlsplit(worker.ready.facts["admin_url"])
    assert where.hostname is not None
    assert where.port is not None
    with contextlib.closing(worker.host.http(where.hostname, where.port)) as connection:
        connection.request("GET", f"/rooms{query}")
        response = connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
    assert response.status == 200, answer
    return answer


@contextlib.contextmanager
def running(logs: Path, *starts: tuple[Host, list[str]]) -> Iterator[list[Worker]]:
    """`kvroom` commands on hosts, started at the same time, until the block ends."""
    with contextlib.ExitStack() as stack:
        begun = []
        for number, (host, arguments) in enumerate(starts):
            log = logs / f"{arguments[0]}-{number}-{len(list(logs.iterdir()))}"
            command = [sys.executable, "-m", "kvroom", *arguments]
            popen = host.start(command, environment(KVROOM_SECRET=SECRET), log=log)
            begun.append((host, stack.enter_context(ended(popen)), log))
        workers = []
        for host, popen, log in begun:
            assert popen.stdout is not None
            ready = parse_ready(popen.stdout.readline())
            assert ready is not None, f"a worker did not get ready: {log.read_text()}"
            workers.append(Worker(host, popen, ready))
        yield workers


@contextlib.contextmanager
def ended(popen: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Kill a process that was started on a host when the block ends, if it still runs."""
    with popen:
        try:
            yield popen
        finally:
            assert popen.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it ended without reading everything
                popen.stdin.close()
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                children = Path(f"/proc/{popen.pid}/task/{popen.pid}/children").read_text().split()
                for pid in [*map(int, children), popen.pid]:  # nsenter passes no signal on
                    os.kill(pid, signal.SIGKILL)
