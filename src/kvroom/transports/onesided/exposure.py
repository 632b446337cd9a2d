"""A guard over engines of others: it compares the ports that an engine opens with the host that was asked for.

Such an engine knows no secret. A process that reaches its ports reads and writes all registered memory, so an engine
that listens on more than the host is refused unless the operator has declared the network trusted. Ports are seen in
the kernel's tables; an engine that drives a fabric without sockets (RDMA, ...) names it, as no table shows it.

Loopback is never too much: only processes of this machine reach it. An engine on the host's own address is what was
asked for. A wildcard host names no address, so there an engine may listen on loopback alone.
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
    """An engine would be within reach of more machines than the operator asked for."""


class Guard(NamedTuple):
    """Watches the engine of the transport `name` for a manager that listens on `host`."""

    name: str
    host: str
    trusted: bool = False

    def refuse(self, fabric: str) -> None:
        """Raise `Exposed` for an engine that uses `fabric`, which no table of sockets shows; "": it uses none."""
        if fabric and not self.trusted:
            raise Exposed(
                f"{self.name}: its engine uses {fabric}, whose reach cannot be compared with the host {self.host}, and "
                f"any process on that fabric may read and write the KV pool: {_REMEDY}"
            )

    def call(self, action: Callable[[], T]) -> T:
        """Return what `action` returns; raise `Exposed` if this process listens on more than the host since then."""
        if self.trusted:
            return action()
        before = listeners()
        result = action()
        self.check(listeners() - before)
        return result

    def check(self, opened: Iterable[ListeningSocket]) -> None:
        """Raise `Exposed` if one of these listeners is more than was asked for."""
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
    """Return True for a host of which every address is a loopback address."""
    mine = _addresses(host)
    return bool(mine) and all(ipaddress.ip_address(address).is_loopback for address in mine)


def _addresses(host: str) -> frozenset[str]:
    try:
        found = NAMES.look_up(read_listen_host(host), None).result()
    except OSError:  # a host without an address holds nothing: every listener beyond loopback is more than that
        return frozenset()
    return frozenset(plain(str(each.address[0])) for each in found)
