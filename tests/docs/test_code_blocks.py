"""Every block of Python in the documentation compiles, imports what there is, and runs.

A complete block runs as it is. A block that goes on from the text around it (a pool, a manager) runs with what the text
describes, on loopback and on free ports, where its page is one of `SCENES`; of the others the imports are tried.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pytest

import kvroom
from kvroom import KVBootstrapServer, KVIdentity, KVLayout, KVManager, KVReceiver, array_regions

from .pages import ALL, ROOT, Block, blocks, name_of

PYTHON = {"python", "py"}
LOOPBACK = "127.0.0.1"
SCENES = ("docs/failures.md", "docs/from-sglang.md", "docs/operating.md")
"""The pages whose blocks go on from what `run` makes."""


class Closes(Protocol):
    """A thing that has to be closed."""

    def close(self) -> None: ...


class Case(NamedTuple):
    """A block, and its page."""

    page: Path
    block: Block

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.block.line}"


# docs/engine.md explains parts of a program that runs in tests/docs/test_two_to_one.py; another test compares the two.
PAGES = [page for page in ALL if name_of(page) != "docs/engine.md"]
CASES = [Case(page, block) for page in PAGES for block in blocks(page.read_text()) if block.language in PYTHON]


def compiled(code: str, name: str = "page") -> ast.Module:
    """Return a block's syntax tree. Like an interpreter with a loop, it may await at the top."""
    compile(code, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    return ast.parse(code)


def free_names(code: str) -> set[str]:
    """Return the names that a block reads and neither makes nor imports."""
    read: set[str] = set()
    made = set(dir(builtins))
    for node in ast.walk(compiled(code)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.alias):
            made.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            made.add(node.name)
    return read - made


def is_complete(code: str) -> bool:
    """Return whether a block needs nothing from the text around it. One that does not compile is left to its test."""
    try:
        return not free_names(code)
    except SyntaxError:
        return False


def missing_imports(code: str) -> list[str]:
    """Return what a block imports from kvroom and is not there."""
    found = []
    for node in ast.walk(compiled(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "kvroom":
            module = importlib.import_module(node.module or "")
            found += [f"{node.module}.{one.name}" for one in node.names if not hasattr(module, one.name)]
    return found


def run(page: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Run the blocks of a page that are not complete, one after the other, and return the names that they leave."""
    codes = [case.block.text for case in CASES if case.page == page and not is_complete(case.block.text)]
    pool = np.zeros((30, 2, 128, 16, 2, 8), np.float32)
    regions = array_regions(pool.ctypes.data, pool.shape, pool.strides, "LCPTHD", itemsize=4, layers=range(30))
    layout = KVLayout(regions, dtype="float32", model="my-model")
    monkeypatch.setenv("KVROOM_SECRET", "0123456789abcdef" * 2)
    with ExitStack() as stack:
        directory = stack.enter_context(KVBootstrapServer())
        manager = stack.enter_context(KVManager(layout, register_with=directory.address))
        address = directory.address
        for kind in (KVManager, KVBootstrapServer):
            monkeypatch.setattr(kvroom, kind.__name__, closing(kind, stack))
        names: dict[str, object] = {name: getattr(kvroom, name) for name in kvroom.__all__}
        names |= {
            "pool": pool, "layout": layout, "manager": manager, "bootstrap_addr": address, "room": 7, "queue": [],
            "token_ids": list(range(600)), "request": KVIdentity.of(range(600)), "adapter_name": "", "salt": "",
            "first_pages": range(32), "rest_pages": range(32, 38), "pages": range(64, 102), "n": 600, "k": 0,
            "first_token": b"42",
        }  # fmt: skip
        for code in codes:
            if "KVBootstrapServer(" in code:
                with socket.create_server((LOOPBACK, 0)) as free:
                    address = f"{LOOPBACK}:{free.getsockname()[1]}"
            elif "register_with=" in code:  # an engine of its own, and so a directory of its own
                address = stack.enter_context(KVBootstrapServer()).address
            here = {"8998": address.rpartition(":")[2], "8100": "0", "10.0.0.1": LOOPBACK, "10.0.0.2": LOOPBACK}
            for old, new in here.items():
                code = code.replace(old, new)
            exec(compile(code, name_of(page), "exec"), names)
    return names


def closing(kind: Callable[..., Closes], stack: ExitStack) -> Callable[..., Closes]:
    """Return what makes objects of this kind that are closed in the end."""

    def make(*args: object, **kwargs: object) -> Closes:
        made = kind(*args, **kwargs)
        stack.callback(made.close)
        return made

    return make


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_compiles_and_imports_what_there_is(case: Case) -> None:
    compiled(case.block.text)
    assert missing_imports(case.block.text) == []


@pytest.mark.parametrize("case", [case for case in CASES if is_complete(case.block.text)], ids=str)
def test_a_complete_block_runs(case: Case) -> None:
    exec(compile(case.block.text, str(case), "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", SCENES)
def test_the_blocks_of_a_page_run_with_what_the_page_describes(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(ROOT / page, monkeypatch)


def test_the_hand_off_of_the_readme_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = run(ROOT / "README.md", monkeypatch)["receiver"]
    assert isinstance(receiver, KVReceiver)
    assert receiver.aux == b"42"


def test_false_code_is_found() -> None:
    with pytest.raises(SyntaxError):
        compiled("manager = = 1")
    assert missing_imports("from kvroom import KVManager, KVNothing") == ["kvroom.KVNothing"]
    assert free_names("import os\nx = [y for y in os.environ]\nz(x)") == {"z"}
