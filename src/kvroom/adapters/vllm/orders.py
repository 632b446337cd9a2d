"""What the scheduler's side tells the workers' side in one engine step: plain values, pickled by vLLM itself.

Within one step the workers act in the order of the fields. Every page list is of kvroom's kind: `pages[0]` holds the
window's first token, further KV cache groups are named.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvroom import KVIdentity


@dataclass
class Drop:
    """Let the room of this request go; no block was promised, so no report is expected."""

    request: str
    room: int
    detail: str
    bootstrap_addr: str | None = None  # of the room's directory, on the consumer; None on the producer


@dataclass
class OpenRoom:
    """Producer: the request has come; open its room so that the consumer finds it."""

    request: str
    room: int
    identity: KVIdentity


@dataclass
class Expect:
    """Consumer: the request has come but has no blocks yet; open its room, so that the lease is renewed."""

    request: str
    room: int
    bootstrap_addr: str
    identity: KVIdentity


@dataclass
class Load:
    """Consumer: fill these blocks with tokens [start, stop) and report the request when nobody writes any more.

    `fault`: nothing can be loaded, for this reason; report a failure. Only then `identity` may be None.
    """

    request: str
    room: int
    bootstrap_addr: str
    start: int
    stop: int
    identity: KVIdentity | None
    pages: list[int] = field(default_factory=list)
    windows: dict[str, list[int]] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)  # of one group, as vLLM numbers them: a failure is told by these
    error: str | None = None


@dataclass
class SendChunk:
    """Producer: tokens up to `stop` are in these blocks when this step's forward pass has ended."""

    request: str
    room: int
    pages: list[int]
    windows: dict[str, list[int]]
    stop: int
    last: bool


@dataclass
class Spoil:
    """Producer: blocks that were sent are not this request's any more, or cannot be sent; its room must not succeed."""

    request: str
    detail: str


@dataclass
class Finish:
    """The request is over, and vLLM keeps its blocks until it is reported. `cause`: why its KV is not whole."""

    request: str
    detail: str | None = None


@dataclass
class Orders(KVConnectorMetadata):
    """One step's orders. `idle`: this step computes nothing. `tickets`: requests that the scheduler's side knows."""

    spoils: list[Spoil] = field(default_factory=list)
    opens: list[OpenRoom] = field(default_factory=list)
    expects: list[Expect] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    sends: list[SendChunk] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    idle: bool = False
    tickets: int = 0


@dataclass
class Whereabouts(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler's side at the start: the address of the directory, if it serves one."""

    bootstrap_addr: str | None


@dataclass
class Failures(KVConnectorWorkerMetadata):
    """Why loads failed in this step, by request."""

    causes: dict[str, str]

    def aggregate(self, other: Any) -> Failures:
        """Those of several ranks; the first one's words stand."""
        return Failures({**other.causes, **self.causes})
