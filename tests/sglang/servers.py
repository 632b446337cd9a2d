"""Real SGLang servers and real routers as processes that tests can start, inspect, kill and end.

The helpers for processes, waits and logs are those of tests/vllm (`fleet`). This folder is not a package, because a
package with its name would hide SGLang from imports. No module here has the name of one in tests/vllm, because the
modules of both folders are imported together.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fleet import LOOPBACK, START_S, Process, answers, get, pinned, wait_until
from prometheus_client.parser import text_string_to_metric_families

from kvroom.cli.ports import free_port
from kvroom.wire.address import HostPort

Role = Literal["single", "prefill", "decode"]
Dtype = Literal["float32", "bfloat16"]
POOL_TOKENS = 8192
CONTEXT_TOKENS = 2560
DEADLINE_S = 7200
"""The deadline that ends the processes of a run that was killed. A complete run is shorter and ends them itself."""
CPU = (
    "--device", "cpu", "--attention-backend", "torch_native", "--max-running-requests", "8", "--random-seed", "0",
    "--context-length", str(CONTEXT_TOKENS), "--skip-server-warmup", "--sleep-on-idle", "--enable-metrics",
)  # fmt: skip
ROLES: Mapping[Role, Sequence[str]] = {
    "single": (),
    "prefill": ("--disaggregation-mode", "prefill"),
    # By default, retracted requests are kept in memory that CUDA pins.
    "decode": ("--disaggregation-mode", "decode", "--disaggregation-decode-retraction-backup", "cpu_tensor"),
}
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_EXTERNAL_MODEL_PACKAGE": "one_model",
    # It would wait for a CUDA event.
    "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "0",
    "OMP_NUM_THREADS": "1",
}
ROUTER_PATH = Path(sys.prefix) / "router"


@dataclass
class Server:
    """One SGLang server. A second `launch` uses the ports and the settings of the first."""

    name: str
    model: Path
    log: Path
    role: Role = "single"
    dtype: Dtype = "float32"
    backend: str = "kvroom"
    """The value of --disaggregation-transfer-backend."""
    core: int | None = None
    """The core that it may use, or None for all."""
    tp: int = 1
    """The number of its ranks."""
    arguments: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    """The values of variables `KVROOM_...`, by name without that prefix."""
    env: Mapping[str, str] = field(default_factory=dict)
    deadline_s: float = DEADLINE_S
    host: str = LOOPBACK
    port: int = field(default_factory=lambda: free_port(LOOPBACK))
    bootstrap_port: int = field(default_factory=lambda: free_port(LOOPBACK))
    rooms_port: int = field(default_factory=lambda: free_port(LOOPBACK))
    process: Process | None = None

    @property
    def url(self) -> str:
        return HostPort(self.host, self.port).url()

    @property
    def running(self) -> Process:
        assert self.process is not None, f"{self.name} was not launched"
        return self.process

    def command(self) -> list[str]:
        """Return its command line."""
        transfer = [] if self.role == "single" else ["--disaggregation-transfer-backend", self.backend]
        directory = ["--disaggregation-bootstrap-port", str(self.bootstrap_port)] if self.role == "prefill" else []
        return [
            *pinned(self.core), sys.executable, "-m", "sglang.launch_server", "--model-path", str(self.model),
            "--served-model-name", "model", "--dtype", self.dtype, *CPU, "--max-total-tokens", str(POOL_TOKENS),
            "--host", self.host, "--port", str(self.port), "--tp-size", str(self.tp), *ROLES[self.role], *transfer,
            *directory, *self.arguments,
        ]  # fmt: skip

    def launch(self) -> None:
        """Start the server. `wait_ready` must follow."""
        assert self.process is None or not self.process.alive, f"{self.name} runs already"
        self.process = Process(self.name, self.command(), self.log, self.deadline_s, **self.environment())

    def environment(self) -> dict[str, str]:
        """Return the variables that the server gets in addition to this process's.

        All addresses are loopback, and the transport is that of the variable PAIR_TRANSPORT (`make test-sglang
        TRANSPORT=nixl`), unless `settings` has others.
        """
        kvroom = {"TRANSPORT": os.environ.get("PAIR_TRANSPORT", "auto"), "HOST": self.host}
        if kvroom["TRANSPORT"] == "mooncake":  # it listens on every interface
            kvroom["TRUSTED_FABRIC"] = "1"
        found = dict(ENVIRONMENT)
        if self.tp == 1:
            kvroom |= {"ROOMS_HOST": self.host, "ROOMS_PORT": str(self.rooms_port)}
        else:  # SGLang needs the cores of the ranks if there are more ranks on the CPU than NUMA nodes
            usable = sorted(os.sched_getaffinity(0))
            found["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(usable[n % len(usable)]) for n in range(self.tp))
        if self.role != "single":
            found.update({f"KVROOM_{key}": value for key, value in {**kvroom, **self.settings}.items()})
        return {**found, **self.env}

    def wait_ready(self, within_s: float = START_S) -> None:
        """Wait until it answers /health. Fail with the end of its log if it ends or if it takes too long."""
        wait_until(lambda: answers(f"{self.url}/health") or not self.running.alive, within_s, self.running.said)
        assert self.running.alive, f"{self.name} ended while it started:\n{self.running.said()}"

    def kill(self) -> None:
        """End all its processes with SIGKILL, and wait until they are gone."""
        self.running.kill()

    def end(self) -> None:
        """End the server, if it was started."""
        if self.process is not None:
            self.process.kill()

    def cpu_s(self) -> float:
        """Return the CPU seconds that its living processes have used so far."""
        times = [process.cpu_times() for process in self.running.family()]
        return sum(one.user + one.system for one in times)

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples at its /metrics with this name and these labels; 0 if there are none."""
        return _sum_at(self.url, name, labels)

    def counted(self, name: str, **labels: str) -> float:
        """Return the same sum of kvroom's metrics, from /metrics of its status server."""
        return _sum_at(HostPort(self.host, self.rooms_port).url(), name, labels)

    def load(self) -> dict[str, Any]:
        """Return the load of its first scheduler: `num_running_reqs`, `num_waiting_reqs`, `num_used_tokens`, ..."""
        body: dict[str, Any] = json.loads(get(f"{self.url}/v1/loads?include=all"))
        first: dict[str, Any] = body["loads"][0]
        return first

    def rooms(self) -> dict[str, Any]:
        """Return the rooms of its only rank (`GET /rooms` of its status server)."""
        body: dict[str, Any] = json.loads(get(HostPort(self.host, self.rooms_port).url("/rooms")))
        return body


def _sum_at(url: str, name: str, labels: Mapping[str, str]) -> float:
    families = text_string_to_metric_families(get(f"{url}/metrics"))
    samples = (sample for family in families for sample in family.samples if sample.name == name)
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


@dataclass
class Fleet:
    """Servers that hand over to each other: every prefill server to every decode server."""

    prefills: list[Server]
    decodes: list[Server]

    @property
    def prefill(self) -> Server:
        return self.prefills[0]

    @property
    def decode(self) -> Server:
        return self.decodes[0]

    @property
    def servers(self) -> list[Server]:
        return [*self.prefills, *self.decodes]

    def heal(self) -> None:
        """Start the servers that were killed."""
        start([server for server in self.servers if not server.running.alive])


def start(servers: Sequence[Server]) -> None:
    """Start all at the same time and wait for all."""
    for server in servers:
        server.launch()
    for server in servers:
        server.wait_ready()


@contextlib.contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Start the servers, and end them with the block."""
    try:
        start(servers)
        yield
    finally:
        end(servers)


def end(servers: Sequence[Server]) -> None:
    """End all at the same time."""
    for server in servers:
        if server.process is not None:
            server.process.signal(signal.SIGKILL)
    for server in servers:
        server.end()


def new_fleet(model: Path, logs: Path, name: str, prefills: int = 1, decodes: int = 1, **fields: Any) -> Fleet:
    """Return a fleet that is not started. `fields` are those of each server; logs are `{name}-prefill-0.log` etc."""

    def server(role: Role, number: int) -> Server:
        own = f"{name}-{role}-{number}"
        return Server(own, model, logs / f"{own}.log", role, **fields)

    return Fleet([server("prefill", n) for n in range(prefills)], [server("decode", n) for n in range(decodes)])


@contextlib.contextmanager
def smg(servers: Fleet, log: Path, *arguments: str) -> Iterator[str]:
    """Run smg in front of a fleet, without retries. Yield its URL."""
    with _router("smg.launch_router", servers, log, {}, "--disable-tokenizer-autoload", *arguments) as url:
        yield url


@contextlib.contextmanager
def sglang_router(servers: Fleet, log: Path, *arguments: str) -> Iterator[str]:
    """Run sglang-router, which is installed in a folder of its own, in front of a fleet. Yield its URL."""
    path = {"PYTHONPATH": str(ROUTER_PATH)}
    with _router("sglang_router.launch_router", servers, log, path, *arguments) as url:
        yield url


@contextlib.contextmanager
def _router(module: str, servers: Fleet, log: Path, env: Mapping[str, str], *arguments: str) -> Iterator[str]:
    port = free_port(LOOPBACK)
    workers: list[str] = []
    for one in servers.prefills:
        workers += ["--prefill", one.url, str(one.bootstrap_port)]
    for one in servers.decodes:
        workers += ["--decode", one.url]
    command = [
        sys.executable, "-m", module, "--pd-disaggregation", *workers, "--host", LOOPBACK, "--port", str(port),
        "--policy", "round_robin", "--worker-startup-check-interval", "1", "--prometheus-host", LOOPBACK,
        "--prometheus-port", str(free_port(LOOPBACK)), "--disable-retries", "--disable-circuit-breaker", *arguments,
    ]  # fmt: skip
    process = Process(module, command, log, DEADLINE_S, **env)
    try:
        url = f"http://{LOOPBACK}:{port}"
        wait_until(lambda: answers(f"{url}/readiness") or not process.alive, 60, process.said)
        assert process.alive, f"{module} ended while it started:\n{process.said()}"
        yield url
    finally:
        process.kill()
