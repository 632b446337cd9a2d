"""Laws in the source itself: containers keyed by room are in the room table, transports know no rooms, whatever is told
to a room, a driver or a link has a method there that takes it, and what stands on kvroom uses what kvroom exports.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from kvroom.core.effects import Effect
from kvroom.core.inputs import Input
from kvroom.core.messages import Message
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.runtime.connection import Connection
from kvroom.runtime.driver import Driver
from kvroom.wire.frames import Control

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "kvroom"
TABLE = SOURCE / "core" / "table.py"
LABORATORY = ROOT / "lab" / "kvroom_lab"
FILES = [path for path in sorted([*SOURCE.rglob("*.py"), *LABORATORY.rglob("*.py")]) if path != TABLE]
# What stands on kvroom, and the modules that it may use. `kvroom.errors` exports everything that it defines.
CONSUMERS = ("adapters", "cli", "engine", "serve")
DOORS = {
    "kvroom",
    "kvroom.doctor",
    "kvroom.http",
    "kvroom.network",
    "kvroom.status",
    "kvroom.tested",
    "kvroom.transports",
}
CONTAINERS = {"dict", "set", "OrderedDict", "defaultdict", "Counter", "WeakValueDictionary", "WeakKeyDictionary"}


def names_in(node: ast.AST) -> set[str]:
    """Every identifier in a piece of code; not what its strings say."""
    return (
        {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
        | {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)}
        | {child.arg for child in ast.walk(node) if isinstance(child, ast.arg)}
        | {child.name for child in ast.walk(node) if isinstance(child, ast.FunctionDef | ast.ClassDef)}
    )


def kept_containers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each attribute that is a container keyed by a room or named after rooms."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
            kept, kind = node.target.attr, node.annotation
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            kept, kind = node.targets[0].attr, node.value
        else:
            continue
        is_container = isinstance(kind, ast.Dict | ast.Set | ast.DictComp | ast.SetComp) or CONTAINERS & names_in(kind)
        key = kind.slice if isinstance(kind, ast.Subscript) else kind
        if isinstance(key, ast.Tuple):
            key = key.elts[0]
        keyed_by_room = {"Room", "Source", "Sink", "RoomNumber", "Generation"} & names_in(key)
        if is_container and (keyed_by_room or "room" in kept.lower()):
            yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_container_outside_the_table_is_keyed_by_room(path: Path) -> None:
    found = list(kept_containers(ast.parse(path.read_text())))
    assert not found, f"{path.name} keeps rooms besides the table: {found}"


def test_the_table_itself_would_be_found() -> None:
    assert list(kept_containers(ast.parse(TABLE.read_text())))


@pytest.mark.parametrize("path", sorted((SOURCE / "transports").rglob("*.py")), ids=lambda path: path.name)
def test_transports_know_no_rooms_and_have_no_clear(path: Path) -> None:
    names = names_in(ast.parse(path.read_text()))
    assert not {name for name in names if "room" in name.lower().replace("kvroom", "")}
    assert "clear" not in {
        node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
    }


def past_the_door(tree: ast.AST) -> Iterator[str]:
    """Every import of a name that no public module exports, as the source would write it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {name.name}" for name in node.names if name.name.split(".")[0] == "kvroom")
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "kvroom":
            module = str(node.module)
            if module == "kvroom.errors" or module.partition(".")[2].partition(".")[0] in CONSUMERS:
                continue
            exported = importlib.import_module(module).__all__ if module in DOORS else ()
            yield from (f"from {module} import {name.name}" for name in node.names if name.name not in exported)


@pytest.mark.parametrize(
    "path",
    [
        *[path for path in sorted(SOURCE.rglob("*.py")) if path.relative_to(SOURCE).parts[0] in CONSUMERS],
        *sorted((ROOT / "examples").rglob("*.py")),
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_what_stands_on_kvroom_uses_what_kvroom_exports(path: Path) -> None:
    assert not list(past_the_door(ast.parse(path.read_text())))


@pytest.mark.parametrize(
    "line",
    [
        "from kvroom.core.settings import Timeouts",
        "from kvroom.transports.kit.pool import allocate",
        "from kvroom.status.rooms import RoomsWindow",
        "from kvroom import _lazily",
        "from kvroom import runtime",
        "from kvroom.transports import kit",
        "import kvroom.runtime.manager",
    ],
)
def test_a_way_past_the_door_would_be_found(line: str) -> None:
    assert list(past_the_door(ast.parse(line))) == [line]


def test_one_file_of_the_wheel_names_the_laboratory() -> None:
    naming = [path for path in SOURCE.rglob("*.py") if "kvroom_lab" in path.read_text()]
    assert [str(path.relative_to(SOURCE)) for path in naming] == ["cli/soak.py"]


@pytest.mark.parametrize(
    ("union", "table"),
    [
        (Message, {**Sink.hears, **Source.hears}),
        (Input, {**Sink.handlers, **Source.handlers}),
        (Effect, Driver._performs),
        (Control, Connection._controls),
    ],
    ids=["messages", "inputs", "effects", "controls"],
)
def test_every_type_has_the_method_that_takes_it(union: Any, table: Mapping[type, object]) -> None:
    assert set(get_args(union)) == set(table)
