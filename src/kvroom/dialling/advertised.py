"""The host by which other machines reach a server on this one, if the operator has not named it.

A server that listens on one address is reached there. A server that listens on every interface (`0.0.0.0`: IPv4, `::`:
IPv6 and IPv4, empty: both) is reached at an address of this machine of the same family: the source address of packets
to other networks or, without a route to them, the only address that the machine has. If there are several addresses and
no route, an error lists them.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from kvroom.errors import ConfigurationError
from kvroom.wire.address import is_ipv6, is_wildcard, read_host, read_listen_host

# Addresses for documentation (RFC 5737, RFC 3849). Only their route is looked up; nothing is sent.
_OUTSIDE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
_NAMES = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}
_IPV6_ADDR_PREFERENCES, _IPV6_PREFER_SRC_PUBLIC = 72, 2  # linux/in6.h; RFC 5014
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_UNUSABLE = 0x20 | 0x40 | 0x08  # deprecated, tentative, duplicate: linux/if_addr.h
_GLOBAL_SCOPE = "00"


def advertised_host(host: str, advertise: str | None = None, setting: str = "advertise_host") -> str:
    """Return the host that other machines dial to reach a server that listens on `host`.

    Args:
        host: The host that the server listens on.
        advertise: The host that the operator named, or None.
        setting: The name of the operator's setting, for messages.

    Raises:
        ConfigurationError: A host is invalid or cannot be dialled, or this machine does not have exactly one suitable
            address. The message names `setting`.
    """
    if advertise is not None:
        named = read_host(advertise)
        if is_wildcard(named):
            raise ConfigurationError(
                f"{setting} {advertise!r} means every interface, which cannot be dialled: give the address or name by "
                "which others reach this machine"
            )
        return named
    listen = read_listen_host(host)
    if not is_wildcard(listen):
        return listen
    families = [socket.AF_INET6] if is_ipv6(listen) else [socket.AF_INET] if listen else list(_OUTSIDE)
    several: list[str] = []
    for family in families:
        routed = _routed(family)
        found = [routed] if routed else [each for each in _ADDRESSES[family]() if _is_dialled(each)]
        if len(found) == 1:
            return found[0]
        several += found
    kind = " or ".join(_NAMES[family] for family in families)
    why = f"has several ({', '.join(sorted(several))})" if several else f"has no {kind} address that others could dial"
    raise ConfigurationError(
        f"host {host!r} means every interface, and this machine {why}: set {setting} to the address or name by which "
        "others reach it"
    )


def _routed(family: socket.AddressFamily) -> str | None:
    """Return the kernel's source address for packets to other networks, or None without a route. Sends nothing."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            if family == socket.AF_INET6:
                with contextlib.suppress(OSError):  # avoid an address that privacy extensions replace daily
                    probe.setsockopt(socket.IPPROTO_IPV6, _IPV6_ADDR_PREFERENCES, _IPV6_PREFER_SRC_PUBLIC)
            probe.connect((_OUTSIDE[family], 9))
            address: str = probe.getsockname()[0]
    except OSError:  # no route, or a kernel without this family
        return None
    return address if _is_dialled(address) else None


def _ipv4_addresses() -> Iterator[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(control, _SIOCGIFADDR, struct.pack("40s", name.encode()[:15]))
                yield socket.inet_ntoa(answer[20:24])


def _ipv6_addresses() -> Iterator[str]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except FileNotFoundError:  # a kernel without IPv6
        return
    for address, _, _, scope, flags, _ in map(str.split, lines):
        if scope == _GLOBAL_SCOPE and not int(flags, 16) & _UNUSABLE:
            yield str(ipaddress.IPv6Address(bytes.fromhex(address)))


def _is_dialled(address: str) -> bool:
    """Return True if other machines can dial the address.

    Loopback addresses are excluded, and link-local ones, which are valid only together with an interface of the caller.
    """
    read = ipaddress.ip_address(address)
    return not (read.is_loopback or read.is_link_local or read.is_unspecified)


_ADDRESSES = {socket.AF_INET: _ipv4_addresses, socket.AF_INET6: _ipv6_addresses}
