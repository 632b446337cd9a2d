"""SGLang's own routers in front of a cluster's workers: `sglang_router`, and the `mini_lb` in its package."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from kvroom.cli.ports import free_port

from .helpers import get

HERE = "127.0.0.1"
PATH = Path(sys.prefix) / "router"
"""The folder into which `make install` installs the package."""
START_S = 60


class Workers(NamedTuple):
    """The URLs of one worker of each role, and the port of the prefill worker's directory."""

    prefill: str
    bootstrap_port: int
    decode: str


@contextmanager
def sglang_router(workers: Workers) -> Iterator[str]:
    """Run SGLang's router in PD mode and yield its URL."""
    extra = ["--policy", "round_robin", "--worker-startup-check-interval", "1"]
    extra += ["--prometheus-host", HERE, "--prometheus-port", str(free_port(HERE))]
    with _launched(workers, [*extra, "--disable-retries", "--disable-circuit-breaker"], "/readiness") as url:
        yield url


@contextmanager
def mini_lb(workers: Workers) -> Iterator[str]:
    """Run SGLang's load balancer for tests and yield its URL."""
    with _launched(workers, ["--mini-lb"], "/health") as url:
        yield url


@contextmanager
def _launched(workers: Workers, extra: list[str], ready: str) -> Iterator[str]:
    assert (PATH / "sglang_router").is_dir(), f"sglang-router is not in {PATH}: run make install"
    port = free_port(HERE)
    command = [
        sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation", "--host", HERE, "--port", str(port),
        "--prefill", workers.prefill, str(workers.bootstrap_port), "--decode", workers.decode, *extra,
    ]  # fmt: skip
    path = os.pathsep.join([str(PATH), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+") as log:
        router = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            _wait(f"http://{HERE}:{port}", ready, router)
            yield f"http://{HERE}:{port}"
        except BaseException:
            log.seek(0)
            print(log.read()[-4000:])
            raise
        finally:
            router.kill()
            router.wait()


def _wait(url: str, path: str, router: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        with suppress(OSError):  # until it listens
            if get(url, path).status == 200:
                return
        with suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"the router at {url} ended with status {router.wait(timeout=0.05)}")
    raise AssertionError(f"the router at {url} is not ready after {START_S} s")
