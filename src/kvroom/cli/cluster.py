"""Run workers and a router on this machine within one `async with` block.

The block is entered when all of them serve, and has ended every process when it is left. `kvroom up` holds the block
until Ctrl-C, or until one of the processes ends.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp

from kvroom.errors import ConfigurationError
from kvroom.http import describe_http_error, http_session, request, target
from kvroom.network import SECRET_FILE_VARIABLE, SECRET_VARIABLE, HostPort, load_api_keys, read_server_url

from .exit_status import ExitStatus
from .interrupts import run_until_interrupted
from .options import LOOPBACK, UpOptions, WorkerOptions, child_arguments
from .parser import without_variables
from .ports import bound, port_of
from .processes import Child, ChildEnded, Children, Output, Ready
from .router import with_api_keys, without_proxies

WORKER_START_S = 600.0
ROUTER_START_S = 60.0
_PROBE_EVERY_S = 0.05
_ROUTER = "router"
_UP = "up"
_COLUMNS = ("name", "role", "URL", "bootstrap", "admin URL", "pid", "log file")


class StartedWorker(NamedTuple):
    """A worker of a cluster, with everything that it takes to start it again in the same place."""

    child: Child
    """Its process."""
    argv: Sequence[str]
    """Its arguments, without ports."""
    environ: Mapping[str, str]
    """Its environment."""
    facts: Mapping[str, str]
    """The content of its ready line."""

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
    rows: tuple[tuple[str, ...], ...]
    """One row for each process, with the values of the columns of `started`."""
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
    log_dir: Path | None = None,
) -> AsyncIterator[Cluster]:
    """Start the workers and the router on loopback, and wait until the router reports every worker as healthy.

    Every worker gets `options`. `port` is the router's (0 for a free one). If `api_keys` is not empty, clients need one
    of them. The output of each process is appended to `NAME.log` in `log_dir`, which exists. `output` also gets lines
    of `up` that say what is waited for. Raises `ConfigurationError` for a port in use and for a log file that cannot be
    written, and `ChildEnded` for a worker that could not start or is not ready in time. After an error no process is
    left running.
    """
    environ = with_api_keys(without_variables(os.environ), api_keys)
    roles = [("prefill", index) for index in range(prefills)] + [("decode", index) for index in range(decodes)]
    # The port stays bound here until the end, so that the system gives it to no outgoing connection. smg can bind it as
    # well, because this socket never listens (SO_REUSEADDR).
    with bound(LOOPBACK, port, "--port") as reserved:
        where = HostPort(LOOPBACK, port_of(reserved))
        async with Children(output, log_dir) as children:
            # Without a secret of the operator the workers share a random one. Each gets an equal share of the cores:
            # with OpenMP's default every worker would start a thread for every core.
            mine = dict(environ)
            if options.secret_file is None and not {SECRET_VARIABLE, SECRET_FILE_VARIABLE} & set(environ):
                mine[SECRET_VARIABLE] = secrets.token_hex(32)
            mine.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(roles))))
            arguments = child_arguments(options)
            workers = [await children.start(f"{role}-{index}", [role, *arguments], mine) for role, index in roles]
            ready = await children.guard(_workers_ready(workers, output))
            argv = [_ROUTER, "--host", where.host, "--port", str(where.port)]
            for role, facts in ready:
                argv += [f"--{role}", facts["url"], *([facts["bootstrap_port"]] if role == "prefill" else [])]
            router = await children.start(_ROUTER, argv, environ)
            output(_UP, f"all workers are ready; waiting until the router finds them (at most {ROUTER_START_S:g} s)")
            await children.guard(wait_for_router(where.url(), len(workers)))
            rows = [_row(child, facts) for child, facts in zip(workers, ready, strict=True)]
            rows.append(_row(router, Ready(_ROUTER, {"url": where.url()})))
            running = {
                child.name: StartedWorker(child, [role, *arguments], mine, facts)
                for child, (role, facts) in zip(workers, ready, strict=True)
            }
            urls = {name: worker.facts["admin_url"] for name, worker in running.items()}
            yield Cluster(where.url(), ready[0].facts["model"], urls, children, tuple(rows), running)


async def _workers_ready(workers: Sequence[Child], output: Output) -> list[Ready]:
    """Wait for the ready line of every worker, and tell `output` which workers are missing whenever that changes.

    Raises `ChildEnded` after `WORKER_START_S`.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + WORKER_START_S
    late = list(workers)
    while late:
        names = ", ".join(child.name for child in late)
        output(_UP, f"waiting for {names} to import torch and load the model (at most {WORKER_START_S:g} s)")
        done, _ = await asyncio.wait(
            [child.ready for child in late], timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            raise ChildEnded(
                f"timed out after {WORKER_START_S:g} s: {names} not ready; start the worker alone to see why"
            )
        late = [child for child in late if not child.ready.done()]
    return [await child.ready for child in workers]


def _row(child: Child, ready: Ready) -> tuple[str, ...]:
    """Return the row of one process for `started`; "-" stands for what it does not have."""
    facts = ready.facts
    host = read_server_url(facts["url"]).host if "bootstrap_port" in facts else ""
    bootstrap = str(HostPort(host, int(facts["bootstrap_port"]))) if host else "-"
    admin = facts.get("admin_url", "-")
    return (child.name, ready.role, facts["url"], bootstrap, admin, str(child.pid), child.log_file or "-")


def started(rows: Sequence[Sequence[str]]) -> str:
    """Return the table of the started processes: one line for each, in aligned columns below their names."""
    lines = [_COLUMNS, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


async def wait_for_router(url: str, workers: int) -> None:
    """Wait until the router's `/readiness` reports `workers` healthy workers.

    smg's `/health` cannot be used: it answers 200 before the router has found any worker. After `ROUTER_START_S` this
    raises `ChildEnded` with the router's last answer.
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
    raise ChildEnded(
        f"timed out after {ROUTER_START_S:g} s: the router at {url} did not find {workers} workers; last answer: {last}"
    )


def run_up(options: UpOptions) -> int:
    """Serve until interrupted. Raises `ChildEnded` when a worker or the router ends before that."""
    log_dir = make_log_dir(options.log_dir)
    keys = load_api_keys(os.environ, options.api_key)

    def show(name: str, line: str) -> None:
        if options.verbose or name != _ROUTER:
            print(f"[{name}] {line}", file=sys.stderr, flush=True)

    async def serve() -> None:
        running = cluster(
            options, prefills=options.prefill, decodes=options.decode, port=options.port, output=show, api_keys=keys,
            log_dir=log_dir,
        )  # fmt: skip
        async with running as here:
            print(started(here.rows), file=sys.stderr, flush=True)
            print(Ready(_UP, {"url": here.url, "model": here.model}).line(), flush=True)
            print(hint(here.url, here.model, os.environ, with_key=bool(keys)), file=sys.stderr, flush=True)
            await here.children.guard(asyncio.get_running_loop().create_future())

    try:
        run_until_interrupted(serve())
    finally:
        if options.log_dir is None:
            with suppress(OSError):  # it is empty if no process was started, for example because the port is in use
                log_dir.rmdir()
    print(f"kvroom up: all processes have ended; their output is in {log_dir}", file=sys.stderr)
    return ExitStatus.DONE


def make_log_dir(given: str | None) -> Path:
    """Return the directory for log files, made if it is not there; without `given` a new temporary one, which stays.

    Raises `ConfigurationError` if it cannot be made.
    """
    if given is None:
        return Path(tempfile.mkdtemp(prefix="kvroom-up-"))
    path = Path(given)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "a file has this name" if isinstance(error, FileExistsError) else error.strerror
        raise ConfigurationError(f"--log-dir {given}: {reason}; give a directory that you can write") from None
    return path.absolute()


def hint(url: str, model: str, environ: Mapping[str, str], *, with_key: bool = False) -> str:
    """Return the lines that show what to try next, with a `curl` command that works in the environment `environ`."""
    directly = "--noproxy '*' " if len(without_proxies(environ)) < len(environ) else ""
    # Without a limit a small model may talk for minutes on a machine without a GPU.
    body = f'{{"model": "{model}", "max_tokens": 32, "messages": [{{"role": "user", "content": "Hello"}}]}}'
    directly += "-H 'Authorization: Bearer KEY' " if with_key else ""
    ask = f"curl {directly}{target(url, '/v1/chat/completions')} -H 'Content-Type: application/json' -d '{body}'"
    return f"try: {ask}\nopen rooms: kvroom rooms {url}\nCtrl-C ends all processes"
