"""Prefill workers, decode workers and the router as processes that can be killed, stopped and started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvroom.cli.cluster import wait_for_router
from kvroom.cli.ports import free_port
from kvroom.cli.processes import parse_ready
from serve.helpers import Response, command, environment, flush, look

from .wire import LOOPBACK, Wire, listening_ports

SECRET = "the secret of the workers under chaos"
END_S = 60
LOADED_S = 60
"""What a worker is given to come to a state of its own accord. Generous: the machine may be busy with other tests."""


class Worker:
    """A `kvroom prefill` or `kvroom decode`. A second `start` uses the ports of the first."""

    def __init__(
        self, role: str, arguments: Sequence[str], log: Path, wire: Wire | None = None, host: str = ""
    ) -> None:
        """Over a `wire`, its peers reach it by this `host` and no other way; router and clients always reach it."""
        self.role = role
        self._wire = wire
        self.host = host
        self.url = ""
        self.bootstrap_port = 0
        self._arguments = arguments
        self._log = log
        self._popen: subprocess.Popen[str] | None = None

    def launch(self) -> None:
        """Start it; `wait_ready` must follow."""
        ports = ["--port", self.url.rpartition(":")[2] or "0"]
        ports += ["--advertise-host", self.host] if self.host else []
        if self.role == "prefill":
            ports += ["--bootstrap-port", str(self.bootstrap_port)]
        with self._log.open("a") as log:  # a pipe without a reader would fill up and stop the worker
            self._popen = subprocess.Popen(
                command(self.role, *ports, "--parent-pid", str(os.getpid()), *self._arguments),
                env=environment(KVROOM_SECRET=SECRET), text=True, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip

    def wait_ready(self) -> None:
        """Read the ready line."""
        assert self._popen is not None
        assert self._popen.stdout is not None
        ready = parse_ready(self._popen.stdout.readline())
        if ready is None:
            raise AssertionError(f"the {self.role} worker did not get ready: {self.said()}")
        self.url = f"http://{LOOPBACK}:{ready.facts['url'].rpartition(':')[2]}"
        self.bootstrap_port = int(ready.facts.get("bootstrap_port", 0))
        if self._wire is not None:
            self._wire.carry(self.host, listening_ports(self.pid))

    def start(self) -> None:
        """Start it, on the ports that it had before, and wait until it serves."""
        self.launch()
        self.wait_ready()

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        self._reap()

    def stop(self) -> None:
        """SIGSTOP: it keeps its connections and says nothing more."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    @property
    def alive(self) -> bool:
        """Return True if its process runs or is stopped, and has not ended."""
        return self._popen is not None and self._popen.poll() is None

    def begin_to_end(self) -> None:
        """Ask it to end, in whatever state it is. `close` waits until it has."""
        if self.alive:
            self.go_on()
            os.kill(self.pid, signal.SIGTERM)

    def close(self) -> None:
        """End it, in whatever state it is, and wait."""
        if self._popen is not None:
            self.begin_to_end()
            self._reap()

    def said(self) -> str:
        """Return the end of its stderr."""
        return self._log.read_text()[-2000:]

    def rooms(self) -> dict[str, Any]:
        """Return the open rooms, as `/rooms` reports them."""
        body: dict[str, Any] = look(self.url, "/rooms").json()
        return body

    def wait_for(self, phase: str, within_s: float = LOADED_S) -> dict[str, Any]:
        """Wait until one of its rooms is in this phase; what was open then."""
        response = look(self.url, f"/rooms?phase={phase}&within_s={within_s:g}")
        assert response.status == 200, f"no {self.role} room came to {phase}: {response.text}\n{self.said()}"
        body: dict[str, Any] = response.json()
        return body

    def wait_until_unlinked(self, other: Worker) -> None:
        """Wait until it has given up the link to another worker. Asked again and again: only the worker sees it."""
        end = time.monotonic() + LOADED_S
        while any(peer.startswith(f"{other.host}:") for peer in self.rooms()["peers"]):
            assert time.monotonic() < end, f"the {self.role} side still has its link to {other.host}: {self.rooms()}"

    def assert_whole(self, within_s: float = LOADED_S) -> None:
        """Wait until no request and no room is left, and every page of the pool is free or only in the prefix cache.

        The cache is flushed, so that the next prompt is computed and moved as a whole, whatever came before.
        """
        response: Response = look(self.url, f"/rooms?idle_within_s={within_s:g}")
        assert response.status == 200, f"left open on the {self.role} side: {response.text}\n{self.said()}"
        left = response.json()
        assert left["open"] == []
        assert not any(left["rooms"].values()), left
        pool = left["pool"]
        assert (pool["free"] + pool["cached"], pool["owned"], pool["quarantined"]) == (pool["pages"], 0, 0)
        assert flush(self.url).json() == {"dropped_pages": pool["cached"]}

    def _reap(self) -> None:
        assert self._popen is not None
        self._popen.wait(END_S)
        assert self._popen.stdout is not None
        self._popen.stdout.close()


class Fleet:
    """Workers behind the real router. A context manager."""

    def __init__(self, prefills: Sequence[Worker], decodes: Sequence[Worker]) -> None:
        self.prefills = prefills
        self.decodes = decodes
        self.workers = [*prefills, *decodes]
        self.url = ""
        self._router: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Fleet:
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for worker in self.workers:
                worker.launch()
            for worker in self.workers:
                worker.wait_ready()
            self._start_router()
            undo.pop_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process."""
        if self._router is not None:
            self._router.kill()
            self._router.wait(END_S)
        for worker in self.workers:
            worker.begin_to_end()
        for worker in self.workers:
            worker.close()

    def heal(self) -> None:
        """Start what was killed and let go on what was stopped."""
        for worker in self.workers:
            if worker.alive:
                worker.go_on()
            else:
                worker.start()

    def assert_whole(self) -> None:
        """Nothing is left anywhere."""
        for worker in self.workers:
            worker.assert_whole()

    def _start_router(self) -> None:
        port = free_port(LOOPBACK)
        workers = [text for one in self.prefills for text in ("--prefill", one.url, str(one.bootstrap_port))] + [
            text for one in self.decodes for text in ("--decode", one.url)
        ]
        self._router = subprocess.Popen(
            command("router", "--port", str(port), "--parent-pid", str(os.getpid()), *workers),
            env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.url = f"http://{LOOPBACK}:{port}"
        asyncio.run(wait_for_router(self.url, len(self.workers)))
