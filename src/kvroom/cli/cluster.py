"""Run workers and a router on this machine within one `async with` block.

The block is entered when all of them serve, and has ended every process when it is left. `kvroom up` holds the block
until Ctrl-C, or until one of the processes ends.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp

from kvroom.errors import KVRoomError
from kvroom.http import describe_http_error, http_session, request, target
from kvroom.network import SECRET_FILE_VARIABLE, SECRET_VARIABLE, HostPort, load_api_keys

from .interrupts import run_until_interrupted
from .options import LOOPBACK, UpOptions, WorkerOptions, child_arguments
from .ports import bound, port_of
from .processes import Child, Children, Output, Ready
from .router import with_api_keys, without_proxies

WORKER_START_S = 600.0
ROUTER_START_S = 60.0
_PROBE_EVERY_S = 0.05
_ROUTER = "router"


class StartedWorker(NamedTuple):
    """A worker of a cluster, with everything that it takes to start it again in the same place."""

    child: Child
    argv: Sequence[str]
    environ: Mapping[str, str]
    facts: Mapping[str, str]

    def argv_in_place(self) -> list[str]:
        """Return the arguments for a successor on the same ports."""
        argv = [*self.argv]
        for option, url in (("--port", self.facts["url"]), ("--admin-port", self.facts["admin_url"])):
            argv += [option, str(urlsplit(url).port)]
        port = self.facts.get("bootstrap_port")
        return argv if port is None else [*argv, "--bootstrap-port", port]


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    url: str
    """The router's URL, for clients."""
    model: str
    """The model's name in requests."""
    admin_urls: dict[str, str]
    """The workers' admin URLs by worker name (`prefill-0`, `decode-0`, ...)."""
    children: Children
    """The processes: the workers and the router."""
    workers: dict[str, StartedWorker]
    """The workers by name."""

    async def start_again(self, name: str) -> Child:
        """Start the worker `name`, which has ended, again on the same ports. Return before it is ready."""
        worker = self.workers[name]
        child = await self.children.start(name, worker.argv_in_place(), worker.environ)
        self.workers[name] = worker._replace(child=child)
        return child


@asynccontextmanager
async def cluster(
    options: WorkerOptions,
    *,
    prefills: int,
    decodes: int,
    port: int,
    output: Output,
    api_keys: Sequence[bytes] = (),
) -> AsyncIterator[Cluster]:
    """Start the workers and the router on loopback, and wait until the router reports every worker as healthy.

    Every worker gets `options`. `port` is the router's (0 for a free one). If `api_keys` is not empty, clients need one
    of them. Raises `ConfigurationError` for a port in use, `ChildEnded` for a worker that could not start, and
    `KVRoomError` for one that is not ready in time. After an error no process is left running.
    """
    environ = with_api_keys(os.environ, api_keys)
    roles = [("prefill", index) for index in range(prefills)] + [("decode", index) for index in range(decodes)]
    # The port stays bound here until the end, so that the system gives it to no outgoing connection. smg can bind it as
    # well, because this socket never listens (SO_REUSEADDR).
    with bound(LOOPBACK, port, "--port") as reserved:
        where = HostPort(LOOPBACK, port_of(reserved))
        async with Children(output) as children:
            # Without a secret of the operator the workers share a random one. Each gets an equal share of the cores:
            # with OpenMP's default every worker would start a thread for every core.
            mine = dict(environ)
            if options.secret_file is None and not {SECRET_VARIABLE, SECRET_FILE_VARIABLE} & set(environ):
                mine[SECRET_VARIABLE] = secrets.token_hex(32)
            mine.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(roles))))
            arguments = child_arguments(options)
            workers = [await children.start(f"{role}-{index}", [role, *arguments], mine) for role, index in roles]
            waiting = asyncio.wait([child.ready for child in workers], timeout=WORKER_START_S)
            _, late = await children.guard(waiting)
            if late:
                names = ", ".join(child.name for child in workers if child.ready in late)
                raise KVRoomError(
                    f"timed out after {WORKER_START_S:g} s: {names} not ready; start the worker alone to see why"
                )
            ready = [await child.ready for child in workers]
            argv = [_ROUTER, "--host", where.host, "--port", str(where.port)]
            for role, facts in ready:
                argv += [f"--{role}", facts["url"], *([facts["bootstrap_port"]] if role == "prefill" else [])]
            await children.start(_ROUTER, argv, environ)
            await children.guard(wait_for_router(where.url(), len(workers)))
            started = {
                child.name: StartedWorker(child, [role, *arguments], mine, facts)
                for child, (role, facts) in zip(workers, ready, strict=True)
            }
            urls = {name: worker.facts["admin_url"] for name, worker in started.items()}
            yield Cluster(where.url(), ready[0].facts["model"], urls, children, started)


async def wait_for_router(url: str, workers: int) -> None:
    """Wait until the router's `/readiness` reports `workers` healthy workers.

    smg's `/health` cannot be used: it answers 200 before the router has found any worker. After `ROUTER_START_S` this
    raises `KVRoomError` with the router's last answer.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + ROUTER_START_S
    last = "none"
    async with http_session(aiohttp.ClientTimeout(total=5)) as session:
        while loop.time() < deadline:
            try:
                async with request(session, "GET", url, "/readiness") as response:
                    last = await response.text()
                    if response.status == 200 and (await response.json()).get("healthy_workers") == workers:
                        return
            except aiohttp.ClientError as error:
                last = describe_http_error(error)
            except asyncio.TimeoutError:
                last = "timed out"
            await asyncio.sleep(_PROBE_EVERY_S)
    raise KVRoomError(
        f"timed out after {ROUTER_START_S:g} s: the router at {url} did not find {workers} workers; last answer: {last}"
    )


def run_up(options: UpOptions) -> int:
    """Serve until interrupted. Raises `ChildEnded` when a worker or the router ends before that."""
    keys = load_api_keys(os.environ, options.api_key)

    def show(name: str, line: str) -> None:
        if options.verbose or name != _ROUTER:
            print(f"[{name}] {line}", file=sys.stderr, flush=True)

    async def serve() -> None:
        running = cluster(
            options, prefills=options.prefill, decodes=options.decode, port=options.port, output=show, api_keys=keys
        )
        async with running as here:
            print(Ready("up", {"url": here.url, "model": here.model}).line(), flush=True)
            print(hint(here.url, here.model, os.environ, with_key=bool(keys)), file=sys.stderr, flush=True)
            await here.children.guard(asyncio.get_running_loop().create_future())

    run_until_interrupted(serve())
    print("kvroom up: all processes have ended", file=sys.stderr)
    return 0


def hint(url: str, model: str, environ: Mapping[str, str], *, with_key: bool = False) -> str:
    """Return the lines that show what to try next, with a `curl` command that works in the environment `environ`."""
    directly = "--noproxy '*' " if len(without_proxies(environ)) < len(environ) else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    directly += "-H 'Authorization: Bearer KEY' " if with_key else ""
    ask = f"curl {directly}{target(url, '/v1/chat/completions')} -H 'Content-Type: application/json' -d '{body}'"
    return f"try: {ask}\nopen rooms: kvroom rooms {url}\nCtrl-C ends all processes"
