"""The options of a transport: one struct by which values are checked, and from which `--help` and the docs list them.

Each field has a default and a description. The fields of `ListeningOptions` are not set by operators: a manager fills
them from its own settings, for every transport that has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from kvroom.errors import ConfigurationError

OptionsT = TypeVar("OptionsT", bound="TransportOptions")
Port = Annotated[int, Meta(ge=0, lt=65536)]
Seconds = Annotated[float, Meta(gt=0, le=86400)]


class TransportOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of transports' options. It has no fields itself; transports without options use it as it is.

    A subclass is frozen and `kw_only`, and each of its fields is `Annotated[..., Meta(description=...)]` with a
    default.
    """

    def checked(self: OptionsT, name: str) -> OptionsT:
        """Check the values, which constructing the struct does not do, and return the same options.

        Args:
            name: The transport, for messages.

        Raises:
            ConfigurationError: A value has the wrong type or is out of range. The message names the option.
        """
        return read_options(name, type(self), msgspec.structs.asdict(self))


class ListeningOptions(TransportOptions, frozen=True, kw_only=True):
    """Base class of the options of a transport that listens. The manager fills in these fields."""

    host: Annotated[str, Meta(description="the address to listen on")] = "127.0.0.1"
    advertise: Annotated[str | None, Meta(description="the address that peers dial, if not `host`")] = None


class Option(NamedTuple):
    """One option for display. `default` is written as on the command line, and "" if there is none."""

    name: str
    default: str
    description: str

    def __str__(self) -> str:
        return f"{self.name} ({self.default})" if self.default else self.name


def listed(kind: type[TransportOptions]) -> list[Option]:
    """Return the options that an operator can set, in the struct's order, each with its choices and description."""
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in msgspec.structs.fields(kind):
        if field.name in ListeningOptions.__struct_fields__:
            continue
        value: Any = None if field.default is msgspec.NODEFAULT else field.default
        default = "" if value in (None, "") else value if isinstance(value, str) else json.dumps(value)
        hint: Any = hints[field.name]
        said = [part.description for part in get_args(hint)[1:] if isinstance(part, Meta) and part.description]
        plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        choices = [", ".join(map(str, get_args(plain)))] if get_origin(plain) is Literal else []
        found.append(Option(field.name, default, "; ".join([*choices, *said])))
    return found


def read_options(name: str, kind: type[OptionsT], given: Mapping[str, object]) -> OptionsT:
    """Return the options `given` to transport `name` as its struct.

    Raises:
        ConfigurationError: An option is unknown or its value invalid. The message names it and lists the options.
    """
    known = f"its options are {', '.join(map(str, listed(kind)))}" if listed(kind) else "it has no options"
    for key in given:
        if key not in kind.__struct_fields__:
            raise ConfigurationError(f"transport {name}: unknown option {key!r}; {known}")
    try:
        return msgspec.convert(dict(given), kind)
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at `$.")
        key = where.rstrip("`").split(".")[0].split("[")[0]
        raise ConfigurationError(f"transport {name}: {key}={given.get(key)!r}: {reason}; {known}") from None
