"""A variable of the environment for every option: `--page-tokens` is `KVROOM_PAGE_TOKENS`.

An option on the command line replaces its variable. An empty variable counts as unset, as compose files write it. An
option that can be given several times takes several values in its variable, separated and quoted as in a shell.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping
from itertools import chain
from typing import Any, Literal, get_args, get_origin

from kvroom.errors import ConfigurationError
from kvroom.network import API_KEY_VARIABLE, SECRET_FILE_VARIABLE

from .options import PORT, CommandOption

_READ_BY_THE_LIBRARY = frozenset({API_KEY_VARIABLE, SECRET_FILE_VARIABLE})
"""Variables that the library reads itself, for its adapters as well, together with others (`KVROOM_SECRET`)."""
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")


def variable_of(option: CommandOption) -> str | None:
    """Return the variable of an option that this module reads, or None."""
    name = f"KVROOM_{option.name.upper()}"
    if option.flag.is_positional or option.flag.help == argparse.SUPPRESS or name in _READ_BY_THE_LIBRARY:
        return None
    return name


def read_variable(option: CommandOption, environ: Mapping[str, str]) -> Any:
    """Return the value of an option's variable, or None if it is unset.

    Kubernetes sets `KVROOM_PORT=tcp://10.0.0.1:80` in the pods beside a service named `kvroom`, and likewise for
    other names. Such a value is ignored: the operator has not written it, and it is not a port.

    Raises:
        ConfigurationError: the value is invalid.
    """
    name = variable_of(option)
    text = environ.get(name, "").strip() if name else ""
    if not text or (option.flag.form is PORT and _SERVICE_LINK.match(text)):
        return None
    try:
        return _read(option, text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ConfigurationError(f"variable {name}: {error}") from None


def _read(option: CommandOption, text: str) -> Any:
    form = option.flag.form
    if option.hint is bool:
        if text.lower() not in _YES + _NO:
            raise ValueError(f"{text!r} is neither true nor false: use 1 or 0")
        return text.lower() in _YES
    if form.action == "store" and form.nargs is None:
        value = form.read(text)
        if get_origin(option.hint) is Literal and value not in get_args(option.hint):
            raise ValueError(f"invalid choice: {text!r} (choose from {', '.join(get_args(option.hint))})")
        return value
    values = [form.read(word) for word in shlex.split(text)]
    if form.action == "extend":
        return list(chain.from_iterable(values))
    if not isinstance(form.nargs, int):
        return values
    groups = [tuple(values[start : start + form.nargs]) for start in range(0, len(values), form.nargs)]
    if len(values) % form.nargs or (form.action == "store" and len(groups) != 1):
        raise ValueError(f"{text!r} has {len(values)} words: give {form.nargs} for each value")
    return groups if form.action == "append" else groups[0]
