"""The registration of the transfer backend `kvroom` with SGLang.

SGLang calls `register` in each of its processes, before it parses the command line. It registers the choice on the
command line, the member of `TransferBackend`, the classes of the backend, and a check of the options as soon as they
are parsed. With that check, a server that kvroom cannot serve ends within seconds with one sentence, and not after the
model was loaded.

The member is added through `Enum._missing_`, Python's own hook for values that an enum lacks. Other plug-ins replace
the whole class, and then the last one loaded would win.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

NAME = "kvroom"
TESTED = ("0.5.23",)

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

    If this SGLang lacks a required name, log one line and register nothing. SGLang would log an exception with its
    traceback, and then still report only that `kvroom` is an invalid choice.
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
        return  # this SGLang has no hook for options: the manager checks them later

    def check_options(server_args: Any, previous: Callable[[Any], None]) -> None:
        """Check the options after SGLang's own step, if this backend is chosen."""
        previous(server_args)
        if server_args.disaggregation_transfer_backend == NAME and server_args.disaggregation_mode != "null":
            from . import chosen

            chosen.check(server_args)

    register_resolution_hook("handle_pd_disaggregation")(check_options)


def lacking() -> list[str]:
    """Return the names that `register` uses and the installed SGLang lacks."""
    return list(dict.fromkeys(missing(_REQUIRED)))


def missing(required: tuple[tuple[str, str, tuple[str, ...]], ...]) -> Iterator[str]:
    """Yield the members of `required` that the installed SGLang lacks: modules, names, or parameters of a callable.

    A module is followed by the reason why it cannot be imported, which may be another package that is not installed.

    Args:
        required: Triples of a module, a dotted name in it, and the parameters that the callable must accept.
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
    """Return one sentence with the missing names, the installed version, and the tested versions."""
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
    """Return the member of `TransferBackend` for "kvroom", and create it on first use."""
    if value != NAME:
        return original(value)
    from sglang.srt.disaggregation.utils import TransferBackend

    member = object.__new__(TransferBackend)
    member._name_, member._value_ = NAME.upper(), NAME
    # From now on the enum finds the member without this hook, and every caller gets the same object.
    return TransferBackend._value2member_map_.setdefault(NAME, member)


def _kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    """Return the class of the backend for a `KVClassType`; every backend shares SGLang's `KVArgs`."""
    if transfer_backend.value != NAME or class_type.value == "kvargs":
        return original(transfer_backend, class_type)
    from . import chosen

    return chosen.classes()[class_type.value]
