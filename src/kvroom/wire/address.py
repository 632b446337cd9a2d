"""Hosts and addresses, read and written in one way everywhere.

Routers, users and engines write the same place in many forms: `::1` or `[::1]`, `Worker-3` or `worker-3.`, `10.0.0.1`
or `::ffff:10.0.0.1`, a scope id after `%` or, as URLs have it, after `%25`. Each form is read here once, into the one
that this module writes, so that equal places are equal texts:

    host            a name in lower case without its trailing dot, an IPv4 address, or an IPv6 address without brackets
    address         `host:port`, an IPv6 host in brackets:  10.0.0.1:8998  worker-3:8998  [fd00::1]:8998
    URL             `http://` and the address; a scope id follows `%25` (RFC 6874):  http://[fe80::1%25eth0]:8998

What cannot be a host raises one `ConfigurationError` that names the text and the remedy. Names are not resolved here.
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
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a name does not end in one (RFC 3696, section 2)
_SCOPE = re.compile(r"[A-Za-z0-9._~-]{1,15}")  # an interface: its name or its number
# RFC 6874 writes `%` as `%25` in URLs, which routers copy the host from. Outside URLs `%251` is interface 251.
_ESCAPED_SCOPE = re.compile(r"\A(?:25)+(?=[^0-9])")
# How asyncio says that one of several addresses cannot be connected to.
_TRIED = re.compile(r"\[Errno (?P<code>\d+)\] Connect call failed \('(?P<host>[^']*)', (?P<port>\d+)[^)]*\)")
_ESCAPED_IN_URL = re.compile(r"%25(?=[^\]])")


class HostPort(NamedTuple):
    """A host as `read_host` returns it, and a TCP port in [0, 65536). Made by `of`, `to_dial` or `parse_address`.

    A host that listens may also be empty: every interface of this machine.
    """

    host: str
    port: int

    @classmethod
    def of(cls, host: str, port: int) -> HostPort:
        """Return the address of a host and a port that were given apart; raise `ConfigurationError`."""
        if type(port) is not int or not 0 <= port < 65536:
            raise ConfigurationError(f"port {_shown(port)} of host {_shown(host)} is not a number in [0, 65536)")
        return cls(read_host(host), port)

    @classmethod
    def to_dial(cls, host: str, port: int) -> HostPort:
        """Return the address of a server elsewhere: as `of`, and neither port 0 nor every interface is one."""
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
        """Return the address of one end of a TCP socket, from what `getsockname` or `getpeername` return."""
        host, port, scope = name[0], name[1], name[3] if len(name) == 4 else 0
        scoped = f"{host}%{scope}" if scope and "%" not in host else host
        try:
            return cls(_host(scoped), port)
        except ValueError:  # a link-local address without its interface, as a resolver may return
            return cls(scoped, port)

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"

    def url(self, path: str = "") -> str:
        """Return the URL of `path` (with its slash; empty: the base of others) on the HTTP server at this address.

        What is no part of a path, a `?` or `#` for example, is escaped: it cannot begin a query or a fragment.
        """
        return str(ServerURL("http", self.host, self.port, quote(path)))


class ServerURL(NamedTuple):
    """The base URL of an HTTP server, in parts, as `read_server_url` returns it. `path` is escaped, without its end."""

    scheme: str
    host: str
    port: int | None
    path: str = ""

    def __str__(self) -> str:
        port = "" if self.port is None else f":{self.port}"
        host = bracketed(self.host).replace("%", "%25")
        return f"{self.scheme}://{host}{port}{self.path}"


def read_host(text: str) -> str:
    """Return a host in the form that the module describes, with or without brackets; raise `ConfigurationError`."""
    try:
        return _host(text)
    except ValueError as error:
        raise ConfigurationError(f"host {_shown(text)} {error}: {_HOSTS}") from None


def read_listen_host(text: str) -> str:
    """Return a host to listen at: as `read_host`, and empty, which means every interface."""
    return text if text == "" else read_host(text)


def listening_at(host: str, port: int) -> str:
    """Return the address at which a server listens, for others to read: every interface has one, too."""
    return str(HostPort(host or "0.0.0.0", port))


def check_port(port: int, purpose: str) -> None:
    """`ConfigurationError` unless something can listen there; 0 takes any free one."""
    if not 0 <= port < 65536:
        raise ConfigurationError(f"port {port} for {purpose} is not in [0, 65536): choose another")


def parse_address(text: str) -> HostPort:
    """Split an address; `ConfigurationError` names the text and what is wrong with it. Names are not resolved."""
    try:
        return _address(text)
    except ValueError as error:
        raise ConfigurationError(f"address {_shown(text)} {error}: {_ADDRESSES}") from None


def read_url(text: str) -> str:
    """Return the base URL of an HTTP server, without a slash at its end: as `read_server_url`, as a text."""
    return str(read_server_url(text))


def read_server_url(text: str) -> ServerURL:
    """Return the base URL of an HTTP server, in parts, from a URL or from `host:port` alone.

    `ConfigurationError` names the text and what is wrong with it.
    """
    try:
        if not isinstance(text, str):
            raise ValueError(f"is {type(text).__name__}, not text")
        scheme, rest = text.split("://", 1) if "://" in text else ("http", text)
        if scheme.lower() not in ("http", "https"):
            raise ValueError("is no URL that begins with http:// or https://")
        authority, slash, path = rest.rstrip("/").partition("/")
        if not rest.isprintable() or re.search(r"[?#@\\\s]", authority + path):
            raise ValueError("is not the URL of a server, which has no user, query or fragment")
        where = _ESCAPED_IN_URL.sub("%", authority, count=1)
        host, port = (_host(where), None) if where.endswith("]") or ":" not in where else _address(where)
    except ValueError as error:
        raise ConfigurationError(f"{_shown(text)} {error}: {_URLS}") from None
    return ServerURL(scheme.lower(), host, port, f"{slash}{path}")


def is_loopback(host: str) -> bool:
    """Whether `host` can only be reached from this machine. A name other than `localhost` counts as reachable."""
    try:
        read = _host(host)
    except ValueError:
        return False
    return read == "localhost" or (_is_numeric(read) and ipaddress.ip_address(read).is_loopback)


def is_wildcard(host: str) -> bool:
    """Whether `host` means every interface (`0.0.0.0`, `::`, empty): good to listen on, useless to dial."""
    try:
        read = _host(host)
    except ValueError:
        return host == ""
    return _is_numeric(read) and ipaddress.ip_address(read).is_unspecified


def is_ipv6(host: str) -> bool:
    """Whether a host that `read_host` returned is an IPv6 address."""
    return ":" in host


def bracketed(host: str) -> str:
    """Return a host that `read_host` returned as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if is_ipv6(host) else host


def loopback_of(host: str) -> str:
    """Return the host by which this machine reaches its own server that listens at `host`.

    For every interface of a family (`::`, `0.0.0.0`, empty: IPv4) that is the loopback address of this family.
    """
    read = read_listen_host(host)
    if is_wildcard(read):
        return "::1" if is_ipv6(read) else "127.0.0.1"
    return read


def listen_error(where: HostPort, error: OSError) -> str:
    """One sentence on why listening at `where` failed, with the remedy."""
    if error.errno == errno.EADDRINUSE:
        return f"port {where.port} on {where.host} is in use: stop the program that has it or choose another port"
    if error.errno in (errno.EADDRNOTAVAIL, None):  # from Python 3.13 on, asyncio raises this one without its number
        return f"cannot listen on {where}: {where.host} is not an address of this machine"
    if error.errno == errno.EACCES:
        return f"cannot listen on {where}: permission denied; choose a port from 1024 up"
    return f"cannot listen on {where}: {os_reason(error)}"


def loopback_remedy(host: str, error: Exception) -> str:
    """Return what to do where the server that a peer named was not found at `host`, to follow the reason; or nothing.

    A loopback address leads every machine to itself. A worker that listens there, as by default, and a worker on
    another machine do not meet: the latter is refused by its own machine, or finds a server that is not meant.
    """
    if not is_loopback(host) or not isinstance(error, ConnectionRefusedError | AuthenticationError):
        return ""
    return (
        f"; {host} is this machine itself: a worker on another machine must be started with --host or --advertise-host "
        "(in the library: `host`, `advertise_host`)"
    )


def os_reason(error: OSError) -> str:
    """Why the system refused, without the arguments that Python adds. Resolver errors have negative numbers."""
    if error.errno is None:
        return _TRIED.sub(
            lambda tried: f"{os.strerror(int(tried['code'])).lower()} at {HostPort(tried['host'], int(tried['port']))}",
            str(error).removeprefix("Multiple exceptions: "),
        )
    return os.strerror(error.errno).lower() if error.errno > 0 else "the host name cannot be resolved"


# Below, a `ValueError` says what is wrong with a text, to be said after it.


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
        raise ValueError("is not a host alone: a port is given apart from it")
    if ":" in text:
        return _ipv6(text)
    try:
        name = text.encode("idna").decode().lower().removesuffix(".")
    except UnicodeError:  # a label of no or more than 63 bytes, or letters that no name has
        raise ValueError("is not a host") from None
    labels = name.split(".")
    # What `inet_aton` takes beside four numbers (`0`, `127.1`) is refused: its other readers would take `0` for a name,
    # and a check for wildcards would miss it.
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
