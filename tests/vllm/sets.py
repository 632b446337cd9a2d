"""Sets of servers that tests share, and when each of them is started and ended.

A server takes half a minute of a core to start. So a set is started once, for all modules that use it, and an engine
plays several parts where it can: one prefill server feeds a decode server of each `kv_load_failure_policy`, and two
engines of both roles hand over in either direction. While tests use one set, the next one starts, except beside the
faults, which count seconds.

A quick run has the pair behind the router, the faults, and one of the other sets (`BREADTH`), which is drawn. The pair
and the faults have `auto`, or what PAIR_TRANSPORT says; the engines of both roles and the model with sliding windows
have `tcp` or `nixl`, as drawn. In a full run all of these have `auto`, and there are pairs over `tcp` and `nixl`
besides.
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
"""Of these sets a quick run draws one: each costs the starts of two or three servers."""
ALONE = frozenset(("faults",))
"""Beside these sets no other one is started."""
SET_BYTES = 10 << 30
"""With less memory to spare than a set takes, the next one starts when it is asked for."""
OTHER_TRANSPORTS = ("tcp", "nixl")
SMALL_CHUNKS = ("--max-num-batched-tokens", "128")
BLOCKS = 128
"""Of a pool, for ten long prompts: two sets and the reference must fit the memory at the same time."""
FEW_BLOCKS = 13
FEW_TOKENS = ("--max-model-len", "1408")  # vLLM insists on a pool that holds one sequence of that length
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
    """The makings of sets. `transports`: of the engines of both roles and of the sliding windows, if not the usual."""

    model: Path
    folder: Path
    transports: tuple[str, ...] = ()

    def server(
        self, name: str, role: str, core: int, *, model: Path | None = None, policy: str = "fail", blocks: int = BLOCKS,
        arguments: Sequence[str] = (), extra: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None,
        host: str = LOOPBACK,
    ) -> Server:  # fmt: skip
        """A server, of which only the worker stays on its core. `extra`: the connector's settings."""
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
        """The connector's setting of the transport that was drawn with this number."""
        return {"transport": self.transports[number]} if self.transports else {}

    def small(self, make: Callable[[Path, Path], Path]) -> Path:
        folder = self.folder / make.__name__
        return folder if folder.exists() else make(self.model, folder)


def pair(kit: Kit) -> Servers:
    """A prefill and a decode server, the former with a larger pool."""
    return {
        "prefill": kit.server("prefill", "prefill", 0, blocks=BLOCKS + 32),
        "decode": kit.server("decode", "decode", 1),
    }


def both(kit: Kit) -> Servers:
    """Two engines of both roles."""
    extra = {**kit.over(0), "bootstrap_s": 10, "drain_s": 2, "heartbeat_s": 1}
    return {name: kit.server(f"both-{name}", "both", core, extra=extra) for core, name in enumerate(("left", "right"))}


def over(transport: str, kit: Kit) -> Servers:
    """A pair over a transport by name."""
    extra = {"transport": transport, "bootstrap_s": 10, "drain_s": 2, "heartbeat_s": 1}
    return {
        role: kit.server(f"{transport}-{role}", role, core, extra=extra)
        for core, role in enumerate(("prefill", "decode"))
    }


def over_ipv6(kit: Kit) -> Servers:
    """A pair over `tcp` with IPv6 addresses, of which the directory's is in brackets, as in URLs."""
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
    """A prefill server, and a decode server of each policy.

    The latter have little room: two sequences run there, and the pool holds two long prompts but not their answers.
    Deadlines are short. Prompts are computed in small chunks, so that one is found in the middle. The windows on rooms
    stay where they are when a server is started again.
    """

    def server(name: str, role: str, core: int, **options: Any) -> Server:
        extra = {**IMPATIENT, "rooms_port": free_port(LOOPBACK)}
        return kit.server(f"faults-{name}", role, core, extra=extra, **options)

    small: dict[str, Any] = {"blocks": FEW_BLOCKS, "arguments": (*SMALL_CHUNKS, *FEW_SEQUENCES, *FEW_TOKENS)}
    decodes = {policy: server(policy, "decode", 1, policy=policy, **small) for policy in POLICIES}
    return {"prefill": server("prefill", "prefill", 0, arguments=SMALL_CHUNKS), **decodes}


def sliding(kit: Kit) -> Servers:
    """A pair with layers of several kinds; long prompts take several steps."""
    given = ("--max-num-batched-tokens", "300")
    options: dict[str, Any] = {"model": kit.small(models.sliding), "arguments": given, "extra": kit.over(1)}
    return {
        role: kit.server(f"sliding-{role}", role, core, **options) for core, role in enumerate(("prefill", "decode"))
    }


def tensor(kit: Kit) -> Servers:
    """Two engines of both roles, of one rank and of two."""
    return {"one": _ranks(kit, "both", 0, 1), "two": _ranks(kit, "both", 1, 2)}


def adapters(kit: Kit) -> Servers:
    """A pair with the adapters of `ADAPTERS`."""
    base = kit.small(models.two_heads)
    names = [f"{name}={models.adapter(base, kit.folder / name, seed)}" for seed, name in enumerate(ADAPTERS)]
    given = ("--enable-lora", "--max-loras", str(len(names)), "--max-lora-rank", "8", "--lora-modules", *names)
    return {
        role: kit.server(f"adapters-{role}", role, core, model=base, arguments=given)
        for core, role in enumerate(("prefill", "decode"))
    }


def tensor_pair(prefill: int, decode: int, kit: Kit) -> Servers:
    """Return a prefill and a decode server with these numbers of ranks."""
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
    """Holds the sets of this run. `coming`: the sets that will be asked for, in order, as far as that is known."""

    def __init__(self, kit: Kit, coming: Sequence[str]) -> None:
        self._kit = kit
        self._coming = list(coming)
        self._launched: dict[str, Servers] = {}
        self._ready = ""

    def launch(self, name: str) -> Servers:
        """Start a set, unless it was; it is not ready yet."""
        if name not in self._launched:
            servers = self._launched[name] = MAKERS[name](self._kit)
            for server in servers.values():
                server.launch()
        return self._launched[name]

    def take(self, name: str) -> Servers:
        """The servers of this set, ready. Another set that was taken before ends."""
        if name != self._ready:
            self._end(self._ready)
            for server in self.launch(name).values():
                server.wait_ready()
            self._ready = name
            self._launch_next(name)
        return self._launched[name]

    def close(self) -> None:
        """End all that runs."""
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
