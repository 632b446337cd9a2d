"""Write the tables of options in docs/http-api.md from `kvroom.serve.bodies`. `--check` only compares.

Run: python scripts/list_options.py [--check]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import msgspec
from msgspec import NODEFAULT, Meta, inspect

from kvroom.serve.bodies import (
    Body,
    ChatBody,
    ChatMessage,
    CompletionBody,
    GenerateBody,
    SamplingParams,
    StreamOptions,
    TextPart,
)

TARGET = Path(__file__).resolve().parent.parent / "docs" / "http-api.md"
BEGIN, END = (
    "<!-- the tables below: scripts/list_options.py -->\n",
    "<!-- the tables above: scripts/list_options.py -->\n",
)
CHAT, COMPLETIONS, GENERATE = "chat", "completions", "generate"
PLACES: tuple[tuple[str, str, type[Body]], ...] = (
    (CHAT, "", ChatBody),
    (CHAT, "messages[].", ChatMessage),
    (CHAT, "messages[].content[].", TextPart),
    (CHAT, "stream_options.", StreamOptions),
    (COMPLETIONS, "", CompletionBody),
    (COMPLETIONS, "stream_options.", StreamOptions),
    (GENERATE, "", GenerateBody),
    (GENERATE, "sampling_params.", SamplingParams),
)


class Option(NamedTuple):
    """One row of a table; the same option on several routes is one row."""

    name: str
    cells: tuple[str, ...]


def fields(inert: bool) -> Iterator[tuple[str, Option]]:
    """Yield route and option of every field that has no effect (`inert`), or of every field that has one."""
    for route, path, kind in PLACES:
        hints = get_type_hints(kind, include_extras=True)
        for field in msgspec.structs.fields(kind):
            described = [meta for meta in hints[field.name].__metadata__ if isinstance(meta, Meta) and meta.description]
            if len(described) != 1:
                raise SystemExit(f"{kind.__name__}.{field.name} has {len(described)} descriptions: give it one")
            if bool((described[0].extra or {}).get("inert")) == inert:
                values = values_of(inspect.type_info(hints[field.name]))
                default = default_of(field)
                cells = (described[0].description,) if inert else (values, default, described[0].description)
                yield route, Option(f"{path}{field.name}", tuple(cells))


def neutrals() -> Iterator[tuple[str, Option]]:
    """Yield route and option of every field that is allowed only with values that change nothing."""
    for route, path, kind in PLACES:
        for name, values in kind.NEUTRAL.items():
            yield route, Option(f"{path}{name}", (" or ".join(f"`{json.dumps(value)}`" for value in values),))


def values_of(found: Any) -> str:
    """Describe the values of a type."""
    if isinstance(found, inspect.Metadata):
        return values_of(found.type)
    if isinstance(found, inspect.UnionType):
        return " or ".join(values_of(one) for one in found.types if not isinstance(one, inspect.NoneType))
    if isinstance(found, inspect.BoolType):
        return "bool"
    if isinstance(found, inspect.IntType | inspect.FloatType):
        return numbers(found)
    if isinstance(found, inspect.StrType):
        return "string" + lengths(found, "characters")
    if isinstance(found, inspect.ListType):
        return f"list of {values_of(found.item_type)}" + lengths(found, "items")
    if isinstance(found, inspect.LiteralType):
        return " or ".join(f"`{json.dumps(value)}`" for value in found.values)
    if isinstance(found, inspect.DictType | inspect.StructType):
        return "object" + (lengths(found, "members") if isinstance(found, inspect.DictType) else "")
    raise SystemExit(f"this script cannot describe the type {found}: add it to values_of")


def numbers(found: inspect.IntType | inspect.FloatType) -> str:
    """Return a number type with its bounds."""
    if isinstance(found, inspect.IntType):
        high = found.le if found.lt is None else found.lt - 1
        return f"int, {found.ge} to {plain(high)}"
    return f"number, {'above ' if found.ge is None else ''}{found.ge or found.gt or 0:g} to {found.le:g}"


def plain(bound: int | None) -> str:
    """Return a bound as text, with powers of two written as powers."""
    for power in (31, 63):
        if bound == 2**power - 1:
            return f"2^{power} - 1"
    return str(bound)


def lengths(found: Any, of: str) -> str:
    """Describe the lengths that a value may have."""
    low, high = found.min_length, found.max_length
    if high is not None:
        return f", {low or 0} to {high} {of}"
    return "" if low is None else f", at least {low}"


def default_of(field: msgspec.structs.FieldInfo) -> str:
    """Return the default as text, `required`, or "" if there is none to show."""
    if field.required:
        return "required"
    default = field.default if field.default is not NODEFAULT else None
    return "" if default in (None, "") else f"`{json.dumps(default)}`"


def table(heads: tuple[str, ...], options: Iterator[tuple[str, Option]]) -> Iterator[str]:
    """Yield the lines of a table with a row for each option and the routes that have it."""
    routes: dict[Option, list[str]] = {}
    for route, option in options:
        routes.setdefault(option, []).append(route)
    yield f"| option | routes | {' | '.join(heads)} |"
    yield "| --- | --- |" + " --- |" * len(heads)
    for option, found in routes.items():
        where = "all" if len(found) == len({CHAT, COMPLETIONS, GENERATE}) else ", ".join(found)
        yield f"| `{option.name}` | {where} | {' | '.join(option.cells)} |"


def tables() -> str:
    """Return the generated part of the page."""
    lines = ["### Options that change the answer", ""]
    lines += [*table(("values", "default", "effect"), fields(inert=False)), ""]
    lines += ["### Options that are allowed and have no effect", ""]
    lines += [*table(("why",), fields(inert=True)), ""]
    lines += ["### Unsupported options, allowed only with a value that leaves them off", ""]
    lines += [*table(("allowed",), neutrals()), ""]
    return "\n".join(lines)


def page() -> str:
    """Return the page with the tables that it should have."""
    before, begin, rest = TARGET.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{TARGET} has no place for the tables: add the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        return int(TARGET.read_text() != page())
    TARGET.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
