"""Pairs of real vLLM servers on this machine, the same prompts: vLLM's NixlConnector against KVRoomConnector.

    make bench-vllm [ARGS="--rounds 1 --transport auto"]

Each pair runs alone, in turns, prefill on the first core and decode on the second. After the start the compute threads
are put back on their cores, because NixlConnector moves its workers to the last core of the machine; its own threads
stay there. Every prompt is new to both caches. The figures are medians over prompts. Those of copies are means that
each connector reports: NIXL the time of a transfer, kvroom the time from both sides being ready to the last byte.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "vllm"))

import clients
import fleet
import prompts

IDLE_S = 20
WAIT_S = 10
LONG_TOKENS = 1500
SALTS = itertools.count()
Figures = dict[str, float]
COPIES = {"NixlConnector": "vllm:nixl_xfer_time_seconds", "KVRoomConnector": "vllm:kvroom_handoff_seconds"}


def main() -> None:
    options = _arguments()
    if importlib.util.find_spec("vllm") is None:
        sys.exit("bench/vllm_pair.py needs vLLM, which has an environment of its own: run `make bench-vllm`")
    from kvroom.engine.weights import find

    model = find("packaged")
    short = prompts.short(model)[: options.prompts]
    long = [prompts.story(model, seed, LONG_TOKENS) for seed in range(options.prompts)]
    dtype = ("--dtype", options.dtype)
    found: dict[str, list[Figures]] = {name: [] for name in COPIES}
    with tempfile.TemporaryDirectory(prefix="kvroom-bench-") as folder:
        makers: dict[str, Callable[[], fleet.Pair]] = {
            "NixlConnector": lambda: fleet.nixl_pair(model, Path(folder), arguments=dtype),
            "KVRoomConnector": lambda: fleet.kvroom_pair(
                model, Path(folder), arguments=dtype, transport=options.transport
            ),
        }
        for turn in range(options.rounds):
            for name in list(makers)[:: -1 if turn % 2 else 1]:
                with fleet.running(makers[name]()) as pair:
                    print(f"round {turn + 1}: {name} is up", flush=True)
                    found[name].append(measure(pair, COPIES[name], short, long))
    show({name: {key: statistics.median(one[key] for one in each) for key in each[0]} for name, each in found.items()})


def measure(pair: fleet.Pair, copies: str, short: Sequence[prompts.Prompt], long: Sequence[prompts.Prompt]) -> Figures:
    """Return all figures of one pair, which has just started."""
    put_back(pair)
    ask(pair, short[:2])  # first use is not measured
    figures: Figures = {}
    for kind, asked in (("short", short), ("long", long)):
        before = copied(pair, copies)
        answers = ask(pair, asked)
        figures[f"first token, {kind} prompts, s"] = statistics.median(one.first_s for one in answers)
        figures[f"  of it after prefill, {kind}, s"] = statistics.median(one.first_s - one.prefill_s for one in answers)
        took_s, count = (now - then for now, then in zip(copied(pair, copies), before, strict=True))
        figures[f"copy, {kind} prompts, ms"] = 1e3 * took_s / count if count else float("nan")
    for server, cores in zip(pair.servers, used(pair, IDLE_S), strict=True):
        figures[f"cores used idle, {server.name.rpartition('-')[2]}"] = cores
    for server, cores in zip(pair.servers, waiting(pair, long[0]), strict=True):
        figures[f"cores used while a prompt waits, {server.name.rpartition('-')[2]}"] = cores
    return figures


def ask(pair: fleet.Pair, asked: Sequence[prompts.Prompt]) -> list[clients.Answer]:
    """Send each prompt as a stream, one at a time."""
    answers = []
    for prompt in asked:
        salt = f"bench {next(SALTS)}"
        answer = clients.run(clients.in_turn(pair.prefill.url, pair.decode.url, prompt, stream=True, salt=salt))
        if not answer.right:
            raise SystemExit(f"{pair.decode.name} did not answer: {answer}")
        answers.append(answer)
    return answers


def copied(pair: fleet.Pair, metric: str) -> tuple[float, float]:
    """Return seconds and number of the decode side's copies, after its periodic reports have caught up."""
    previous = None
    while True:
        now = pair.decode.metric(f"{metric}_sum"), pair.decode.metric(f"{metric}_count")
        if now == previous:
            return now
        previous = now
        time.sleep(2)


def used(pair: fleet.Pair, duration_s: float) -> list[float]:
    """Return the CPU seconds per second of each server, all of its processes, over this time."""
    before = [server.cpu_s() for server in pair.servers]
    time.sleep(duration_s)
    return [(server.cpu_s() - then) / duration_s for server, then in zip(pair.servers, before, strict=True)]


def waiting(pair: fleet.Pair, prompt: prompts.Prompt) -> list[float]:
    """Return the same while the prefill side keeps a computed prompt whose decode leg has not come."""
    salt = f"bench {next(SALTS)}"
    ask_for: dict[str, Any] = {"params": clients.REMOTE_DECODE, "salt": salt}
    first = clients.run(clients.complete(pair.prefill.url, prompt, max_tokens=1, **ask_for))
    cores = used(pair, WAIT_S)
    answer = clients.run(clients.complete(pair.decode.url, prompt, params=first.params, salt=salt))
    if not answer.right:
        raise SystemExit(f"{pair.decode.name} did not answer: {answer}")
    return cores


def put_back(pair: fleet.Pair) -> None:
    """Pin each server's main threads, which compute, to the core of that server."""
    for server in pair.servers:
        for process in server.running.family():
            with contextlib.suppress(ProcessLookupError):
                if server.core is not None:
                    os.sched_setaffinity(process.pid, {server.core})


def show(found: dict[str, Figures]) -> None:
    nixl, ours = found["NixlConnector"], found["KVRoomConnector"]
    print(f"{'':42}{'NixlConnector':>15}{'KVRoomConnector':>17}{'ratio':>8}")
    for key, theirs in nixl.items():
        ratio = f"{ours[key] / theirs:8.2f}" if theirs else f"{'-':>8}"
        print(f"{key:42}{theirs:15.3f}{ours[key]:17.3f}{ratio}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="how often each pair is started and measured")
    parser.add_argument("--prompts", type=int, default=10, help="how many short and how many long prompts")
    parser.add_argument("--dtype", default="bfloat16", help="of the model and its cache; float32 without AVX-512")
    parser.add_argument("--transport", default="auto", help="transport of KVRoomConnector")
    return parser.parse_args()


if __name__ == "__main__":
    main()
