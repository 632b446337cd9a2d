"""Hosts and addresses: the one place where they are read and written.

Routers, users and engines write one address in many forms: `::1` or `[::1]`, `Worker-3` or `worker-3.`, `10.0.0.1` or
`::ffff:10.0.0.1`, a scope id after `%` or, in URLs, after `%25`. This module reads all forms and returns one of them,
so that equal addresses are equal texts:

    host            a name in lower case without its trailing dot, an IPv4 address, or an IPv6 address without brackets
    address         `host:port`, an IPv6 host in brackets:  10.0.0.1:8998  worker-3:8998  [fd00::1]:8998
    URL             `http://` and the address; a scope id follows `%25` (RFC 6874):  http://[fe80::1%25eth0]:8998

A text that cannot be a host raises a `ConfigurationError` with the text and the remedy. Names are not resolved here.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
from typing import Any, NamedTuple
from urllib.parse import quote

from kvroom.errors import AuthenticationError, ConfigurationError

_HOSTS = "write a name, an IPv4 or an IPv6 address, for example worker-3, 10.0.0.1, fd00::1 or fe80::1%eth0"
_ADDRESSES = "write host:port, for example 10.0.0.1:8998, worker-3:8998 or [fd00::1]:8998"
_URLS = "write a URL, for example http://10.0.0.1:8000 or http://[fd00::1]:8000"
_NAME_CHARS = 253  # of a whole name (RFC 1035, section 2.3.4)
_SHOWN_CHARS = 300
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")  # underscores: container engines give such names
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # the last label of a name is no number (RFC 3696, section 2)
_SCOPE = re.compile(r"[A-Za-z0-9._~-]{1,15}")  # an interface: its name or its number
# RFC 6874 writes `%` as `%25` in URLs, and routers copy hosts from URLs. Outside URLs `%251` is interface 251.
_ESCAPED_SCOPE = re.compile(r"\A(?:25)+(?=[^0-9])")
# The text of asyncio's error for one of several addresses that cannot be connected to.
_TRIED = re.compile(r"\[Errno (?P<code>\d+)\] Connect call failed \('(?P<host>[^']*)', (?P<port>\d+)[^)]*\)")
_ESCAPED_IN_URL = re.compile(r"%25(?=[^\]])")


class HostPort(NamedTuple):
    """An address: a host and a TCP port. Construct it with `of`, `to_dial` or `parse_address`, which check both."""

    host: str
    """The host as `read_host` returns it. For listening it may be empty, which means every interface."""
    port: int
    """The TCP port in [0, 65536)."""

    @classmethod
    def of(cls, host: str, port: int) -> HostPort:
        """Return the address of a host and a port that were given separately.

        Raises:
            ConfigurationError: the host is invalid, or the port is not a number in [0, 65536).
        """
        if type(port) is not int or not 0 <= port < 65536:
            raise ConfigurationError(f"port {_shown(port)} of host {_shown(host)} is not a number in [0, 65536)")
        return cls(read_host(host), port)

    @classmethod
    def to_dial(cls, host: str, port: int) -> HostPort:
        """Return the address of a server to connect to.

        Raises:
            ConfigurationError: as `of`, and also for port 0 and for a host that means every interface.
        """
        where = cls.of(host, port)
        if is_wildcard(where.host):
            raise ConfigurationError(
                f"host {host!r} means every interface of a machine, which cannot be dialled: give one address or name"
            )
        if where.port == 0:
            raise ConfigurationError(f"port 0 of host {host!r} cannot be dialled: give the port that the server has")
        return where

    @classmethod
    def of_socket(cls, name: tuple[Any, ...]) -> HostPort:
        """Return the address of one end of a TCP socket, from the result of `getsockname` or `getpeername`."""
        host, port, scope = name[0], name[1], name[3] if len(name) == 4 else 0
        scoped = f"{host}%{scope}" if scope and "%" not in host else host
        try:
            return cls(_host(scoped), port)
        except ValueError:  # a link-local address without its interface, as a resolver may return
            return cls(scoped, port)

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"

    def url(self, path: str = "") -> str:
        """Return the URL of `path` on the HTTP server at this address.

        Args:
            path: the path with its leading slash; empty for the base URL. Characters that do not belong in a path, such
                as `?` or `#`, are escaped, so that they cannot begin a query or a fragment.
        """
        return str(ServerURL("http", self.host, self.port, quote(path)))


class ServerURL(NamedTuple):
    """The base URL of an HTTP server, in parts, as `read_server_url` returns it."""

    scheme: str
    """"http" or "https"."""
    host: str
    """The host as `read_host` returns it."""
    port: int | None
    """The port, None if the URL has none."""
    path: str = ""
    """The escaped path, without a slash at its end."""

    def __str__(self) -> str:
        port = "" if self.port is None else f":{self.port}"
        host = bracketed(self.host).replace("%", "%25")
        return f"{self.scheme}://{host}{port}{self.path}"


def read_host(text: str) -> str:
    """Return a host, given with or without brackets, in the one form that this package uses.

    Raises:
        ConfigurationError: the text is not a host. The error names the text and the remedy.
    """
    try:
        return _host(text)
    except ValueError as error:
        raise ConfigurationError(f"host {_shown(text)} {error}: {_HOSTS}") from None


def read_listen_host(text: str) -> str:
    """Return a host to listen at: as `read_host`, but an empty text is allowed and means every interface."""
    return text if text == "" else read_host(text)


def listening_at(host: str, port: int) -> str:
    """Return the address at which a server listens, as a text; for an empty host with 0.0.0.0."""
    return str(HostPort(host or "0.0.0.0", port))


def check_port(port: int, purpose: str) -> None:
    """Raise `ConfigurationError` unless a server can listen at this port; for 0 the system chooses a free one."""
    if not 0 <= port < 65536:
        raise ConfigurationError(f"port {port} for {purpose} is not in [0, 65536): choose another")


def parse_address(text: str) -> HostPort:
    """Return the host and port of `host:port`. Names are not resolved.

    Raises:
        ConfigurationError: the text is not an address. The error names the text and the remedy.
    """
    try:
        return _address(text)
    except ValueError as error:
        raise ConfigurationError(f"address {_shown(text)} {error}: {_ADDRESSES}") from None


def read_url(text: str) -> str:
    """Return the base URL of an HTTP server as a text, without a slash at its end; see `read_server_url`."""
    return str(read_server_url(text))


def read_server_url(text: str) -> ServerURL:
    """Return the base URL of an HTTP server, in parts, from a URL or from `host:port` alone.

    Raises:
        ConfigurationError: the text is not the URL of an HTTP server, or has a user, a query or a fragment. The error
            names the text and the remedy.
    """
    try:
        if not isinstance(text, str):
            raise ValueError(f"is {type(text).__name__}, not text")
        scheme, rest = text.split("://", 1) if "://" in text else ("http", text)
        if scheme.lower() not in ("http", "https"):
            raise ValueError("does not begin with http:// or https://")
        authority, slash, path = rest.rstrip("/").partition("/")
        if not rest.isprintable() or re.search(r"[?#@\\\s]", authority + path):
            raise ValueError("is not the URL of a server: it must not have a user, query or fragment")
        where = _ESCAPED_IN_URL.sub("%", authority, count=1)
        host, port = (_host(where), None) if where.endswith("]") or ":" not in where else _address(where)
    except ValueError as error:
        raise ConfigurationError(f"{_shown(text)} {error}: {_URLS}") from None
    return ServerURL(scheme.lower(), host, port, f"{slash}{path}")


def is_loopback(host: str) -> bool:
    """Return True if `host` can be reached only from this machine. Names other than `localhost` count as reachable."""
    try:
        read = _host(host)
    except ValueError:
        return False
    return read == "localhost" or (_is_numeric(read) and ipaddress.ip_address(read).is_loopback)


def is_wildcard(host: str) -> bool:
    """Return True if `host` means every interface (`0.0.0.0`, `::`, empty): valid for listening, not for dialling."""
    try:
        read = _host(host)
    except ValueError:
        return host == ""
    return _is_numeric(read) and ipaddress.ip_address(read).is_unspecified


def is_ipv6(host: str) -> bool:
    """Return True if a host from `read_host` is an IPv6 address."""
    return ":" in host


def bracketed(host: str) -> str:
    """Return a host from `read_host` in the form that a port can follow: an IPv6 address in brackets."""
    return f"[{host}]" if is_ipv6(host) else host


def loopback_of(host: str) -> str:
    """Return the host at which this machine reaches its own server that listens at `host`.

    If `host` means every interface (`::`, `0.0.0.0`, empty), this is the loopback address of its family; IPv4 for an
    empty host.
    """
    read = read_listen_host(host)
    if is_wildcard(read):
        return "::1" if is_ipv6(read) else "127.0.0.1"
    return read


def listen_error(where: HostPort, error: OSError) -> str:
    """Return a sentence on why listening at `where` failed, with the remedy."""
    if error.errno == errno.EADDRINUSE:
        return f"port {where.port} on {where.host} is in use: stop the program that uses it or choose another port"
    if error.errno in (errno.EADDRNOTAVAIL, None):  # from Python 3.13 on, asyncio raises this one without its number
        return f"cannot listen on {where}: {where.host} is not an address of this machine"
    if error.errno == errno.EACCES:
        return f"cannot listen on {where}: permission denied; choose a port from 1024 up"
    return f"cannot listen on {where}: {os_reason(error)}"


def loopback_remedy(host: str, error: Exception) -> str:
    """Return a remedy to append to the reason why connecting to a loopback `host` failed, or "" for other failures.

    A loopback address leads every machine to itself. If a worker listens there, which is the default, a worker on
    another machine connects to its own machine instead. That connection is refused, or reaches a different server.
    """
    if not is_loopback(host) or not isinstance(error, ConnectionRefusedError | AuthenticationError):
        return ""
    return (
        f"; {host} is this machine itself: a worker on another machine must be started with --host or --advertise-host "
        "(in the library: `host`, `advertise_host`)"
    )


def os_reason(error: OSError) -> str:
    """Return the system's reason without the arguments that Python adds. Resolver errors have negative numbers."""
    if error.errno is None:
        return _TRIED.sub(
            lambda tried: f"{os.strerror(int(tried['code'])).lower()} at {HostPort(tried['host'], int(tried['port']))}",
            str(error).removeprefix("Multiple exceptions: "),
        )
    return os.strerror(error.errno).lower() if error.errno > 0 else "the host name cannot be resolved"


# The functions below raise `ValueError` with the end of a sentence that begins with the text: "host '...' is empty".


def _host(text: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"is {type(text).__name__}, not text")
    if not text:
        raise ValueError("is empty")
    if len(text) > _NAME_CHARS + 2:
        raise ValueError("is not a host, it is too long")
    if text.startswith("[") and text.endswith("]"):
        return _ipv6(text[1:-1])
    if "/" in text:
        raise ValueError("is not a host alone but a URL or a path")
    if text.count(":") == 1 or "]" in text:
        raise ValueError("is not a host alone: give the port separately")
    if ":" in text:
        return _ipv6(text)
    try:
        name = text.encode("idna").decode().lower().removesuffix(".")
    except UnicodeError:  # an empty label, one of more than 63 bytes, or letters that a name cannot have
        raise ValueError("is not a host") from None
    labels = name.split(".")
    # `inet_aton` also accepts fewer than four numbers (`0`, `127.1`). These are refused: other code would read `0` as a
    # name, and a check for wildcards would miss it.
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise ValueError("is not an IPv4 address of four numbers") from None
    if len(name) > _NAME_CHARS or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError("is not a host")
    return name


def _ipv6(text: str) -> str:
    address, percent, scope = text.partition("%")
    try:
        read = ipaddress.IPv6Address(address)
    except ValueError:
        raise ValueError("is not an IPv6 address") from None
    if percent:
        scope = _ESCAPED_SCOPE.sub("", scope)
        if not _SCOPE.fullmatch(scope):
            raise ValueError("has a scope id that is not an interface")
        if not read.is_link_local:
            raise ValueError("has a scope id, which only link-local addresses (fe80::/10) have")
        return f"{read}%{scope}"
    if read.is_link_local:
        raise ValueError("is a link-local address without its interface")
    return str(read.ipv4_mapped or read)


def _address(text: str) -> HostPort:
    if not isinstance(text, str):
        raise ValueError(f"is {type(text).__name__}, not text")
    host, colon, port_text = text.rpartition(":")
    if not colon or not host or "]" in port_text:
        raise ValueError("has no port")
    if ":" in host and not host.startswith("["):
        raise ValueError("has an IPv6 address that needs brackets")
    read = _host(host)
    if not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5 and int(port_text) < 65536):
        raise ValueError(f"has a port that is not a number in [0, 65536), {_shown(port_text)}")
    return HostPort(read, int(port_text))


def _is_numeric(host: str) -> bool:
    return is_ipv6(host) or host.rpartition(".")[2].isdigit()


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
