"""Transports move blocks between two processes. They know peers and blocks, no rooms. `create` makes one by name.

The author of a transport derives from `Transport`, builds it with `kvroom.transports.kit`, and checks it with
`kvroom.conformance`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from kvroom.errors import ConfigurationError
from kvroom.plan.blocks import Blocks, Extents, MemoryRange

from .base import DESCRIPTION_BYTES, MalformedDescription, OutOfReach, Transport
from .kit.options import ListeningOptions, TransportOptions, read_options
from .kit.pool import Pool, allocate
from .kit.probing import Missing, ProbeResult
from .kit.transfers import Transfer

__all__ = [
    "DESCRIPTION_BYTES",
    "REGISTRY",
    "Blocks",
    "Entry",
    "Extents",
    "ListeningOptions",
    "MalformedDescription",
    "MemoryRange",
    "Missing",
    "OutOfReach",
    "Pool",
    "ProbeResult",
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
    """A registered transport."""

    make: str
    """`module:callable`, imported on first use. The module also has a function `probe()`."""
    auto: bool = False
    """True if `auto` may choose this transport."""
    basic: bool = False
    """True if it needs no package and no hardware: `auto` always includes such a transport, and it includes the others
    only where the hardware makes their engines worth starting."""
    reach: Literal["process", "machine", "network"] = "network"
    """The largest distance between the two ends: the same process, the same machine, or a network."""


# In the order in which `auto` prefers them.
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
    """Create a transport.

    Args:
        name: A key of `REGISTRY`, or `package.module:callable` for a transport from another package.
        host: The address that it listens on. Ignored by transports that do not listen.
        advertise: The address that peers dial, if it differs from `host`.
        trusted_fabric: True if the operator trusts every host that can reach the ports of an engine that does not
            authenticate its peers. Ignored by transports without such an engine.
        **options: The transport's own options, see docs/transports.md.

    Returns:
        A transport without registered memory. The caller closes it.

    Raises:
        ConfigurationError: The name or an option is unknown, the value of an option is invalid, or the transport
            cannot run on this machine. Nothing has been started then.
    """
    make = find(name)
    kind = options_of(name)
    for key, value in (("host", host), ("advertise", advertise), ("trusted_fabric", trusted_fabric)):
        if value is not None and key in kind.__struct_fields__:
            options[key] = value
    given = read_options(name, kind, options)
    made: object = make() if kind is TransportOptions else make(given)
    if not isinstance(made, Transport):
        raise ConfigurationError(
            f"transport {name} made a {type(made).__name__}: name a callable that returns a kvroom.transports.Transport"
        )
    return made


def find(name: str) -> Maker:
    """Return the callable that makes a transport.

    Args:
        name: As for `create`.

    Returns:
        The callable. It takes an instance of the struct `options_of(name)`, or no argument if that struct is
        `TransportOptions` itself.

    Raises:
        ConfigurationError: The name is unknown, or its module or callable cannot be imported.
    """
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
    """Return the struct of a transport's options.

    Args:
        name: As for `create`.

    Raises:
        ConfigurationError: As for `find`, or the `options` of the callable is not a subclass of `TransportOptions`.
    """
    kind: object = getattr(find(name), "options", TransportOptions)
    if not (isinstance(kind, type) and issubclass(kind, TransportOptions)):
        raise ConfigurationError(f"transport {name}: its `options` is {kind!r}: name a subclass of TransportOptions")
    return kind


def read_option(text: str) -> tuple[str, Any]:
    """Return the name and value of a transport option that is written as `KEY=VALUE`.

    Args:
        text: The option as an operator writes it. Its value is parsed as JSON; a value that is not valid JSON is text.

    Raises:
        ConfigurationError: The text has no key or no equals sign.
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigurationError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def probe(name: str) -> ProbeResult:
    """Probe whether a transport can run on this machine. Fast: starts no engine and imports no wheel.

    Args:
        name: A key of `REGISTRY`.

    Returns:
        The result, whose `missing` lists what the transport needs and does not find here.

    Raises:
        KeyError: The name is not in `REGISTRY`.
    """
    finding: ProbeResult = importlib.import_module(REGISTRY[name].make.partition(":")[0]).probe()
    return finding
