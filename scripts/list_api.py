"""Write the public interface of kvroom to a file, so that a diff shows each change: names, signatures, fields.

Run: python scripts/list_api.py [--check]
It writes tests/public_api.txt. With --check it writes nothing and exits with status 1 if the file differs.
"""

from __future__ import annotations

import argparse
import difflib
import enum
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

PLACE = Path(__file__).resolve().parent.parent / "tests" / "public_api.txt"
MODULES = (
    "kvroom", "kvroom.errors", "kvroom.network", "kvroom.http", "kvroom.transports", "kvroom.doctor", "kvroom.status",
    "kvroom.conformance.suite",
)  # fmt: skip
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_SIMPLE = (bool, int, float, str, bytes, range, tuple)


class _Source(str):
    """An annotation as written in the source. Every module postpones its annotations, so they are strings."""

    def __repr__(self) -> str:
        return str(self)


def public_names(module: Any) -> list[str]:
    """Return the names that a module exports: `__all__`, or else the classes and functions that it defines."""
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return sorted(getattr(module, "__all__", [name for name in defined if not name.startswith("_")]))


def lines_of(name: str, value: Any) -> Iterator[str]:
    """Yield the lines of one public name; only the first one is not indented."""
    if inspect.isclass(value):
        bases = ", ".join(_bases(value))
        yield f"class {name}({bases})" if bases else f"class {name}"
        yield from (f"    {line}" for line in _members(value))
    elif inspect.isfunction(value):
        yield f"{_kind(value)} {name}{_signature(value)}"
    elif isinstance(value, _SIMPLE) or hasattr(value, "__origin__"):
        yield f"{name} = {value!r}"
    else:
        yield f"{name}: {type(value).__name__}"


def _bases(kind: type) -> Iterator[str]:
    yield from (base.__name__ for base in kind.__bases__ if base is not object)
    if issubclass(kind, msgspec.Struct):
        kinds = {one.kind for one in inspect.signature(kind).parameters.values()}
        yield from ["kw_only"] * (kinds == {inspect.Parameter.KEYWORD_ONLY})


def _members(kind: type) -> Iterator[str]:
    """Yield the members of an enumeration or the fields, then the attributes of the class itself, by name."""
    if issubclass(kind, enum.Enum):
        yield from (f"{member.name} = {member.value!r}" for member in kind)
    else:
        yield from _fields(kind)
    init = vars(kind).get("__init__")
    if inspect.isfunction(init) and not getattr(kind, "_is_protocol", False):
        yield f"def __init__{_signature(init)}"
    for name in sorted(vars(kind)):
        value = inspect.getattr_static(kind, name)
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"{name} (property)"
        elif isinstance(value, classmethod | staticmethod):
            yield f"{_kind(value.__func__)} {name}{_signature(value.__func__)} ({type(value).__name__})"
        elif inspect.isfunction(value):
            yield f"{_kind(value)} {name}{_signature(value)}"


def _fields(kind: type) -> Iterator[str]:
    """Yield the annotated attributes of the class, with their defaults."""
    defaults: dict[str, object] = dict(getattr(kind, "_field_defaults", {}))
    if issubclass(kind, msgspec.Struct):
        for field in msgspec.structs.fields(kind):
            if field.default is not msgspec.NODEFAULT:
                defaults[field.name] = field.default
            elif field.default_factory is not msgspec.NODEFAULT:
                defaults[field.name] = _Source(f"{getattr(field.default_factory, '__name__', '')}()")
    for name, annotation in inspect.get_annotations(kind).items():
        if not name.startswith("_"):
            text = getattr(annotation, "__forward_arg__", annotation)  # a NamedTuple wraps the text
            yield f"{name}: {text}" + (f" = {defaults[name]!r}" if name in defaults else "")


def _kind(function: Any) -> str:
    return "async def" if inspect.iscoroutinefunction(function) else "def"


def _signature(function: Any) -> str:
    """Return the signature with its annotations as written in the source."""
    found = inspect.signature(function)
    parameters = [
        one.replace(annotation=_Source(one.annotation)) if isinstance(one.annotation, str) else one
        for one in found.parameters.values()
    ]
    answer = found.return_annotation
    shown = _Source(answer) if isinstance(answer, str) else answer
    return _ADDRESS.sub("", str(found.replace(parameters=parameters, return_annotation=shown)))


def written() -> str:
    """Return the text of the whole file."""
    found = ["The public interface. Made by `python scripts/list_api.py`; do not edit.", ""]
    for where in MODULES:
        module = importlib.import_module(where)
        found += [f"# {where}", ""]
        for name in public_names(module):
            found += lines_of(name, getattr(module, name))
        found.append("")
    return "\n".join(found)


def main() -> int:
    """Write the file, or compare it with --check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "write nothing; show the differences and exit with status 1 if there are any"
    parser.add_argument("--check", action="store_true", help=text)
    now, before = written(), PLACE.read_text() if PLACE.exists() else ""
    if not parser.parse_args().check:
        PLACE.write_text(now)
        return 0
    sys.stdout.writelines(difflib.unified_diff(before.splitlines(True), now.splitlines(True), "written", "now"))
    return int(now != before)


if __name__ == "__main__":
    sys.exit(main())
