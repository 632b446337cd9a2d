"""The registration of the transfer backend `kvroom` with SGLang.

SGLang calls `register` in each of its processes, before it parses the command line. `register` adds the choice for the
command line, the member of the enum `TransferBackend`, and the classes of the backend. It also adds a check of the
options, which runs as soon as they are parsed: if kvroom does not support one of them, the server ends within seconds
and with one sentence, and not after it has loaded the model.

The member is added through `Enum._missing_`, Python's own hook for values that an enum lacks. If each plug-in replaced
the whole class, as some do, only the member of the last one would remain.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

from kvroom.tested import TESTED as VERSIONS

NAME = "kvroom"
TESTED = VERSIONS["sglang"]

log = logging.getLogger(f"sglang.{__name__}")

_UTILS = "sglang.srt.disaggregation.utils"
_REQUIRED = (
    ("sglang.srt.server_args", "add_disagg_transfer_backend_choices", ()),
    ("sglang.srt.plugins.hook_registry", "HookRegistry.register", ("target", "hook", "hook_type")),
    ("sglang.srt.plugins.hook_registry", "HookType.AROUND", ()),
    (_UTILS, "TransferBackend.FAKE", ()),
    (_UTILS, "get_kv_class", ("transfer_backend", "class_type")),
)


def register() -> None:
    """Register the backend with the SGLang of this process.

    If this SGLang lacks a name that is needed, log one error and register nothing. An exception would not stop SGLang:
    it would log the traceback, and the server would end with the error that `kvroom` is an invalid choice.
    """
    absent = lacking()
    if absent:
        log.error("the transfer backend kvroom is not available: %s", explain(absent))
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import add_disagg_transfer_backend_choices

    add_disagg_transfer_backend_choices([NAME])
    HookRegistry.register(f"{_UTILS}.TransferBackend._missing_", _member, HookType.AROUND)
    HookRegistry.register(f"{_UTILS}.get_kv_class", _kv_class, HookType.AROUND)
    try:
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    except ImportError:
        return  # this SGLang has no hook after the parsing of options: the manager checks them later

    def check_options(server_args: Any, previous: Callable[[Any], None]) -> None:
        """Check the options, after SGLang's own check, if this backend is chosen."""
        previous(server_args)
        if server_args.disaggregation_transfer_backend == NAME and server_args.disaggregation_mode != "null":
            from . import chosen

            chosen.check(server_args)

    register_resolution_hook("handle_pd_disaggregation")(check_options)


def lacking() -> list[str]:
    """Return the names that `register` uses and the installed SGLang lacks."""
    return list(dict.fromkeys(missing(_REQUIRED)))


def missing(required: tuple[tuple[str, str, tuple[str, ...]], ...]) -> Iterator[str]:
    """Yield each entry of `required` that the installed SGLang lacks: a module, a name, or parameters of a callable.

    A module is followed by the reason why it cannot be imported, which may be another package that is not installed.

    Args:
        required: Triples of a module, a dotted name in it, and the parameters that the callable of that name must take.
    """
    for module, path, parameters in required:
        try:
            found: Any = importlib.import_module(module)
        except ImportError as error:
            yield f"{module} ({error})"
            continue
        for name in path.split("."):
            found = getattr(found, name, None)
            if found is None:
                yield f"{module}.{path}"
                break
        else:
            taken = inspect.signature(found).parameters if parameters else {}
            lacking = [name for name in parameters if name not in taken]
            if lacking:
                yield f"{module}.{path}({', '.join(lacking)})"


def explain(absent: list[str]) -> str:
    """Return one sentence with the absent names, the installed version, and the tested versions of SGLang."""
    return (
        f"SGLang {version()} lacks {', '.join(absent)}; kvroom was tested with SGLang {', '.join(TESTED)}: "
        f"install a tested version of SGLang, or a kvroom that supports this one"
    )


def version() -> str:
    """Return the version of the installed SGLang, or "unknown"."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("sglang")
    except PackageNotFoundError:
        return "unknown"


def _member(original: Callable[[object], Any], value: object) -> Any:
    """Return the member of `TransferBackend` for "kvroom", which is created on first use."""
    if value != NAME:
        return original(value)
    from sglang.srt.disaggregation.utils import TransferBackend

    member = object.__new__(TransferBackend)
    member._name_, member._value_ = NAME.upper(), NAME
    # From now on the enum finds the member without a call of `_missing_`. With `setdefault`, every caller gets the same
    # object.
    return TransferBackend._value2member_map_.setdefault(NAME, member)


def _kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    """Return the backend's class for a `KVClassType`. `KVArgs` is SGLang's own class in every backend."""
    if transfer_backend.value != NAME or class_type.value == "kvargs":
        return original(transfer_backend, class_type)
    from . import chosen

    return chosen.classes()[class_type.value]
