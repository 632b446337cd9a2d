"""Transports move blocks between two processes; they know nothing of rooms. `create` makes one by name.

Whoever writes one derives from `Transport`, finds its tools in `kvroom.transports.kit`, and lets `kvroom.conformance`
judge it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from kvroom.errors import ConfigurationError
from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.transports.base import DESCRIPTION_BYTES, MalformedDescription, OutOfReach, Transport
from kvroom.transports.kit.finding import Finding, Missing
from kvroom.transports.kit.options import ListeningOptions, TransportOptions, read_options
from kvroom.transports.kit.pool import Pool, allocate
from kvroom.transports.kit.transfers import Transfer

__all__ = [
    "DESCRIPTION_BYTES",
    "REGISTRY",
    "Blocks",
    "Entry",
    "Extents",
    "Finding",
    "ListeningOptions",
    "MalformedDescription",
    "MemoryRange",
    "Missing",
    "OutOfReach",
    "Pool",
    "Transfer",
    "Transport",
    "TransportOptions",
    "allocate",
    "create",
    "find",
    "options_of",
    "probe",
    "read_option",
]

Maker = Callable[..., Transport]


class Entry(NamedTuple):
    """`make`: the module and the callable in it, imported when they are asked for; the module has a `probe()`, too.

    `auto`: whether `auto` may choose it. `basic`: it needs no package and no hardware, so `auto` always has it where it
    runs; the others have to be worth their engine. `reach`: how far apart the two ends may be.
    """

    make: str
    auto: bool = False
    basic: bool = False
    reach: Literal["process", "machine", "network"] = "network"


# One line for each transport, in the order in which `auto` prefers them.
REGISTRY = {
    "local": Entry("kvroom.transports.local:LocalTransport", auto=True, basic=True, reach="machine"),
    "nixl": Entry("kvroom.transports.onesided.nixl:NixlTransport", auto=True),
    "mooncake": Entry("kvroom.transports.onesided.mooncake:MooncakeTransport", auto=True),
    "ascend": Entry("kvroom.transports.onesided.ascend:AscendTransport", auto=True),
    "mori": Entry("kvroom.transports.onesided.mori:MoriTransport", auto=True),
    "tcp": Entry("kvroom.transports.tcp:TcpTransport", auto=True, basic=True),
    "memory": Entry("kvroom.transports.memory:MemoryTransport", reach="process"),
    "fake": Entry("kvroom.transports.fake:FakeTransport"),
    "auto": Entry("kvroom.transports.selection.auto:AutoTransport"),
}


def create(
    name: str,
    host: str | None = None,
    advertise: str | None = None,
    trusted_fabric: bool | None = None,
    **options: object,
) -> Transport:
    """Return a new transport. `host` is where it listens, `advertise` the address that peers dial if it is another.

    `trusted_fabric`: the operator trusts all that reach the ports of an engine that knows no secret. A transport that
    listens nowhere, or has no such engine, needs none of these.

    `name`: one of `REGISTRY`, or `package.module:callable` for one outside of this package. Raise `ConfigurationError`
    for an unknown name, for an option that the transport does not have or does not take, and where it cannot run.
    """
    make = find(name)
    kind = options_of(name)
    for key, value in (("host", host), ("advertise", advertise), ("trusted_fabric", trusted_fabric)):
        if value is not None and key in kind.__struct_fields__:
            options[key] = value
    told = read_options(name, kind, options)
    made: object = make() if kind is TransportOptions else make(told)
    if not isinstance(made, Transport):
        raise ConfigurationError(
            f"transport {name} made a {type(made).__name__}: name a callable that returns a kvroom.transports.Transport"
        )
    return made


def find(name: str) -> Maker:
    """Return what makes the transport of this name; raise `ConfigurationError` if there is no such thing."""
    if name in REGISTRY:
        module, _, attribute = REGISTRY[name].make.partition(":")
        make: Maker = getattr(importlib.import_module(module), attribute)
        return make
    if ":" not in name:
        raise ConfigurationError(
            f"unknown transport {name!r}: choose one of {', '.join(sorted(REGISTRY))}, "
            "or name your own as package.module:callable"
        )
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ConfigurationError(f"transport {name!r} is not of the form package.module:callable")
    try:
        outside = importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"transport {name!r}: the module {module} cannot be imported ({error}); "
            "correct its name or install what it needs"
        ) from error
    found: Maker | None = getattr(outside, attribute, None)
    if not callable(found):
        raise ConfigurationError(f"transport {name!r}: the module {module} has no callable {attribute!r}; correct it")
    return found


def options_of(name: str) -> type[TransportOptions]:
    """Return the options of the transport of this name: the `options` of what makes it. Errors as in `find`."""
    kind: object = getattr(find(name), "options", TransportOptions)
    if not (isinstance(kind, type) and issubclass(kind, TransportOptions)):
        raise ConfigurationError(f"transport {name}: its `options` is {kind!r}: name a subclass of TransportOptions")
    return kind


def read_option(text: str) -> tuple[str, Any]:
    """Return the name and the value of a transport's option that is given as `KEY=VALUE`.

    The value is read as JSON, and is a text if it is no JSON. Raises `ConfigurationError` for a text without a key or
    an equals sign.
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigurationError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def probe(name: str) -> Finding:
    """Return what a transport of `REGISTRY` says of this machine. Quick: starts no engine, imports no wheel."""
    finding: Finding = importlib.import_module(REGISTRY[name].make.partition(":")[0]).probe()
    return finding
