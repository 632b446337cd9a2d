"""Real vLLM servers and the real vllm-router as processes that tests can start, inspect, kill and end.

Every process group runs under `timeout`, so the processes of a test run that was killed end by themselves. This folder
is not a package, because a package with its name would hide vLLM from imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from kvroom.cli.ports import free_port
from kvroom.cli.router import without_proxies
from kvroom.wire.address import HostPort

LOOPBACK = "127.0.0.1"
DTYPE = "float32"
"""Exact enough that the size of a step does not change a token, and much faster than bfloat16 without AVX-512."""
START_S = 600
END_S = 30
POLL_S = 0.1
BIN = Path(sys.executable).parent
CONNECTOR = {"kv_connector": "KVRoomConnector", "kv_connector_module_path": "kvroom.adapters.vllm"}
LOGS: dict[Path, str] = {}
"""The names of the processes of this run, by log file."""
ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}


def kvroom_config(role: str, policy: str = "fail", **extra: Any) -> dict[str, Any]:
    """Return the `--kv-transfer-config` of kvroom's connector. `extra` goes into `kv_connector_extra_config`.

    All addresses are loopback and all ports free ones, unless `extra` sets others. The transport is that of the
    variable PAIR_TRANSPORT (`make test-vllm TRANSPORT=nixl`), else `auto`.
    """
    transport = os.environ.get("PAIR_TRANSPORT", "auto")
    defaults = {
        "transport": transport,
        "trusted_fabric": transport == "mooncake",  # it listens on every interface
        "host": LOOPBACK,
        "bootstrap_host": LOOPBACK,
        "bootstrap_port": free_port(LOOPBACK),
    }
    return {
        **CONNECTOR,
        "kv_role": ROLES[role],
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {**defaults, **extra},
    }


def nixl_config(role: str, policy: str = "fail") -> dict[str, Any]:
    """Return the configuration of vLLM's own NixlConnector over host memory."""
    return {
        "kv_connector": "NixlConnector",
        "kv_role": ROLES[role],
        "kv_load_failure_policy": policy,
        "kv_buffer_device": "cpu",
    }


def cores() -> tuple[int, int]:
    """Return a core for the prefill side and one for the decode side, the same one if there is only one."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[1 % len(usable)]


class Process:
    """A command in a process group of its own, with a log file and a deadline."""

    def __init__(self, name: str, command: Sequence[str], log: Path, deadline_s: float, **env: str) -> None:
        self.name = name
        self.log = log
        LOGS[log] = name
        bounded = ["timeout", "--kill-after=10", str(int(deadline_s)), *command]
        with log.open("a") as out:  # a pipe without a reader would fill up and block the process
            self._popen = subprocess.Popen(
                bounded, env={**environment(), **env}, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The process id of the group's leader."""
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def family(self) -> list[psutil.Process]:
        """Return the leader and all processes that it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self.pid)
            return [leader, *leader.children(recursive=True)]
        return []

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group, if it still exists."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL to the whole group and wait until all of its processes are gone."""
        family = self.family()
        self.signal(signal.SIGKILL)
        self._popen.wait(END_S)
        psutil.wait_procs(family, END_S)

    def end(self) -> None:
        """Send SIGTERM to the group, wait, and kill the processes that are left."""
        family = self.family()
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(END_S)
        psutil.wait_procs(family, END_S if self.alive else 1)
        self.kill()

    def said(self, last: int = 4000) -> str:
        """Return the end of the log."""
        return self.log.read_text(errors="replace")[-last:]

    def lines(self, *words: str) -> list[str]:
        """Return the lines of the log that contain all of these words."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if all(w in line for w in words)]


def environment() -> dict[str, str]:
    """Return this process's environment without settings of kvroom and vLLM, offline and without usage reports."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("KVROOM_", "VLLM_"))}
    return {**without_proxies(kept), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}


@dataclass
class Server:
    """One `vllm serve`. A second `launch` uses the port and the configuration of the first."""

    name: str
    model: Path
    config: Mapping[str, Any] | None
    """The `--kv-transfer-config`, or None for a server without connector."""
    log: Path
    core: int | None = 0
    """The core on which it runs, or None for all."""
    whole: bool = True
    """True if all of its processes stay on the core, False if only the worker does."""
    kv_gib: int = 1
    """The size of its KV pool."""
    arguments: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    deadline_s: float = 1800
    host: str = LOOPBACK
    port: int = field(default_factory=lambda: free_port(LOOPBACK))
    process: Process | None = None

    @property
    def url(self) -> str:
        return HostPort(self.host, self.port).url()

    @property
    def extra(self) -> Mapping[str, Any]:
        """The server's `kv_connector_extra_config`."""
        extra: Mapping[str, Any] = (self.config or {}).get("kv_connector_extra_config", {})
        return extra

    @property
    def running(self) -> Process:
        assert self.process is not None, f"{self.name} was not launched"
        return self.process

    def launch(self) -> None:
        """Start the server. `wait_ready` must follow."""
        assert self.process is None or not self.process.alive, f"{self.name} runs already"
        transfer = [] if self.config is None else ["--kv-transfer-config", json.dumps(self.config)]
        command = [
            *pinned(self.core if self.whole else None), str(BIN / "vllm"), "serve", str(self.model),
            "--served-model-name", "model", "--host", self.host, "--port", str(self.port), "--dtype", DTYPE,
            "--max-model-len", "2048", "--enforce-eager", "--max-num-seqs", "8", *transfer, *self.arguments,
        ]  # fmt: skip
        cpu = {
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "auto" if self.core is None else str(self.core),
        }
        self.process = Process(self.name, command, self.log, self.deadline_s, **{**cpu, **self.env})

    def wait_ready(self, within_s: float = START_S) -> None:
        """Wait until it answers /health. Fail with the end of its log if it ends or if it takes too long."""
        end = time.monotonic() + within_s
        while not answers(f"{self.url}/health"):
            assert self.running.alive, f"{self.name} ended while it started:\n{self.running.said()}"
            assert time.monotonic() < end, f"{self.name} was not ready in {within_s} s:\n{self.running.said()}"
            time.sleep(POLL_S)

    def start(self) -> None:
        self.launch()
        self.wait_ready()

    def kill(self) -> None:
        self.running.kill()

    def end(self) -> None:
        if self.process is not None:
            self.process.end()

    def cpu_s(self) -> float:
        """Return the CPU seconds of all its processes, including ended children that were waited for."""
        total = 0.0
        for process in self.running.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples with this name and these labels; 0 if there are none."""
        return sum(value for value, _ in self.samples(name, **labels))

    def samples(self, name: str, **labels: str) -> list[tuple[float, Mapping[str, str]]]:
        """Return value and labels of every sample with this name, spelled as in /metrics, with `_total`."""
        families = text_string_to_metric_families(get(f"{self.url}/metrics"))
        return [
            (sample.value, sample.labels)
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def kv_usage(self) -> float:
        """Return the part of its KV blocks that requests hold, from 0 to 1."""
        return self.metric("vllm:kv_cache_usage_perc")

    def rooms(self) -> dict[str, Any]:
        """Return the rooms of its first worker (`GET /rooms` of the status server)."""
        line = self.running.lines("rooms of rank", "http://")[-1]  # a server that was restarted has logged several
        body: dict[str, Any] = json.loads(get(f"http://{line.partition('http://')[2].split()[0]}/rooms"))
        return body

    def wait_for_usage(self, usage: float = 0.0, within_s: float = 60) -> None:
        """Wait until requests hold that part of its KV blocks."""
        wait_until(lambda: self.kv_usage() == usage, within_s, lambda: f"{self.name} holds {self.kv_usage()}")


def pinned(core: int | None) -> list[str]:
    return ["taskset", "-c", str(core)] if core is not None and shutil.which("taskset") else []


def wait_until(true: Any, within_s: float, or_say: Any) -> None:
    """Poll until `true()` is true. After `within_s` seconds, raise an AssertionError with the text of `or_say()`."""
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, f"not within {within_s} s: {or_say()}"
        time.sleep(POLL_S)


_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str, timeout_s: float = 30) -> str:
    with _DIRECTLY.open(url, timeout=timeout_s) as response:
        body: bytes = response.read()
        return body.decode()


def answers(url: str) -> bool:
    """Return True if a GET request is answered with 200."""
    try:
        get(url, timeout_s=5)
    except (OSError, urllib.error.HTTPError):
        return False
    return True


@dataclass
class Pair:
    """A prefill server and a decode server that hand over to each other."""

    prefill: Server
    decode: Server

    @property
    def servers(self) -> tuple[Server, Server]:
        return self.prefill, self.decode

    def start(self) -> None:
        """Start both at the same time and wait for both."""
        for server in self.servers:
            server.launch()
        for server in self.servers:
            server.wait_ready()

    def end(self) -> None:
        for server in self.servers:
            if server.process is not None:
                server.process.signal(signal.SIGTERM)
        for server in self.servers:
            server.end()

    def heal(self) -> None:
        """Start the servers that were killed."""
        killed = [server for server in self.servers if not server.running.alive]
        for server in killed:
            server.launch()
        for server in killed:
            server.wait_ready()


def kvroom_pair(
    model: Path, logs: Path, policy: str = "fail", name: str = "", prefill_gib: int = 1, decode_gib: int = 1,
    arguments: Sequence[str] = (), **extra: Any,
) -> Pair:  # fmt: skip
    """Return a producer for the first core and a consumer for the second.

    Their logs are `{name}prefill.log` and `{name}decode.log`.
    """
    first, second = cores()
    return Pair(
        Server(f"{name}prefill", model, kvroom_config("prefill", policy, **extra), logs / f"{name}prefill.log",
               core=first, kv_gib=prefill_gib, arguments=arguments),
        Server(f"{name}decode", model, kvroom_config("decode", policy, **extra), logs / f"{name}decode.log",
               core=second, kv_gib=decode_gib, arguments=arguments),
    )  # fmt: skip


def nixl_pair(
    model: Path, logs: Path, policy: str = "fail", name: str = "nixl-", arguments: Sequence[str] = ()
) -> Pair:
    """Return a pair like that of `kvroom_pair`, with vLLM's NixlConnector."""
    first, second = cores()

    def server(role: str, core: int) -> Server:
        side = {"VLLM_NIXL_SIDE_CHANNEL_HOST": LOOPBACK, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port(LOOPBACK))}
        log = logs / f"{name}{role}.log"
        return Server(f"{name}{role}", model, nixl_config(role, policy), log, core, env=side, arguments=arguments)

    return Pair(server("prefill", first), server("decode", second))


@contextlib.contextmanager
def running(pair: Pair) -> Iterator[Pair]:
    """Start a pair, and end it with the block."""
    try:
        pair.start()
        yield pair
    finally:
        pair.end()


@contextlib.contextmanager
def router(prefills: Sequence[Server], decodes: Sequence[Server], log: Path, *arguments: str) -> Iterator[str]:
    """Run vllm-router in front of these servers until the block ends, without retries. Yield its URL."""
    port = free_port(LOOPBACK)
    workers = [text for one in prefills for text in ("--prefill", one.url)]
    workers += [text for one in decodes for text in ("--decode", one.url)]
    command = [
        str(BIN / "vllm-router"), "--vllm-pd-disaggregation", *workers, "--host", LOOPBACK, "--port", str(port),
        "--policy", "round_robin", "--worker-startup-check-interval", "1", "--prometheus-host", LOOPBACK,
        "--prometheus-port", str(free_port(LOOPBACK)), "--disable-retries", "--disable-circuit-breaker", *arguments,
    ]  # fmt: skip
    process = Process("router", command, log, 1800)
    try:
        url = f"http://{LOOPBACK}:{port}"
        wait_until(lambda: answers(f"{url}/readiness") or not process.alive, 60, process.said)
        assert process.alive, f"the router ended while it started:\n{process.said()}"
        yield url
    finally:
        process.kill()
