"""Pairs of real SGLang servers on this machine, the same prompts: SGLang's own `mooncake_tcp` against `kvroom`.

    make bench-sglang [ARGS="--rounds 3 --transport tcp"]

Each pair runs alone, in turns, prefill on the first core and decode on the second; both legs of a request are sent at
the same time, one request after the other, and every prompt is new to the caches. `mooncake_tcp` runs on the CPU with a
small plug-in, see `parts/sglang_baseline.py`. Times are medians over prompts, as a client sees them:

    first token        from the request to the first token of the decode side's stream
    after prefill      from the prefill side's reply, which comes when its transfer has ended, to that token
    cores used idle    processor time per second of all processes of a server that has nothing to do
    left after aborts  entries of rooms in the tables of both managers after requests whose clients left
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "vllm"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "sglang"))

import answers
import asking
import clients
import fleet
import servers

from parts import sglang_baseline

IDLE_S = 20
SETTLE_S = 70
AT_ONCE = 8
SALTS = itertools.count()
Figures = dict[str, float]
Makers = dict[str, Callable[[], servers.Fleet]]


def main() -> None:
    options = _arguments()
    if importlib.util.find_spec("sglang") is None:
        sys.exit("bench/sglang_pair.py needs SGLang, which has an environment of its own: run `make bench-sglang`")
    from kvroom.engine.weights import find

    model = find("packaged")
    prompts = sorted(answers.made(model), key=len)
    kinds = {"short": prompts[9:14], "long": prompts[-2:]}
    with tempfile.TemporaryDirectory(prefix="kvroom-bench-") as name:
        folder = Path(name)
        makers = _makers(model, folder, options.transport)
        found: dict[str, list[Figures]] = {name: [] for name in makers}
        idle = _idle_alone(model, folder)
        for turn in range(options.rounds):
            for backend in list(makers)[:: -1 if turn % 2 else 1]:
                pair = makers[backend]()
                with servers.running(*pair.servers):
                    print(f"round {turn + 1}: {backend} is up, load {os.getloadavg()[0]:.1f}", flush=True)
                    found[backend].append(_measure(pair, kinds, options, idle))
    show({name: {key: statistics.median(one[key] for one in each) for key in each[0]} for name, each in found.items()})


def _makers(model: Path, folder: Path, transport: str) -> Makers:
    plugin = folder / "plugin"
    sglang_baseline.install(plugin)
    path = {"PYTHONPATH": str(plugin)}

    def pair(name: str, **fields: Any) -> servers.Fleet:
        made = servers.new_fleet(model, folder, name, **fields)
        for core, server in zip(fleet.cores(), made.servers, strict=True):
            server.core = core
            server.env = {**path, sglang_baseline.COUNTS: str(folder / f"{server.name}.count")}
        return made

    return {
        "mooncake_tcp": lambda: pair("mooncake", backend="mooncake_tcp"),
        "kvroom": lambda: pair("kvroom", settings={"TRANSPORT": transport}),
    }


def _idle_alone(model: Path, folder: Path) -> float:
    """Return the cores that an idle server without prefill/decode disaggregation uses."""
    single = servers.Server("single", model, folder / "single.log", core=fleet.cores()[0])
    with servers.running(single):
        return _used([single])[0]


def _measure(
    pair: servers.Fleet, kinds: Mapping[str, Sequence[asking.Prompt]], options: argparse.Namespace, idle: float
) -> Figures:
    """Return all figures of one pair, which has just started."""
    figures: Figures = {}
    _ask(pair, kinds["short"][:2])  # first use is not measured
    for kind, asked in kinds.items():
        told = [one for _ in range(options.repeats) for one in _ask(pair, asked)]
        figures[f"first token, {kind} prompts, ms"] = 1e3 * statistics.median(decode.first_s for _, decode in told)
        after = statistics.median(decode.first_s - prefill.took_s for prefill, decode in told)
        figures[f"  of it after prefill, {kind}, ms"] = 1e3 * after
    for server, cores in zip(pair.servers, _used(pair.servers), strict=True):
        figures[f"cores used idle, {server.role}"] = cores
        figures[f"  above a single server, {server.role}"] = cores - idle
    asyncio.run(_abort_many(pair, options.aborts))
    for server in pair.servers:
        figures[f"left after {options.aborts} aborts, {server.role}"] = _left(server)
    return figures


def _ask(pair: servers.Fleet, asked: Sequence[asking.Prompt]) -> list[tuple[asking.Answer, asking.Answer]]:
    """Send each prompt, one at a time, and return the answers of the prefill and the decode side."""
    told = []
    for prompt in asked:
        call = asking.both(pair.prefill, pair.decode, prompt, stream=True, salt=f"bench {next(SALTS)}")
        both = clients.run(call)
        if not all(one.right for one in both):
            raise SystemExit(f"{pair.decode.name} did not answer: {both}")
        told.append(both)
    return told


def _used(of: Sequence[servers.Server]) -> list[float]:
    """Return the CPU seconds per second of each server, all of its processes, with nothing to do."""
    before = [server.cpu_s() for server in of]
    time.sleep(IDLE_S)
    return [(server.cpu_s() - then) / IDLE_S for server, then in zip(of, before, strict=True)]


async def _abort_many(pair: servers.Fleet, number: int) -> None:
    """Send requests whose clients leave after 0 to 0.3 s, some at a time, and wait until both servers are idle."""
    prompt = answers.made(pair.prefill.model)[8]
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(at: int) -> None:
        async with slots:
            room = asking.new_room(pair.prefill)
            legs = [
                asyncio.create_task(asking.generate(server.url, prompt, room=room, stream=True, salt=f"abort {at}"))
                for server in pair.servers
            ]
            await asyncio.wait(legs, timeout=0.1 * (at % 4))
            for leg in legs:
                leg.cancel()
            await asyncio.gather(*legs, return_exceptions=True)

    await asyncio.gather(*(one(at) for at in range(number)))
    await asyncio.sleep(SETTLE_S)  # both backends keep rooms that wait for a partner for some time


def _left(server: servers.Server) -> float:
    """Return the entries of rooms that a server's manager still has."""
    if server.backend == "kvroom":
        said = server.rooms()
        counts: dict[str, int] = {**said["rooms"], **said["requests"]}
        return float(sum(counts.values()))
    counted = Path(server.env[sglang_baseline.COUNTS])
    for process in server.running.family():
        if "scheduler" in " ".join(process.cmdline()):
            process.send_signal(signal.SIGUSR2)
    fleet.wait_until(counted.exists, 30, server.running.said)
    return float(counted.read_text())


def show(found: dict[str, Figures]) -> None:
    """Print both columns, and the ratio of kvroom's figure to that of SGLang's own backend."""
    theirs, ours = found["mooncake_tcp"], found["kvroom"]
    print(f"{'':42}{'mooncake_tcp':>14}{'kvroom':>10}{'ratio':>8}")
    for key, value in theirs.items():
        ratio = f"{ours[key] / value:8.2f}" if value > 0 else f"{'-':>8}"
        print(f"{key:42}{value:14.3f}{ours[key]:10.3f}{ratio}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="how often each pair is started and measured")
    parser.add_argument("--repeats", type=int, default=4, help="how often each prompt is asked")
    parser.add_argument("--aborts", type=int, default=500, help="requests whose clients leave")
    parser.add_argument("--transport", default="auto", help="transport of kvroom")
    return parser.parse_args()


if __name__ == "__main__":
    main()
