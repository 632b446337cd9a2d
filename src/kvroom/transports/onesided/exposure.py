"""A guard for engines of other projects: it compares the ports that an engine opens with the configured host.

Such an engine knows no secret. A process that reaches its ports can read and write all registered memory, so an engine
that listens on more than the host is refused unless the operator has declared the network trusted. The guard reads the
ports from the kernel's tables; an engine that drives a fabric without sockets (RDMA, ...) names it, as no table shows
it.

Loopback is always permitted, because only processes of this machine reach it, and so are the host's own addresses. A
wildcard host names no address, so with one an engine may listen on loopback only.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from kvroom.dialling.names import NAMES
from kvroom.errors import ConfigurationError, TransportError
from kvroom.wire.address import read_listen_host

from .kernel_tcp import ListeningSocket, listeners, plain

T = TypeVar("T")
_REMEDY = (
    "declare the network trusted (--trusted-fabric of kvroom, trusted_fabric=True of KVManager, trusted_fabric in "
    "vLLM's kv_connector_extra_config, KVROOM_TRUSTED_FABRIC=1 for SGLang), or choose another transport"
)


class Exposed(ConfigurationError, TransportError):
    """An engine can be reached from more machines than the operator has configured."""


class Guard(NamedTuple):
    """The guard of transport `name` in a manager that listens on `host`. `trusted` permits everything."""

    name: str
    host: str
    trusted: bool = False

    def refuse(self, fabric: str) -> None:
        """Raise `Exposed` if the engine uses a fabric, which no table of sockets shows. "": it uses none."""
        if fabric and not self.trusted:
            raise Exposed(
                f"{self.name}: its engine uses {fabric}, whose reach cannot be compared with the host {self.host}, and "
                f"any process on that fabric may read and write the KV pool: {_REMEDY}"
            )

    def call(self, action: Callable[[], T]) -> T:
        """Run `action` and return its result; raise `Exposed` if it made this process listen on more than the host."""
        if self.trusted:
            return action()
        before = listeners()
        result = action()
        self.check(listeners() - before)
        return result

    def check(self, opened: Iterable[ListeningSocket]) -> None:
        """Raise `Exposed` if one of these listeners is neither on loopback nor on an address of the host."""
        mine, found = _addresses(self.host), list[ListeningSocket]()
        for each in sorted(opened):
            address = ipaddress.ip_address(each.address)
            if not address.is_loopback and (address.is_unspecified or each.address not in mine):
                found.append(each)
        if found:
            raise Exposed(
                f"{self.name}: its engine listens on {', '.join(map(str, found))}, which is more than the host "
                f"{self.host}, and any process that reaches these ports can read and write the KV pool: {_REMEDY}"
            )


def is_loopback(host: str) -> bool:
    """Return True if every address of the host is a loopback address; False if it has none."""
    mine = _addresses(host)
    return bool(mine) and all(ipaddress.ip_address(address).is_loopback for address in mine)


def _addresses(host: str) -> frozenset[str]:
    try:
        found = NAMES.look_up(read_listen_host(host), None).result()
    except OSError:  # a host without an address permits nothing beyond loopback
        return frozenset()
    return frozenset(plain(str(each.address[0])) for each in found)
