"""A resolver for tests in the place of the system's: names with the addresses that a test gives them, and slow ones."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

BOTH = ("::1", "127.0.0.1")


def has_ipv6() -> bool:
    """Return True if this machine has the IPv6 loopback address. Some containers have none."""
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address (::1)")


class Resolver:
    """The replacement of `socket.getaddrinfo` in a test: it answers from `addresses`, and from the system otherwise.

    A look-up of a name in `slow` blocks until `release` is called, and then fails as for an unknown name.
    """

    def __init__(self, addresses: Mapping[str, Sequence[str]], slow: Sequence[str] = ()) -> None:
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        """Lookups that have ended, as `asked` counts those that have begun."""
        self._addresses = addresses
        self._slow = frozenset(slow)
        self._system = socket.getaddrinfo
        self._changed = threading.Condition()
        self._released = False

    def __call__(self, host: Any, port: Any, *args: Any, **options: Any) -> Any:
        with self._changed:
            self.asked[host] += 1
            self._changed.notify_all()
            if host in self._slow and not self._released:
                self._changed.wait_for(lambda: self._released)
                self.answered[host] += 1
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        addresses = self._addresses.get(host, [host])
        return [found for address in addresses for found in self._system(address, port, *args, **options)]

    def wait_asked(self, *hosts: str) -> None:
        """Wait until each of these was asked for."""
        with self._changed:
            assert self._changed.wait_for(lambda: all(self.asked[host] for host in hosts), 20), f"asked: {self.asked}"

    def release(self) -> None:
        """Answer what waits."""
        with self._changed:
            self._released = True
            self._changed.notify_all()


@contextlib.contextmanager
def resolver(addresses: Mapping[str, Sequence[str]] | None = None, slow: Sequence[str] = ()) -> Iterator[Resolver]:
    """Resolve these names in this process, as long as the block runs. Every lookup has ended when it is left."""
    with pytest.MonkeyPatch.context() as patch:
        made = Resolver(addresses or {}, slow)
        patch.setattr(socket, "getaddrinfo", made)
        try:
            yield made
        finally:
            made.release()
