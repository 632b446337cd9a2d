"""The list of bootstrap addresses that clients may name. It is checked before anything is resolved or dialled.

The address of a directory comes with each request. Without a list, a client could make a decode worker send requests to
any server that the worker can reach. An entry is one of these:

    10.0.0.0/8, fd00::/8        the addresses of a network
    10.0.0.4, fe80::1%eth0      one address
    prefill-0.pd.svc            one name, whatever its addresses are
    *.pd.svc                    every name with this ending, whatever its addresses are
    any                         every host

Hosts are compared in the canonical form of `kvroom.wire.address`, so another spelling of an address or name makes no
difference. A name that is not listed is looked up only if the list contains a network. Then only those of its addresses
that are listed are dialled, exactly as that one lookup returned them, so that a name server cannot give one answer for
the check and another for the dialling.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence

from kvroom.errors import AddressNotAllowed, ConfigurationError
from kvroom.wire.address import HostPort, is_loopback, is_wildcard, parse_address, read_host, read_listen_host

from .advertised import advertised_host
from .dial import is_numeric
from .names import FoundAddress

LOOPBACK = ("127.0.0.0/8", "::1", "localhost")
_ANY = "any"
_PREFIX = re.compile(r"[0-9]{1,3}")
_MAPPED_BITS = 96  # before the IPv4 address in ::ffff:a.b.c.d (RFC 4291, section 2.5.5.2)
_ENTRIES = "write a network (10.0.0.0/8, fd00::/8), an address, a name, a pattern (*.pd.svc) or any"
_SETTING = (
    "--bootstrap-allow of the decode worker (in the library and for vLLM: bootstrap_allow; for SGLang: "
    "KVROOM_BOOTSTRAP_ALLOW)"
)
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class AllowList:
    """The list of one manager. Its own directories can be added and removed at any time, from any thread."""

    def __init__(self, entries: Iterable[str], *, looks_up: bool = True) -> None:
        """Parse the entries.

        Args:
            entries: The entries.
            looks_up: False to refuse every name that is not listed without resolving it.

        Raises:
            ConfigurationError: An entry is invalid. The message names it.
        """
        self._networks: list[_Network] = []
        self._hosts: set[str] = set()
        self._endings: tuple[str, ...] = ()
        self._own: frozenset[HostPort] = frozenset()
        self._any = self._has_network = False
        for entry in entries:
            try:
                if entry.lower() == _ANY:
                    self._any = True
                elif "/" in entry:
                    self._networks.append(_network(entry))
                    self._has_network = True
                elif entry.startswith("*."):
                    name = read_host(entry[2:])
                    if is_numeric(name):
                        raise ValueError("a pattern must end in a name, not in an address")
                    self._endings += (f".{name}",)
                else:
                    self._hosts.add(host := read_host(entry))
                    if is_numeric(host) and "%" not in host:
                        self._networks.append(ipaddress.ip_network(host))
            except (ValueError, ConfigurationError) as error:
                raise ConfigurationError(f"entry {entry!r} of the bootstrap addresses: {error}; {_ENTRIES}") from None
        self._looks_up = looks_up and self._has_network

    def check(self, where: HostPort) -> None:
        """Raise `AddressNotAllowed` for an address that is not allowed, whatever its name would resolve to."""
        if not self._lists(where) and (is_numeric(where.host) or not self._looks_up):
            raise _refusal(where)

    def among(self, where: HostPort, found: Sequence[FoundAddress]) -> list[FoundAddress]:
        """Return the addresses of `where` that may be dialled, out of those that a lookup found.

        Raises:
            AddressNotAllowed: No address may be dialled. The message lists none of them, so that clients cannot use a
                worker to query its name server.
        """
        if self._lists(where):
            return list(found)
        listed = [each for each in found if self._looks_up and self._holds(HostPort.of_socket(each.address).host)]
        if not listed:
            raise _refusal(where)
        return listed

    def add(self, address: str) -> None:
        """Allow a directory of this process at exactly this address."""
        self._own |= {parse_address(address)}

    def remove(self, address: str) -> None:
        """Undo `add`."""
        self._own -= {parse_address(address)}

    def _lists(self, where: HostPort) -> bool:
        host = where.host
        if self._any or host in self._hosts or where in self._own:
            return True
        # An interface can be named like a domain: fe80::1%x.pd.svc is an address, and must not match *.pd.svc.
        return self._holds(host) if is_numeric(host) else host.endswith(self._endings)

    def _holds(self, address: str) -> bool:
        if not is_numeric(address):
            return False
        read = ipaddress.ip_address(address)
        return any(read in network for network in self._networks)


def read_allowed(given: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """Return the entries of a setting, or None if it is not set.

    Args:
        given: One text or several, each with commas between its entries; None if the operator has not set it.

    Raises:
        ConfigurationError: An entry is invalid. The message names it.
    """
    if given is None:
        return None
    entries: list[str] = []
    for text in [given] if isinstance(given, str) else given:
        if not isinstance(text, str):
            raise ConfigurationError(f"entry {text!r} of the bootstrap addresses is not text: {_ENTRIES}")
        entries += [entry.strip() for entry in text.split(",")]
    AllowList(entries)
    return tuple(entries)


def allow_list(given: str | Iterable[str] | None, host: str, advertise: str | None, own: str | None) -> AllowList:
    """Return the list of one manager.

    Args:
        given: The setting, as for `read_allowed`. None: loopback addresses and the manager's own host.
        host: The host that the manager listens on.
        advertise: The host that peers dial, if it differs.
        own: The address of the manager's own directory, or None.

    Raises:
        ConfigurationError: An entry, a host or `own` is invalid.
    """
    entries = read_allowed(given)
    if entries is None:
        hosts = {advertised_host(host, advertise), *([] if is_wildcard(host) else [read_listen_host(host)])}
        made = AllowList([*LOOPBACK, *sorted(hosts)], looks_up=False)
    else:
        made = AllowList(entries)
    if own is not None:
        made.add(own)
    return made


def require_allowed(host: str, given: object | None, example: str) -> None:
    """Raise `ConfigurationError` unless a decode worker at `host` has a list or listens on loopback only.

    `example` is the setting as an operator writes it, for the message.
    """
    if given is None and not is_loopback(host):
        raise ConfigurationError(
            f"address {host or '*'} is not loopback, and clients name the bootstrap directories that a decode worker "
            f"contacts: list those that they may name, for example {example} (networks, addresses, names, *.names, or "
            "any)"
        )


def _refusal(where: HostPort) -> AddressNotAllowed:
    return AddressNotAllowed(
        f"bootstrap address {where} is not allowed here and was not contacted: name the prefill side's own directory, "
        f"or add its host or network to {_SETTING}"
    )


def _network(entry: str) -> _Network:
    """Return the network. A network of IPv4-mapped addresses becomes the IPv4 network, as the addresses do."""
    prefix = entry.rpartition("/")[2]
    if not _PREFIX.fullmatch(prefix) or "%" in entry:
        raise ValueError("not a network with a prefix length")
    read = ipaddress.ip_network(entry)
    if isinstance(read, ipaddress.IPv6Network) and read.prefixlen >= _MAPPED_BITS:
        mapped = read.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, read.prefixlen - _MAPPED_BITS))
    return read
