"""`host:port`, read and written in one way everywhere: `10.0.0.1:8998`, `worker-3:8998`, `[fd00::1]:8998`."""

from __future__ import annotations

import errno
import ipaddress
import os
from typing import NamedTuple

from kvroom.errors import ConfigurationError

_EXAMPLES = "write host:port, for example 10.0.0.1:8998, worker-3:8998 or [fd00::1]:8998"


class HostPort(NamedTuple):
    """A host (name, IPv4, or IPv6 without brackets) and a TCP port in [0, 65536)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def check_port(port: int, purpose: str) -> None:
    """`ConfigurationError` unless something can listen there; 0 takes any free one."""
    if not 0 <= port < 65536:
        raise ConfigurationError(f"port {port} for {purpose} is not in [0, 65536): choose another")


def parse_address(text: str) -> HostPort:
    """Split an address; `ConfigurationError` names the text and what is wrong with it. Names are not resolved."""
    host, colon, port_text = text.rpartition(":")
    if not colon or not host:
        raise ConfigurationError(f"address {text!r} has no port: {_EXAMPLES}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if not _is_ipv6(host):
            raise ConfigurationError(f"address {text!r}: {host!r} is not an IPv6 address: {_EXAMPLES}")
    elif ":" in host:
        raise ConfigurationError(f"address {text!r}: an IPv6 address needs brackets: {_EXAMPLES}")
    if not _is_host(host):
        raise ConfigurationError(f"address {text!r}: {host!r} is not a host: {_EXAMPLES}")
    if not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5 and int(port_text) < 65536):
        raise ConfigurationError(f"address {text!r}: port {port_text!r} is not a number in [0, 65536): {_EXAMPLES}")
    return HostPort(host, int(port_text))


def is_loopback(host: str) -> bool:
    """Whether `host` can only be reached from this machine. A name other than `localhost` counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """Whether `host` means every interface (`0.0.0.0`, `::`, empty): good to listen on, useless to dial."""
    if not host:
        return True
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def listen_error(where: HostPort, error: OSError) -> str:
    """One sentence on why listening at `where` failed, with the remedy."""
    if error.errno == errno.EADDRINUSE:
        return f"port {where.port} on {where.host} is in use: stop the program that has it or choose another port"
    if error.errno in (errno.EADDRNOTAVAIL, None):  # from Python 3.13 on, asyncio raises this one without its number
        return f"cannot listen on {where}: {where.host} is not an address of this machine"
    if error.errno == errno.EACCES:
        return f"cannot listen on {where}: permission denied; choose a port from 1024 up"
    return f"cannot listen on {where}: {os_reason(error)}"


def os_reason(error: OSError) -> str:
    """Why the system refused, without the arguments that Python adds. Resolver errors have negative numbers."""
    if error.errno is None:
        return str(error)
    return os.strerror(error.errno).lower() if error.errno > 0 else "the host name cannot be resolved"


def _is_host(host: str) -> bool:
    """Printable, and of the shape that the resolver takes (labels of 1 to 63 bytes) rather than raises for."""
    if not host.isprintable() or any(c.isspace() or c in "/[]@" for c in host) or len(host) > 253:
        return False
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
