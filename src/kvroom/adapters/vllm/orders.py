"""The orders of the scheduler's side to the workers' side in one engine step: plain values, which vLLM pickles.

Within one step, the workers carry out orders in the order of the fields. Page lists have kvroom's form: `pages[0]`
holds the window's first token, and further KV cache groups are named.
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
    """Release the room of this request. No block was promised, so no report is expected."""

    request: str
    room: int
    detail: str
    bootstrap_addr: str | None = None
    """On a consumer, the address of the room's directory. None on a producer."""


@dataclass
class OpenRoom:
    """Producer: open the room of a request, so that the consumer finds it."""

    request: str
    room: int
    identity: KVIdentity


@dataclass
class Expect:
    """Consumer: open the room of a new request that has no blocks yet, so that its lease is renewed."""

    request: str
    room: int
    bootstrap_addr: str
    identity: KVIdentity


@dataclass
class Load:
    """Consumer: load tokens [start, stop) into these blocks, and report the request when no peer can write to them."""

    request: str
    room: int
    bootstrap_addr: str
    start: int
    stop: int
    identity: KVIdentity | None
    """None only if `error` is set."""
    pages: list[int] = field(default_factory=list)
    windows: dict[str, list[int]] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)
    """vLLM's block numbers of one group, by which a failure is reported."""
    error: str | None = None
    """The reason why nothing can be loaded: the workers only report the failure."""


@dataclass
class SendChunk:
    """Producer: send these blocks, which hold the tokens up to `stop` once this step's forward pass has ended."""

    request: str
    room: int
    pages: list[int]
    windows: dict[str, list[int]]
    stop: int
    last: bool


@dataclass
class AbortRoom:
    """Producer: abort the room, because blocks that were sent are no longer the request's, or others cannot be sent."""

    request: str
    detail: str


@dataclass
class Finish:
    """The request has ended, and vLLM keeps its blocks until it is reported."""

    request: str
    detail: str | None = None
    """The reason why its KV cache is incomplete, or None if it is complete."""


@dataclass
class Orders(KVConnectorMetadata):
    """The orders of one step."""

    aborts: list[AbortRoom] = field(default_factory=list)
    opens: list[OpenRoom] = field(default_factory=list)
    expects: list[Expect] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    sends: list[SendChunk] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    idle: bool = False
    """True if this step computes nothing."""
    tickets: int = 0
    """The number of requests that the scheduler's side keeps a ticket for."""


@dataclass
class DirectoryAddress(KVConnectorHandshakeMetadata):
    """A worker's message to the scheduler's side at the start: the address of its directory, if it serves one."""

    bootstrap_addr: str | None


@dataclass
class Failures(KVConnectorWorkerMetadata):
    """The reasons of this step's failed loads, by request."""

    details: dict[str, str]

    def aggregate(self, other: Any) -> Failures:
        """Merge with the failures of another rank. For the same request, this rank's reason is kept."""
        return Failures({**other.details, **self.details})
