"""Pairs of real SGLang servers on this machine, the same prompts: SGLang's own mooncake_tcp against kvroom.

    make bench-sglang [ARGS="--rounds 1 --aborts 500"]

Each pair runs alone, prefill on the first core and decode on the second, in float32, and every answer is checked
against a single server's. Shown are medians over prompts; the time of a hand-off is the mean that SGLang's prefill
server reports (`sglang:kv_transfer_latency_ms`). After that clients leave at random moments, and what the servers still
hold then is counted. Mooncake's sender pins memory by CUDA; bench/parts/mooncake_on_cpu.py keeps it from that.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "vllm"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "sglang"))

import answers
import asking
import clients
import prompts
import servers
from fleet import cores

BACKENDS = ("mooncake_tcp", "kvroom")
SHORT_TOKENS, LONG_TOKENS = 32, 1500
IDLE_S = 20
SETTLE_S = 120
AT_ONCE = 8
LEAVES_WITHIN_S = 1.5
COPIES = "sglang:kv_transfer_latency_ms"
SALTS = (f"bench {number}" for number in itertools.count())
Figures = dict[str, float]


def main() -> None:
    options = _arguments()
    if importlib.util.find_spec("sglang") is None:
        sys.exit("bench/sglang_pair.py needs SGLang, which has an environment of its own: run `make bench-sglang`")
    from kvroom.engine.weights import find

    model = find("packaged")
    stories = [prompts.story(model, seed, LONG_TOKENS) for seed in range(2 * options.prompts)]
    asked = [
        [one[-SHORT_TOKENS - seed :] for seed, one in enumerate(stories[: options.prompts])],
        stories[options.prompts :],
    ]
    found: dict[str, list[Figures]] = {name: [] for name in BACKENDS}
    with tempfile.TemporaryDirectory(prefix="kvroom-bench-") as folder:
        logs = Path(folder)
        single = servers.Server("single", model, logs / "single.log", core=cores()[0])
        with servers.running(single):
            judge = answers.reference(single, [prompt for kind in asked for prompt in kind], close=0, at_once=1)
        for turn in range(options.rounds):
            for name in BACKENDS[:: -1 if turn % 2 else 1]:
                pair = _pair(model, logs, name, turn)
                with servers.running(*pair.servers):
                    print(f"round {turn + 1}: {name} is up", flush=True)
                    found[name].append(measure(pair, judge, asked, options.aborts))
    show({name: {key: statistics.median(one[key] for one in each) for key in each[0]} for name, each in found.items()})


def measure(
    pair: servers.Fleet, judge: answers.Judge, asked: Sequence[Sequence[asking.Prompt]], aborts: int
) -> Figures:
    """Return all figures of one pair, which has just started."""
    ask(pair, judge, asked[0][:2])  # what happens on first use is not measured
    figures: Figures = {}
    for kind, some in zip(("short", "long"), asked, strict=True):
        before = _copied(pair)
        given = ask(pair, judge, some)
        figures[f"first token, {kind} prompts, s"] = statistics.median(one.first_s for one in given)
        took_ms, count = (now - then for now, then in zip(_copied(pair), before, strict=True))
        figures[f"hand-off, {kind} prompts, ms"] = took_ms / count if count else float("nan")
    began = [server.cpu_s() for server in pair.servers]
    time.sleep(IDLE_S)
    for server, before_s in zip(pair.servers, began, strict=True):
        figures[f"cores used idle, {server.role}"] = (server.cpu_s() - before_s) / IDLE_S
    clients.run(leave(pair, judge, aborts))
    figures["seconds until idle after the clients left"] = settle(pair)
    for server in pair.servers:
        for what, count in held(server).items():
            figures[f"{what} after {aborts} left, {server.role}"] = count
    ask(pair, judge, asked[0][:2])
    return figures


def ask(pair: servers.Fleet, judge: answers.Judge, asked: Sequence[asking.Prompt]) -> list[asking.Answer]:
    """Ask each prompt, one at a time, as a stream and of both legs at once; the decode side's answers, checked."""
    given = []
    for prompt in asked:
        _, answer = clients.run(asking.both(pair.prefill, pair.decode, prompt, stream=True, salt=next(SALTS)))
        judge.check(prompt, answer)
        given.append(answer)
    return given


async def leave(pair: servers.Fleet, judge: answers.Judge, count: int) -> None:
    """Send requests of which both clients leave after a while, the same for both or, for some, only one of them."""
    draw = random.Random(1)
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(leg: str, after_s: float, room: dict[str, Any], prompt: asking.Prompt) -> None:
        url = {"prefill": pair.prefill.url, "decode": pair.decode.url}[leg]
        await asking.generate(url, prompt, room=room, stream=True, salt=room_salt(room), deadline_s=after_s)

    def room_salt(room: dict[str, Any]) -> str:
        return f"left {room['bootstrap_room']}"

    async def request() -> None:
        async with slots:
            room, prompt = asking.new_room(pair.prefill), draw.choice(judge.prompts)
            after_s = [draw.uniform(0.001, LEAVES_WITHIN_S)] * 2
            legs = zip(("prefill", "decode"), after_s, strict=True)
            await asyncio.gather(*(one(leg, late, room, prompt) for leg, late in legs if draw.random() < 0.9))

    await asyncio.gather(*(request() for _ in range(count)))


def settle(pair: servers.Fleet) -> float:
    """Wait until no server holds anything, at most `SETTLE_S`; the seconds that it took."""
    began = time.monotonic()
    while any(any(held(server).values()) for server in pair.servers) and time.monotonic() < began + SETTLE_S:
        time.sleep(0.5)
    return time.monotonic() - began


def held(server: servers.Server) -> Figures:
    """Return what a server holds of any request."""
    load = server.load()
    return {"requests": load["num_running_reqs"] + load["num_waiting_reqs"], "tokens": load["num_used_tokens"]}


def show(found: dict[str, Figures]) -> None:
    """Print both side by side."""
    theirs, ours = (found[name] for name in BACKENDS)
    print(f"{'':48}{BACKENDS[0]:>15}{BACKENDS[1]:>15}{'ratio':>8}")
    for key, figure in theirs.items():
        ratio = f"{ours[key] / figure:8.2f}" if figure else f"{'-':>8}"
        print(f"{key:48}{figure:15.3f}{ours[key]:15.3f}{ratio}")


def _copied(pair: servers.Fleet) -> tuple[float, float]:
    return pair.prefill.metric(f"{COPIES}_sum"), pair.prefill.metric(f"{COPIES}_count")


def _pair(model: Path, logs: Path, backend: str, turn: int) -> servers.Fleet:
    """Return a pair that is not started, each server on a core of its own."""
    env = {"PYTHONPATH": str(_plugin(logs))} if backend != "kvroom" else {}
    pair = servers.new_fleet(model, logs, f"{backend}-{turn}", backend=backend, env=env)
    for server, core in zip(pair.servers, cores(), strict=True):
        server.core = core
    return pair


def _plugin(folder: Path) -> Path:
    """Return a folder from which SGLang's processes load the plug-in for Mooncake, by an entry point as packages do."""
    path = folder / "plugin"
    about = path / "mooncake_on_cpu-0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mooncake_on_cpu\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[sglang.srt.plugins]\nmooncake_on_cpu = mooncake_on_cpu:register\n")
    shutil.copy(Path(__file__).resolve().parent / "parts" / "mooncake_on_cpu.py", path)
    return path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="how often each pair is started and measured")
    parser.add_argument("--prompts", type=int, default=10, help="how many short and how many long prompts")
    parser.add_argument("--aborts", type=int, default=500, help="how many requests whose clients leave")
    return parser.parse_args()


if __name__ == "__main__":
    main()
