"""Workers and router on this machine, as one block: they serve when it is entered and are gone when it is left.

`kvroom up` is that block, held until Ctrl-C or until one of them ends.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from kvroom.cli.interrupts import run_until_interrupted
from kvroom.cli.options import LOOPBACK, UpOptions, WorkerOptions, child_arguments
from kvroom.cli.ports import bound, port_of
from kvroom.cli.processes import Children, Output, Ready
from kvroom.cli.router import with_api_keys, without_proxies
from kvroom.errors import KVRoomError
from kvroom.http import http_fault, http_session, request, target
from kvroom.network import SECRET_FILE_VARIABLE, SECRET_VARIABLE, HostPort, load_api_keys

WORKER_START_S = 600.0
ROUTER_START_S = 60.0
_PROBE_EVERY_S = 0.05
_ROUTER = "router"


@dataclass(frozen=True)
class Cluster:
    """A running cluster. Clients use `url`; `admin_urls` are the workers', by name (`prefill-0`, `decode-0`, ...)."""

    url: str
    model: str
    admin_urls: dict[str, str]
    children: Children


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
    """Start everything on loopback and wait until the router sees every worker.

    `options` are those of every worker; `port` is the router's (0: a free one); clients need one of `api_keys`, if
    there are any. Raises `ConfigurationError` for a port in use and `ChildEnded` for a worker that could not start;
    nothing is left running then.
    """
    environ = with_api_keys(os.environ, api_keys)
    roles = [("prefill", index) for index in range(prefills)] + [("decode", index) for index in range(decodes)]
    with bound(LOOPBACK, port, "--port") as reserved:  # smg binds it again beside us
        where = HostPort(LOOPBACK, port_of(reserved))
        async with Children(output) as children:
            # They share a secret that only they know, and the cores.
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
                raise KVRoomError(f"not ready after {WORKER_START_S:g} s: {names}; start it alone to see why")
            ready = [await child.ready for child in workers]
            argv = [_ROUTER, "--host", where.host, "--port", str(where.port)]
            for role, facts in ready:
                argv += [f"--{role}", facts["url"], *([facts["bootstrap_port"]] if role == "prefill" else [])]
            await children.start(_ROUTER, argv, environ)
            await children.guard(wait_for_router(where.url(), len(workers)))
            urls = {child.name: facts.facts["admin_url"] for child, facts in zip(workers, ready, strict=True)}
            yield Cluster(where.url(), ready[0].facts["model"], urls, children)


async def wait_for_router(url: str, workers: int) -> None:
    """Until the router reports that many healthy workers; its own `/health` is good before it knows any.

    Raises `KVRoomError` with the router's last words after `ROUTER_START_S`.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + ROUTER_START_S
    said = "nothing"
    async with http_session(aiohttp.ClientTimeout(total=5)) as session:
        while loop.time() < deadline:
            try:
                async with request(session, "GET", url, "/readiness") as response:
                    said = await response.text()
                    if response.status == 200 and (await response.json()).get("healthy_workers") == workers:
                        return
            except aiohttp.ClientError as error:
                said = http_fault(error)
            except asyncio.TimeoutError:
                said = "nothing in time"
            await asyncio.sleep(_PROBE_EVERY_S)
    raise KVRoomError(f"the router at {url} did not find {workers} workers in {ROUTER_START_S:g} s; it said: {said}")


def run_up(options: UpOptions) -> int:
    """Serve until interrupted. Raises `ChildEnded` when a worker or the router ends by itself."""
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
    print("kvroom up: everything has ended", file=sys.stderr)
    return 0


def hint(url: str, model: str, environ: Mapping[str, str], *, with_key: bool = False) -> str:
    """Return the lines that tell a person what to try next: a request that works from this environment."""
    directly = "--noproxy '*' " if len(without_proxies(environ)) < len(environ) else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    directly += "-H 'Authorization: Bearer KEY' " if with_key else ""
    ask = f"curl {directly}{target(url, '/v1/chat/completions')} -H 'Content-Type: application/json' -d '{body}'"
    return f"try: {ask}\nopen rooms: kvroom rooms {url}\nCtrl-C ends everything"
