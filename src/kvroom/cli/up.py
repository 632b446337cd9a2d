"""`kvroom up`: workers and router together, until Ctrl-C or until one of them ends."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping

from kvroom.cli.cluster import cluster
from kvroom.cli.interrupts import run_until_interrupted
from kvroom.cli.ready import Ready
from kvroom.cli.router import without_proxies
from kvroom.http import target
from kvroom.network import load_api_keys


def run_up(options: argparse.Namespace) -> int:
    """Serve until interrupted. Raises `ChildEnded` when a worker or the router ends by itself."""
    run_until_interrupted(_up(options))
    print("kvroom up: everything has ended", file=sys.stderr)
    return 0


async def _up(options: argparse.Namespace) -> None:
    def show(name: str, line: str) -> None:
        if options.verbose or name != "router":
            print(f"[{name}] {line}", file=sys.stderr, flush=True)

    keys = load_api_keys(os.environ, options.api_key)
    running = cluster(
        options, prefills=options.prefill, decodes=options.decode, port=options.port, output=show, api_keys=keys
    )
    async with running as here:
        print(Ready("up", {"url": here.url, "model": here.model}).line(), flush=True)
        print(_hint(here.url, here.model, os.environ, with_key=bool(keys)), file=sys.stderr, flush=True)
        await here.children.guard(asyncio.get_running_loop().create_future())


def _hint(url: str, model: str, environ: Mapping[str, str], *, with_key: bool = False) -> str:
    directly = "--noproxy '*' " if len(without_proxies(environ)) < len(environ) else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    directly += "-H 'Authorization: Bearer KEY' " if with_key else ""
    ask = f"curl {directly}{target(url, '/v1/chat/completions')} -H 'Content-Type: application/json' -d '{body}'"
    return f"try: {ask}\nopen rooms: kvroom rooms {url}\nCtrl-C ends everything"
