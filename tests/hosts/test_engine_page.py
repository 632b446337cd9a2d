"""The program of docs/engine.md on two hosts: its prefill ranks on one, its decode engine on the other."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
from pathlib import Path

from docs.engine_helpers import Start, engines, prefill_options, program

from .network import Host, Network
from .starting import ended

TOKENS = [number * 7 % 5003 for number in range(150)]


def test_two_ranks_of_one_host_hand_over_to_another(network: Network, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:

        def on(host: Host) -> Start:
            def start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[str]:
                return stack.enter_context(ended(host.start(command, environment, log=log)))

            return start

        here = ["--host", network.prefill.address]
        prefill = [(on(network.prefill), prefill_options(tmp_path, rank, *here)) for rank in (0, 1)]
        decode = ["decode", "--host", network.decode.address, "--bootstrap-allow", network.prefill.address]
        with engines(tmp_path, *prefill, (on(network.decode), decode)) as (first, second, other):
            request = {"room": 1, "tokens": TOKENS, "bootstrap": first.wait_for("ready")["bootstrap"]}
            first.tell(**request)
            other.tell(**request)
            line = other.wait_for("succeeded", 1)
            assert line["cache"] == hashlib.sha256(program().compute(TOKENS, (0, 4)).tobytes()).hexdigest()
            other.wait_for("released", 1)
            assert first.wait_for("freed", 1) == second.wait_for("freed", 1)
            assert [engine.finish() for engine in (other, first, second)] == [0, 0, 0]
