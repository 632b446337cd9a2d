"""Sets of servers that tests share. This module decides when each of them is started and ended.

To start a server takes half a minute of a core. Therefore a set is started once for all modules that use it, and an
engine has several parts if possible: one prefill server serves a decode server of each `kv_load_failure_policy`, and
two engines of both roles hand over in either direction. While tests use one set, the next one starts, except during the
tests of faults, which measure seconds.

A quick run has the pair behind the router, the faults, and one of the other sets (`BREADTH`), which is drawn. The pair
and the faults use `auto` or the transport in PAIR_TRANSPORT. The engines of both roles and the model with sliding
windows use `tcp` or `nixl`, as drawn. In a full run all of these use `auto`, and there are further pairs over `tcp` and
`nixl`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import models
import psutil
from fleet import LOOPBACK, Server, cores, kvroom_config

from kvroom.cli.ports import free_port

Servers = Mapping[str, Server]
QUICK_ORDER = ("sliding", "tensor", "pair", "both", "faults")
BREADTH = ("sliding", "tensor", "both")
"""The sets of which a quick run draws one, because each costs the start of two or three servers."""
ALONE = frozenset(("faults",))
"""The sets during which no other set is started."""
SET_BYTES = 10 << 30
"""If less memory than this is available, the next set is started only when a test needs it."""
OTHER_TRANSPORTS = ("tcp", "nixl")
SMALL_CHUNKS = ("--max-num-batched-tokens", "128")
BLOCKS = 128
"""The size of a pool, enough for ten long prompts. Two sets and the reference must fit into memory together."""
FEW_BLOCKS = 13
FEW_TOKENS = ("--max-model-len", "1408")  # vLLM requires a pool that holds one sequence of this length
FEW_SEQUENCES = ("--max-num-seqs", "2")
LEASE_S = 6.0
IMPATIENT: dict[str, Any] = {
    "bootstrap_s": LEASE_S, "renew_s": 1.0, "waiting_s": 30.0, "stall_s": 10.0, "drain_s": 2.0, "heartbeat_s": 2.0,
}  # fmt: skip
POLICIES = ("fail", "recompute")
ADAPTERS = ("formal", "brief")
"""The names of two LoRA adapters."""


@dataclass(frozen=True)
class Kit:
    """The settings that all sets share, and the construction of a server."""

    model: Path
    folder: Path
    transports: tuple[str, ...] = ()
    """The transports of the engines of both roles and of the sliding windows; empty for the usual one."""

    def server(
        self, name: str, role: str, core: int, *, model: Path | None = None, policy: str = "fail", blocks: int = BLOCKS,
        arguments: Sequence[str] = (), extra: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None,
        host: str = LOOPBACK,
    ) -> Server:  # fmt: skip
        """Return a server of which only the worker stays on its core. `extra` has the connector's settings."""
        config = kvroom_config(role, policy, **(extra or {}))
        given = (*arguments, "--num-gpu-blocks-override", str(blocks))
        log = self.folder / f"{name}.log"
        return Server(
            name,
            model or self.model,
            config,
            log,
            cores()[core],
            whole=False,
            arguments=given,
            env=env or {},
            host=host,
        )

    def over(self, number: int) -> dict[str, Any]:
        """Return the connector's setting for the drawn transport of this number."""
        return {"transport": self.transports[number]} if self.transports else {}

    def small(self, make: Callable[[Path, Path], Path]) -> Path:
        folder = self.folder / make.__name__
        return folder if folder.exists() else make(self.model, folder)


def pair(kit: Kit) -> Servers:
    """Return a prefill server with a larger pool and a decode server."""
    return {
        "prefill": kit.server("prefill", "prefill", 0, blocks=BLOCKS + 32),
        "decode": kit.server("decode", "decode", 1),
    }


def both(kit: Kit) -> Servers:
    """Return two engines of both roles."""
    extra = {**kit.over(0), "bootstrap_s": 10, "drain_s": 2, "heartbeat_s": 1}
    return {name: kit.server(f"both-{name}", "both", core, extra=extra) for core, name in enumerate(("left", "right"))}


def over(transport: str, kit: Kit) -> Servers:
    """Return a pair over this transport."""
    extra = {"transport": transport, "bootstrap_s": 10, "drain_s": 2, "heartbeat_s": 1}
    return {
        role: kit.server(f"{transport}-{role}", role, core, extra=extra)
        for core, role in enumerate(("prefill", "decode"))
    }


def over_ipv6(kit: Kit) -> Servers:
    """Return a pair over `tcp` with IPv6 addresses. That of the directory is in brackets, as in URLs."""
    extra = {
        "transport": "tcp",
        "host": "::1",
        "bootstrap_host": "[::1]",
        "bootstrap_s": 10,
        "drain_s": 2,
        "heartbeat_s": 1,
    }
    return {
        role: kit.server(f"ipv6-{role}", role, core, extra=extra, host="::1")
        for core, role in enumerate(("prefill", "decode"))
    }


def faults(kit: Kit) -> Servers:
    """Return a prefill server and a decode server of each policy.

    The decode servers run two sequences at a time, and their pools hold two long prompts but not their answers.
    Deadlines are short. Prompts are computed in small chunks, so that a test can act in the middle of one. A
    restarted server has its status server on the same port as before.
    """

    def server(name: str, role: str, core: int, **options: Any) -> Server:
        extra = {**IMPATIENT, "rooms_port": free_port(LOOPBACK)}
        return kit.server(f"faults-{name}", role, core, extra=extra, **options)

    small: dict[str, Any] = {"blocks": FEW_BLOCKS, "arguments": (*SMALL_CHUNKS, *FEW_SEQUENCES, *FEW_TOKENS)}
    decodes = {policy: server(policy, "decode", 1, policy=policy, **small) for policy in POLICIES}
    return {"prefill": server("prefill", "prefill", 0, arguments=SMALL_CHUNKS), **decodes}


def sliding(kit: Kit) -> Servers:
    """Return a pair with layers of several kinds, in which long prompts take several steps."""
    given = ("--max-num-batched-tokens", "300")
    options: dict[str, Any] = {"model": kit.small(models.sliding), "arguments": given, "extra": kit.over(1)}
    return {
        role: kit.server(f"sliding-{role}", role, core, **options) for core, role in enumerate(("prefill", "decode"))
    }


def tensor(kit: Kit) -> Servers:
    """Return two engines of both roles, one with one rank and one with two."""
    return {"one": _ranks(kit, "both", 0, 1), "two": _ranks(kit, "both", 1, 2)}


def adapters(kit: Kit) -> Servers:
    """Return a pair with the adapters of `ADAPTERS`."""
    base = kit.small(models.two_heads)
    names = [f"{name}={models.adapter(base, kit.folder / name, seed)}" for seed, name in enumerate(ADAPTERS)]
    given = ("--enable-lora", "--max-loras", str(len(names)), "--max-lora-rank", "8", "--lora-modules", *names)
    return {
        role: kit.server(f"adapters-{role}", role, core, model=base, arguments=given)
        for core, role in enumerate(("prefill", "decode"))
    }


def tensor_pair(prefill: int, decode: int, kit: Kit) -> Servers:
    """Return a prefill server and a decode server with these numbers of ranks."""
    return {"prefill": _ranks(kit, "prefill", 0, prefill), "decode": _ranks(kit, "decode", 1, decode)}


def _ranks(kit: Kit, role: str, core: int, ranks: int) -> Server:
    given = ("--tensor-parallel-size", str(ranks))
    env = {"VLLM_CPU_OMP_THREADS_BIND": "|".join([str(cores()[core])] * ranks)}
    name = f"tensor-{role}-{ranks}"
    return kit.server(name, role, core, model=kit.small(models.two_heads), arguments=given, env=env)


MAKERS: dict[str, Callable[[Kit], Servers]] = {
    "pair": pair, "both": both, "faults": faults, "sliding": sliding, "tensor": tensor, "adapters": adapters,
    "tensor 1 to 2": partial(tensor_pair, 1, 2), "tensor 2 to 1": partial(tensor_pair, 2, 1),
    **{f"over {name}": partial(over, name) for name in OTHER_TRANSPORTS}, "over ipv6": over_ipv6,
}  # fmt: skip


class Garage:
    """The sets of this run. `coming` names the sets that tests will need, in order, as far as that is known."""

    def __init__(self, kit: Kit, coming: Sequence[str]) -> None:
        self._kit = kit
        self._coming = list(coming)
        self._launched: dict[str, Servers] = {}
        self._ready = ""

    def launch(self, name: str) -> Servers:
        """Start the servers of a set if they are not started yet. They are not ready when this returns."""
        if name not in self._launched:
            servers = self._launched[name] = MAKERS[name](self._kit)
            for server in servers.values():
                server.launch()
        return self._launched[name]

    def take(self, name: str) -> Servers:
        """Return the servers of this set when they are ready. End the set that was taken before."""
        if name != self._ready:
            self._end(self._ready)
            for server in self.launch(name).values():
                server.wait_ready()
            self._ready = name
            self._launch_next(name)
        return self._launched[name]

    def close(self) -> None:
        """End all running servers."""
        for name in list(self._launched):
            self._end(name)

    def _launch_next(self, name: str) -> None:
        later = self._coming[self._coming.index(name) + 1 :] if name in self._coming else []
        if later and name not in ALONE and psutil.virtual_memory().available > SET_BYTES:
            self.launch(later[0])

    def _end(self, name: str) -> None:
        servers = self._launched.pop(name, {}).values()
        for server in servers:
            server.running.signal(signal.SIGTERM)
        for server in servers:
            server.end()
