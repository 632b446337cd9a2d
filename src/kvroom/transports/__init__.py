"""Transports move blocks between two processes; they know nothing of rooms. `create` makes one by name."""

from __future__ import annotations

import importlib
import inspect

from kvroom.errors import ConfigurationError
from kvroom.transports.base import Transfer, Transport

__all__ = ["REGISTRY", "Transfer", "Transport", "create"]

# One line per transport: its name, and the module and callable that are imported when it is asked for.
REGISTRY = {
    "auto": "kvroom.transports.auto:make",
    "local": "kvroom.transports.local:LocalTransport",
    "memory": "kvroom.transports.memory:MemoryTransport",
    "tcp": "kvroom.transports.tcp:TcpTransport",
}


def create(name: str, host: str | None = None, advertise: str | None = None, **options: object) -> Transport:
    """Return a new transport. `host` is where it listens, `advertise` the address that peers dial if it is another.

    A transport that listens nowhere has no use for these two. Raise `ConfigurationError` for an unknown name or an
    option that the transport does not have.
    """
    if name not in REGISTRY:
        raise ConfigurationError(f"unknown transport {name!r}: choose one of {', '.join(sorted(REGISTRY))}")
    module, _, attribute = REGISTRY[name].partition(":")
    make = getattr(importlib.import_module(module), attribute)
    signature = inspect.signature(make)
    for key, value in (("host", host), ("advertise", advertise)):
        if value is not None and key in signature.parameters:
            options[key] = value
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigurationError(f"transport {name}: {error}; it takes {signature}") from error
    transport: Transport = make(**options)
    return transport
